/*
 * Misbehaves on purpose: `f=KIND` (may be repeated; run in order), each followed by a line that says what the guest saw.
 *   triple ud unmapped-mmio unclaimed-port reset      the processor and the bus
 *   panic crash-kernel                                tells pvpanic, at its port, and goes on
 *   sleep                                             for ever
 *   bad queues of block device `device=N` (default 0), one NAME per defect; prints `fault NAME status=S interrupt=I used=U`, with S the
 *   device's status, I its interrupt status, U what it put on the used ring; then resets the device, reads a sector and prints `recovered`:
 *     loop              a descriptor that is its own successor
 *     long              a chain through every descriptor of the queue
 *     next              a successor beyond the queue            head      a head beyond the queue
 *     address           data outside guest memory               hole      data in the MMIO gap
 *     wrap              address + length beyond 2^64            straddle  data that begins in memory and ends outside
 *     jump              the available index ahead by more than the queue holds
 *     indirect-*        (when negotiated) -loop -nested -odd (length no multiple of 16) -empty -address -long (table larger than the queue)
 *     short-header      a header of 8 bytes                     no-status  no writable byte for the status
 *     write-header      the header in a device-writable buffer  read-only-data  a read into a device-readable buffer
 *     ring              the used ring outside guest memory, then notify
 */
#include "lib/virtio.h"

#define OUTSIDE 0x800000000000ul
#define PVPANIC_PORT 0x505
static struct block block;

static u64 memory_end(void)
{
    /* struct boot_params: e820_entries at 0x1e8, e820_table at 0x2d0, 20 bytes each: address, size, type (1 = RAM). */
    extern u64 boot_params;
    u64 end = 0;
    for (u32 i = 0; boot_params && i < *(u8 *)(boot_params + 0x1e8); i++) {
        u32 *entry = (u32 *)(boot_params + 0x2d0 + 20ul * i);
        u64 limit = (entry[0] | (u64)entry[1] << 32) + (entry[2] | (u64)entry[3] << 32);
        if (entry[4] == 1 && entry[1] == 0 && limit > end)
            end = limit;
    }
    return end;
}

/* Prepares a good read of sector 0 in slot 0 and then spoils it. */
static void spoil(const char *name)
{
    struct queue *queue = &block.queue;
    struct block_request *request = &block.requests[0];
    bool indirect = !!(block.device.features & F_INDIRECT) && name[0] == 'i'; /* indirect-... */
    u64 features = block.device.features;
    if (!indirect) /* the other defects are in plain chains */
        block.device.features &= ~F_INDIRECT;
    block.per_request = indirect ? 1 : 3;
    block_submit(&block, 0, BLOCK_IN, 0, 512);
    block.device.features = features;

    volatile struct descriptor *chain = queue->descriptors, *table = (volatile struct descriptor *)request->indirect;
    u64 end = memory_end();
    if (word_is(name, "loop"))
        chain[1].next = 1;
    else if (word_is(name, "long"))
        for (u32 i = 1; i < queue->size; i++)
            chain[i] = (struct descriptor){(u64)request->data, 16, (u16)(DESC_WRITE | DESC_NEXT), (u16)((i + 1) % queue->size)};
    else if (word_is(name, "next"))
        chain[1].next = queue->size;
    else if (word_is(name, "head"))
        queue->available->ring[(queue->available_index - 1) & (queue->size - 1)] = queue->size;
    else if (word_is(name, "address"))
        chain[1].address = OUTSIDE;
    else if (word_is(name, "hole"))
        chain[1].address = VIRTIO_MMIO_BASE;
    else if (word_is(name, "wrap"))
        chain[1].address = ~0ul - 255;
    else if (word_is(name, "straddle"))
        chain[1].address = end - 256;
    else if (word_is(name, "jump"))
        queue->available_index += queue->size + 1;
    else if (word_is(name, "short-header"))
        chain[0].length = 8;
    else if (word_is(name, "no-status"))
        chain[1].flags = DESC_WRITE;
    else if (word_is(name, "write-header"))
        chain[0].flags |= DESC_WRITE;
    else if (word_is(name, "read-only-data"))
        chain[1].flags &= (u16)~DESC_WRITE;
    else if (word_is(name, "indirect-loop"))
        table[1].next = 1;
    else if (word_is(name, "indirect-nested"))
        table[1].flags = DESC_INDIRECT;
    else if (word_is(name, "indirect-odd"))
        chain[0].length = 40;
    else if (word_is(name, "indirect-empty"))
        chain[0].length = 0;
    else if (word_is(name, "indirect-address"))
        chain[0].address = OUTSIDE;
    else if (word_is(name, "indirect-long"))
        chain[0].length = 16u * 0x10000000u;
    else if (!word_is(name, "ring"))
        fail("unknown fault");
}

static void bad_queue(const char *name)
{
    block_open(&block, (u32)option_number("device", 0), option("noindirect") ? F_INDIRECT : 0);
    block_shape(&block, 1, 4096, 0);
    if (word_is(name, "ring")) {
        virtio_negotiate(&block.device, F_VERSION_1);
        mmio_write32(block.device.base + MMIO_QUEUE_SEL, 0);
        mmio_write32(block.device.base + MMIO_QUEUE_READY, 0);
        mmio_write32(block.device.base + MMIO_QUEUE_DEVICE, 0);
        mmio_write32(block.device.base + MMIO_QUEUE_DEVICE + 4, OUTSIDE >> 32);
        mmio_write32(block.device.base + MMIO_QUEUE_READY, 1);
        virtio_ready(&block.device);
    }
    spoil(name);
    queue_publish(&block.queue);

    u64 start = rdtsc(), patience = tsc_khz() * option_number("ms", 200);
    while (rdtsc() - start < patience && !(virtio_status(&block.device) & NEEDS_RESET) && !queue_has_used(&block.queue))
        cpu_relax();
    u32 status = virtio_status(&block.device);
    print("fault ");
    for (const char *c = name; *c && *c != ' '; c++)
        put_byte(*c);
    print(" status=0x%x interrupt=0x%x used=%u request=%u\n", (u64)status,
          (u64)mmio_read32(block.device.base + MMIO_INTERRUPT_STATUS), (u64)block.queue.used->index, (u64)block.requests[0].status);

    block_open(&block, 0, 0);
    block_shape(&block, 1, 4096, 0);
    u8 answer = block_do(&block, BLOCK_IN, 0, 512);
    print("%s status=%u\n", answer == BLOCK_OK ? "recovered" : "lost", (u64)answer);
}

int main(void)
{
    for (const char *kind = option("f"); kind; kind = next_option(kind, "f")) {
        if (word_is(kind, "triple")) {
            print("fault triple\n");
            triple_fault();
        } else if (word_is(kind, "ud")) {
            __asm__ volatile("ud2");
        } else if (word_is(kind, "reset")) {
            reset();
        } else if (word_is(kind, "panic") || word_is(kind, "crash-kernel")) {
            print("fault pvpanic knows=%u\n", (u64)in8(PVPANIC_PORT));
            out8(PVPANIC_PORT, word_is(kind, "panic") ? 1 : 2);
        } else if (word_is(kind, "sleep")) {
            idle_for_ever();
        } else if (word_is(kind, "unmapped-mmio")) {
            u32 value = mmio_read32(0xd0000000ul);
            mmio_write32(0xd0000000ul, value);
            print("fault unmapped-mmio read=0x%x\n", (u64)value);
        } else if (word_is(kind, "unclaimed-port")) {
            out8(0x2f0, 1);
            print("fault unclaimed-port read=0x%x\n", (u64)in8(0x2f0));
        } else {
            bad_queue(kind);
        }
    }
    print("faults end\n");
    finish();
}
