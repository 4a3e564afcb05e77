/*
 * virtio-rng from the guest's side: a driver that polls. Command line:
 *   bytes=N         of each request (default 4096); requests=N of them, one after the other (default 16)
 * Prints `rng bytes=B us=U ones=O`: bytes that came, and how many of their bits are 1. Then it waits for lines on the serial
 * port, each of which is another round; `end` ends it.
 */
#include "lib/virtio.h"

#define VIRTIO_ID_RNG 4

enum { ENTRIES = 8, MOST = 1 << 20 };

static struct virtio device;
static struct queue queue;

static u64 ask(u8 *data, u64 size)
{
    queue.descriptors[0] = (struct descriptor){(u64)data, (u32)size, DESC_WRITE, 0};
    queue_put(&queue, 0);
    queue_publish(&queue);
    for (u64 start = rdtsc(); !queue_has_used(&queue);) {
        cpu_relax();
        if (rdtsc() - start > tsc_khz() * 30000)
            fail("the device gives nothing");
    }
    barrier();
    return queue_take_used(&queue).length;
}

static void round_of(u8 *data, u64 size, u64 requests)
{
    u64 bytes = 0, ones = 0, start = rdtsc();
    for (u64 n = 0; n < requests; n++) {
        u64 came = ask(data, size);
        bytes += came;
        for (u64 i = 0; i < came; i++)
            for (u32 byte = data[i]; byte; byte &= byte - 1)
                ones++;
    }
    print("rng bytes=%u us=%u ones=%u\n", bytes, (rdtsc() - start) * 1000 / tsc_khz(), ones);
}

int main(void)
{
    enum { IER = SERIAL_PORT + 1, MCR = SERIAL_PORT + 4, LSR = SERIAL_PORT + 5 };
    u64 size = option_number("bytes", 4096), requests = option_number("requests", 16);
    if (size > MOST)
        fail("too many bytes for a request");
    u8 *data = memory_take(MOST, 4096);
    if (!virtio_find(&device, VIRTIO_ID_RNG, 0))
        fail("no entropy device");
    virtio_negotiate(&device, F_VERSION_1 | F_EVENT_IDX);
    queue_set_up(&queue, &device, 0, ENTRIES);
    virtio_ready(&device);
    queue_want_interrupts(&queue, 0);
    interrupts_on();
    out8(MCR, 0x0b); /* DTR, RTS, OUT2: the gate of the interrupt line */
    pic_unmask(4);
    out8(IER, 1); /* received data available */
    round_of(data, size, requests);
    for (bool ending = 0;;) {
        u64 seen = irq_counts[4];
        while (in8(LSR) & 1) {
            char c = (char)in8(SERIAL_PORT);
            ending |= c == 'e';
            if (c != '\n')
                continue;
            if (ending)
                finish();
            round_of(data, size, requests);
        }
        wait_beyond(&irq_counts[4], seen);
    }
}
