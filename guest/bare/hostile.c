/*
 * A driver that means ill: it asks its disk for `n=N` (100) reads of nearly 1 GiB each at once, all by one indirect table that
 * names the same 4 MiB again and again, and then prints "beat N" once a second, which tells whether it runs.
 */
#include "lib/virtio.h"

#define PARTS 253
#define PART ((1u << 30) / (PARTS + 1) / 512 * 512)

static struct virtio disk;
static struct queue queue;

static void ask(u64 count)
{
    struct descriptor *table = memory_take((PARTS + 2) * sizeof *table, 4096);
    u8 *header = memory_take(4096, 4096), *data = memory_take(PART, 4096);

    /* A header of zeros reads from sector 0; the status byte lies in the same page. */
    for (u64 i = 0; i < 16; i++)
        header[i] = 0;
    table[0] = (struct descriptor){(u64)header, 16, DESC_NEXT, 1};
    for (u32 i = 1; i <= PARTS; i++)
        table[i] = (struct descriptor){(u64)data, PART, DESC_NEXT | DESC_WRITE, (u16)(i + 1)};
    table[PARTS + 1] = (struct descriptor){(u64)(header + 64), 1, DESC_WRITE, 0};
    for (u64 i = 0; i < count; i++) {
        queue.descriptors[i] = (struct descriptor){(u64)table, (PARTS + 2) * sizeof *table, DESC_INDIRECT, 0};
        queue_put(&queue, (u16)i);
    }
    queue_publish(&queue);
}

int main(void)
{
    if (!virtio_find(&disk, VIRTIO_ID_BLOCK, 0))
        fail("no disk");
    virtio_negotiate(&disk, F_VERSION_1 | F_INDIRECT);
    queue_set_up(&queue, &disk, 0, 256);
    virtio_ready(&disk);
    print("hostile\n");
    ask(option_number("n", 100));
    interrupts_on();
    pit_periodic(100);
    for (u64 ticks = 0;; ticks++) {
        wait_beyond(&irq_counts[0], ticks);
        if (ticks % 100 == 99)
            print("beat %u\n", ticks / 100);
    }
}
