/*
 * virtio-balloon from the guest's side: a driver that polls. Command line:
 *   free=N          MiB of memory, from 16 MiB on, that it writes to at first and may give up (default 16)
 *   list=N          page frame numbers of a chain (default 256); depth=N chains at a time (default 64)
 *   order=down      name pages from the last to the first
 *   do=C,N          may be repeated: a line as below, with a comma for the blank, that is obeyed before any other
 * Prints `balloon ready`, and then does what lines on the serial port say:
 *   f               writes to every page of that memory again; prints `filled`
 *   i COUNT         puts the first COUNT MiB into the balloon; prints `inflated MIB us=U`
 *   o COUNT         takes them out again; prints `deflated MIB`
 *   r COUNT         reports the first COUNT MiB as free; prints `reported MIB us=U`
 *   h COUNT         waits for the host to ask, hints that they are free, and says that this is all; prints `hinted MIB us=U`
 *   s               gives statistics, with numbers that tell them apart, and waits for the buffer to come back; prints `told`
 *   t               prints `target PAGES`, as the host wants it
 *   c               looks whether the memory that is not in the balloon is as it was written; prints `checked`, or FAIL
 *   e               ends
 */
#include "lib/virtio.h"

#define VIRTIO_ID_BALLOON 5
#define F_STATISTICS FEATURE(1)
#define F_DEFLATE_ON_OOM FEATURE(2)
#define F_HINTING FEATURE(3)
#define F_REPORTING FEATURE(5)

enum { PAGE = 4096, MIB = 1 << 20, ENTRIES = 256, BEGIN = 16, LINE = 64, TAGS = 16, BLOCK = 2 * MIB };
enum { IER = SERIAL_PORT + 1, MCR = SERIAL_PORT + 4, LSR = SERIAL_PORT + 5 };

struct statistic {
    u16 tag;
    u64 value;
} __attribute__((packed));

static struct virtio device;
static struct queue queues[5];
static u64 megabytes, list, depth, taken; /* the first `taken` MiB are not ours at the moment */
static u32 *lists;
static bool down;
static struct statistic statistics[TAGS];
static u64 rounds, written; /* in which round it was written last */

static u64 *page_at(u64 index) { return (u64 *)((u64)BEGIN * MIB + index * PAGE); }

static void fill(void)
{
    written = ++rounds;
    for (u64 i = taken * (MIB / PAGE); i < megabytes * (MIB / PAGE); i++)
        *(volatile u64 *)page_at(i) = i ^ written << 32;
}

static void check(void)
{
    for (u64 i = taken * (MIB / PAGE); i < megabytes * (MIB / PAGE); i++)
        if (*(volatile u64 *)page_at(i) != (i ^ written << 32)) {
            print("page %u is 0x%x\n", i, *page_at(i));
            fail("memory is not as it was written");
        }
    print("checked\n");
}

static void wait_used(struct queue *queue)
{
    for (u64 start = rdtsc(); !queue_has_used(queue);) {
        cpu_relax();
        if (rdtsc() - start > tsc_khz() * 30000)
            fail("the device does not answer");
    }
    barrier();
}

/* One buffer, answered. */
static void give(struct queue *queue, void *data, u64 size, u16 flags)
{
    queue->descriptors[0] = (struct descriptor){(u64)data, (u32)size, flags, 0};
    queue_put(queue, 0);
    queue_publish(queue);
    wait_used(queue);
    queue_take_used(queue);
}

/* The first `count` MiB, in lists. */
static void name_pages(struct queue *queue, u64 count)
{
    u64 pages = count * (MIB / PAGE), named = 0;
    while (named < pages) {
        u64 chains = 0;
        for (; chains < depth && named < pages; chains++) {
            u64 many = pages - named < list ? pages - named : list;
            for (u64 i = 0; i < many; i++, named++)
                lists[chains * list + i] = (u32)(BEGIN * (MIB / PAGE) + (down ? pages - 1 - named : named));
            queue->descriptors[chains] = (struct descriptor){(u64)&lists[chains * list], (u32)(many * 4), 0, 0};
            queue_put(queue, (u16)chains);
        }
        queue_publish(queue);
        for (; chains; chains--) {
            wait_used(queue);
            queue_take_used(queue);
        }
    }
}

static struct queue *queue_of(u64 feature)
{
    u32 index = 2;
    for (u64 bit = F_STATISTICS; bit < feature; bit <<= 1)
        index += bit != F_DEFLATE_ON_OOM && device.features & bit;
    if (!(device.features & feature))
        fail("the device has no such queue");
    return &queues[index];
}

static u64 since(u64 start) { return (rdtsc() - start) * 1000 / tsc_khz(); }

static void give_blocks(struct queue *queue, u64 count)
{
    for (u64 at = 0; at < count * MIB; at += BLOCK)
        give(queue, (u8 *)page_at(0) + at, count * MIB - at < BLOCK ? count * MIB - at : BLOCK, DESC_WRITE);
}

static u32 config(u32 offset) { return mmio_read32(device.base + MMIO_CONFIG + offset); }

static void hint(u64 count)
{
    struct queue *queue = queue_of(F_HINTING);
    while (config(8) <= 1)
        cpu_relax();
    static u32 command;
    command = config(8);
    give(queue, &command, 4, 0);
    give_blocks(queue, count);
    command = 0;
    give(queue, &command, 4, 0);
}

static void tell(void)
{
    static bool held;
    struct queue *queue = queue_of(F_STATISTICS);
    if (held) {
        wait_used(queue);
        queue_take_used(queue);
    }
    for (u16 tag = 0; tag < TAGS; tag++)
        statistics[tag] = (struct statistic){tag, (u64)tag * 1000003 + rounds};
    queue->descriptors[0] = (struct descriptor){(u64)statistics, sizeof statistics, 0, 0};
    queue_put(queue, 0);
    queue_publish(queue);
    held = 1;
    print("told\n");
}

static void open_device(void)
{
    if (!virtio_find(&device, VIRTIO_ID_BALLOON, 0))
        fail("no balloon");
    virtio_negotiate(&device, F_VERSION_1 | F_EVENT_IDX | F_INDIRECT | F_STATISTICS | F_DEFLATE_ON_OOM | F_HINTING | F_REPORTING);
    u16 count = 2;
    for (u64 bit = F_STATISTICS; bit <= F_REPORTING; bit <<= 1)
        count = (u16)(count + (bit != F_DEFLATE_ON_OOM && bit != FEATURE(4) && device.features & bit));
    for (u16 i = 0; i < count; i++)
        queue_set_up(&queues[i], &device, i, ENTRIES);
    virtio_ready(&device);
    for (u16 i = 0; i < count; i++)
        queue_want_interrupts(&queues[i], 0);
}

static void obey(const char *line)
{
    const char *rest = line + 2;
    u64 count = (line[1] == ' ' || line[1] == ',') ? parse_number(rest, &rest) : 0, start = rdtsc();
    if (count > megabytes)
        fail("so much memory there is not");
    switch (line[0]) {
    case 'f':
        fill();
        print("filled\n");
        break;
    case 'i':
        name_pages(&queues[0], count);
        start = since(start);
        taken = count;
        mmio_write32(device.base + MMIO_CONFIG + 4, (u32)(taken * (MIB / PAGE)));
        print("inflated %u us=%u\n", count, start);
        break;
    case 'o':
        name_pages(&queues[1], count);
        taken = 0;
        mmio_write32(device.base + MMIO_CONFIG + 4, 0);
        print("deflated %u\n", count);
        break;
    case 'r':
        give_blocks(queue_of(F_REPORTING), count);
        taken = count;
        print("reported %u us=%u\n", count, since(start));
        break;
    case 'h':
        hint(count);
        taken = count;
        print("hinted %u us=%u\n", count, since(start));
        break;
    case 's':
        tell();
        break;
    case 't':
        print("target %u\n", config(0));
        break;
    case 'c':
        check();
        break;
    case 'e':
        finish();
    }
}

int main(void)
{
    megabytes = option_number("free", 16);
    list = option_number("list", 256);
    depth = option_number("depth", 64);
    down = option_is("order", "down");
    lists = memory_take(list * depth * sizeof *lists, 4096);
    open_device();
    fill();
    interrupts_on();
    out8(MCR, 0x0b); /* DTR, RTS, OUT2: the gate of the interrupt line */
    pic_unmask(4);
    out8(IER, 1); /* received data available */
    print("balloon ready\n");
    for (const char *what = next_option(0, "do"); what; what = next_option(what, "do"))
        obey(what);
    char line[LINE];
    for (u64 length = 0;;) {
        u64 seen = irq_counts[4];
        while (in8(LSR) & 1) {
            char c = (char)in8(SERIAL_PORT);
            if (c != '\n') {
                if (length < LINE - 1)
                    line[length++] = c;
                continue;
            }
            line[length] = 0;
            length = 0;
            obey(line);
        }
        wait_beyond(&irq_counts[4], seen);
    }
}
