/*
 * virtio-net from the guest's side: a driver that polls. Command line:
 *   device=N        the N-th network device (default 0)
 *   ms=N            how long each timed test runs (default 300)
 *   nomerge noevent large     negotiate or do not: merged receive buffers (default), event index (default), segments of 64 KiB
 *   buffer=N        bytes of each receive buffer (default 2048)
 *   split           transmits chains of two descriptors, the header in one of its own
 *   group=N         frames that are made available at a time (default 16)
 *   told            asks for interrupts, as a driver does that has not thought of it, and polls all the same
 *   to=N from=N     the last byte of the frames' addresses 06:00:00:00:00:N (defaults 2 and 1)
 *   t=OP,SIZE[,COUNT]   may be repeated; run in order. OP is
 *     tx        sends frames of SIZE bytes as fast as they are taken; above 1,514 each is a TCP segment to be cut by the host.
 *               Prints `net tx SIZE frames=N bytes=B us=U notify=K`
 *     rx        takes what comes. Prints `net rx SIZE frames=N bytes=B us=U notify=K`; SIZE is only repeated
 *     one       sends COUNT frames of SIZE bytes with their numbers in them and waits until they are taken
 *     expect    waits until COUNT frames have come, checks that each has SIZE bytes, prints a sum of them
 *     echo      COUNT frames: sends each that comes back to where it came from
 *     wait      idles for SIZE ms
 *     talk      writes SIZE bytes to the console
 */
#include "lib/virtio.h"

#define VIRTIO_ID_NET 1
#define F_NET_CSUM FEATURE(0)
#define F_NET_GUEST_CSUM FEATURE(1)
#define F_NET_MAC FEATURE(5)
#define F_NET_GUEST_TSO4 FEATURE(7)
#define F_NET_HOST_TSO4 FEATURE(11)
#define F_NET_MERGE FEATURE(15)

enum { RX = 0, TX = 1, ENTRIES = 256, HEADER = 12, MOST = 65562 };

struct net_header { /* 5.1.6 */
    u8 flags, gso_type;
    u16 header_length, gso_size, csum_start, csum_offset, buffers;
};

static struct virtio device;
static struct queue rx, tx;
static u64 milliseconds, buffer_size, group;
static bool split, told;
static u8 *rx_data, *tx_data;
static u32 tx_free[ENTRIES], tx_free_count, tx_slots;

static void put16(u8 *place, u32 value)
{
    place[0] = (u8)(value >> 8);
    place[1] = (u8)value;
}

/* A frame with its header at tx_data: of a protocol nobody speaks, or a TCP segment too large for the wire. */
static void make_frame(u32 size)
{
    struct net_header *header = (struct net_header *)tx_data;
    u8 *frame = tx_data + HEADER;
    memset(tx_data, 0, HEADER + 64);
    frame[0] = frame[6] = 6;
    frame[5] = (u8)option_number("to", 2);
    frame[11] = (u8)option_number("from", 1);
    put16(frame + 12, 0x88b5);
    if (size <= 1514)
        return;
    *header = (struct net_header){1, 1, 54, 1448, 34, 16, 0}; /* NEEDS_CSUM, GSO_TCPV4 */
    put16(frame + 12, 0x0800);
    u8 *ip = frame + 14, *tcp = ip + 20;
    ip[0] = 0x45;
    put16(ip + 2, size - 14);
    ip[8] = 64;
    ip[9] = 6;
    ip[12] = ip[16] = 10;
    ip[15] = 2;
    ip[19] = 3;
    u32 sum = 0;
    for (u32 i = 0; i < 20; i += 2)
        sum += (u32)ip[i] << 8 | ip[i + 1];
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    put16(ip + 10, ~sum);
    put16(tcp, 1000);
    put16(tcp + 2, 2000);
    tcp[12] = 0x50;
    tcp[13] = 0x10;
    put16(tcp + 14, 0xffff);
}

static void provide(u32 slot)
{
    rx.descriptors[slot] = (struct descriptor){(u64)rx_data + slot * buffer_size, (u32)buffer_size, DESC_WRITE, 0};
    queue_put(&rx, (u16)slot);
}

static void open_device(void)
{
    if (!virtio_find(&device, VIRTIO_ID_NET, (u32)option_number("device", 0)))
        fail("no network device");
    u64 wanted = F_VERSION_1 | F_EVENT_IDX | F_NET_MERGE | F_NET_MAC | F_NET_CSUM | F_NET_HOST_TSO4;
    if (option("large"))
        wanted |= F_NET_GUEST_CSUM | F_NET_GUEST_TSO4;
    wanted &= ~((option("nomerge") ? F_NET_MERGE : 0) | (option("noevent") ? F_EVENT_IDX : 0));
    virtio_negotiate(&device, wanted);
    queue_set_up(&rx, &device, RX, ENTRIES);
    queue_set_up(&tx, &device, TX, ENTRIES);
    rx_data = memory_take(rx.size * buffer_size, 4096);
    tx_data = memory_take(2 * MOST, 4096);
    for (u32 slot = 0; slot < tx.size; slot += split ? 2 : 1)
        tx_free[tx_free_count++] = slot;
    tx_slots = tx_free_count;
    virtio_ready(&device);
    queue_want_interrupts(&rx, told);
    queue_want_interrupts(&tx, told);
    for (u32 slot = 0; slot < rx.size; slot++)
        provide(slot);
    queue_publish(&rx);
}

static void silence(struct queue *queue)
{
    /* The event index goes round: keep it behind, or at the next entry. */
    queue->available->ring[queue->size] = (u16)(queue->used_index - !told);
}

static void submit(const u8 *data, u32 size)
{
    u32 slot = tx_free[--tx_free_count];
    if (split) {
        tx.descriptors[slot] = (struct descriptor){(u64)data, HEADER, DESC_NEXT, (u16)(slot + 1)};
        tx.descriptors[slot + 1] = (struct descriptor){(u64)data + HEADER, size, 0, 0};
    } else {
        tx.descriptors[slot] = (struct descriptor){(u64)data, HEADER + size, 0, 0};
    }
    queue_put(&tx, (u16)slot);
}

static u32 reap(void)
{
    u32 count = 0;
    for (; queue_has_used(&tx); count++)
        tx_free[tx_free_count++] = queue_take_used(&tx).id;
    silence(&tx);
    return count;
}

static void report(const char *what, u32 size, u64 frames, u64 bytes, u64 cycles, u64 notifications)
{
    print("net %s %u frames=%u bytes=%u us=%u notify=%u\n", what, (u64)size, frames, bytes, cycles / (tsc_khz() / 1000), notifications);
}

static void run_tx(u32 size)
{
    make_frame(size);
    u64 frames = 0, notified = tx.notifications, limit = milliseconds * tsc_khz(), start = rdtsc(), now = start;
    for (; now - start < limit; now = rdtsc()) {
        for (u32 n = 0; tx_free_count && n < group; n++)
            submit(tx_data, size);
        queue_publish(&tx);
        while (tx_free_count < group && rdtsc() - start < limit) {
            frames += reap();
            cpu_relax();
        }
    }
    u64 taken = rdtsc() - start;
    while (tx_free_count < tx_slots) {
        frames += reap();
        if (rdtsc() - start > limit + 5000 * tsc_khz())
            fail("frames are not taken");
    }
    report("tx", size, frames, frames * size, taken, tx.notifications - notified);
}

/* The next frame's buffers; its size, or 0 when there is none. */
static u32 take(u16 *slots, u32 *count)
{
    if (!queue_has_used(&rx))
        return 0;
    barrier();
    struct used_element element = queue_take_used(&rx);
    u32 buffers = ((volatile struct net_header *)(rx_data + element.id * buffer_size))->buffers, size = element.length;
    if (!(device.features & F_NET_MERGE))
        buffers = 1;
    if (!buffers || buffers > rx.size)
        fail("a frame of no or too many buffers");
    slots[0] = (u16)element.id;
    for (*count = 1; *count < buffers; ++*count) {
        for (u64 start = rdtsc(); !queue_has_used(&rx);)
            if (rdtsc() - start > 1000 * tsc_khz())
                fail("half a frame");
        element = queue_take_used(&rx);
        slots[*count] = (u16)element.id;
        size += element.length;
    }
    return size - HEADER;
}

static u16 slots[ENTRIES];

static void run_rx(u32 size)
{
    u64 frames = 0, bytes = 0, limit = milliseconds * tsc_khz(), start = rdtsc(), notified = rx.notifications;
    u32 count, length, waiting = 0;
    while (rdtsc() - start < limit) {
        length = take(slots, &count);
        if (length) {
            frames++;
            bytes += length;
            for (u32 i = 0; i < count; i++)
                provide(slots[i]);
            waiting += count;
            if (waiting < group)
                continue;
        } else {
            cpu_relax();
        }
        if (waiting) {
            silence(&rx);
            queue_publish(&rx);
            waiting = 0;
        }
    }
    report("rx", size, frames, bytes, rdtsc() - start, rx.notifications - notified);
}

static void run_one(u32 size, u32 count)
{
    make_frame(size);
    for (u32 n = 0; n < count; n++) {
        put16(tx_data + HEADER + 14, n);
        submit(tx_data, size);
        queue_publish(&tx);
        for (u64 start = rdtsc(); tx_free_count < tx_slots; reap())
            if (rdtsc() - start > 5000 * tsc_khz())
                fail("a frame is not taken");
    }
    print("net one %u sent=%u\n", (u64)size, (u64)count);
}

static void run_expect(u32 size, u32 wanted, bool echo)
{
    u64 sum = 0;
    u32 count, length;
    print("net %s ready\n", echo ? "echo" : "expect");
    for (u32 seen = 0; seen < wanted; seen++) {
        for (u64 start = rdtsc(); !(length = take(slots, &count));)
            if (rdtsc() - start > 20000 * tsc_khz())
                fail("no frame comes");
        if (!echo && length != size) {
            print("net frame of %u bytes, not %u\n", (u64)length, (u64)size);
            fail("a frame of another size");
        }
        u32 left = length + HEADER, done = 0;
        for (u32 i = 0; i < count; i++) {
            u8 *data = rx_data + slots[i] * buffer_size;
            u32 part = left < buffer_size ? left : (u32)buffer_size;
            for (u32 at = i ? 0 : HEADER; at < part; at++)
                sum = sum * 31 + data[at];
            if (echo)
                memory_copy(tx_data + MOST + done, data, part);
            done += part;
            left -= part;
            provide(slots[i]);
        }
        silence(&rx);
        queue_publish(&rx);
        if (echo) {
            u8 *frame = tx_data + MOST + HEADER, address[6];
            memset(tx_data + MOST, 0, HEADER);
            memory_copy(address, frame, 6);
            memory_copy(frame, frame + 6, 6);
            memory_copy(frame + 6, address, 6);
            submit(tx_data + MOST, length);
            queue_publish(&tx);
            for (u64 start = rdtsc(); tx_free_count < tx_slots; reap())
                if (rdtsc() - start > 5000 * tsc_khz())
                    fail("a frame is not taken");
        }
    }
    print("net %s %u seen=%u sum=0x%x\n", echo ? "echo" : "expect", (u64)size, (u64)wanted, sum);
}

static void run_option(const char *text)
{
    const char *at = text;
    u64 numbers[2] = {0, 1};
    while (*at && *at != ' ' && *at != ',')
        at++;
    for (u32 n = 0; n < 2 && *at == ','; n++)
        numbers[n] = parse_number(at + 1, &at);
    u32 size = (u32)numbers[0], count = (u32)numbers[1];
    if (size > MOST - HEADER)
        fail("no frame is that large");
    if (word_is(text, "tx"))
        run_tx(size);
    else if (word_is(text, "rx"))
        run_rx(size);
    else if (word_is(text, "one"))
        run_one(size, count);
    else if (word_is(text, "expect") || word_is(text, "echo"))
        run_expect(size, count, word_is(text, "echo"));
    else if (word_is(text, "wait"))
        for (u64 start = rdtsc(); rdtsc() - start < size * tsc_khz();)
            cpu_relax();
    else if (word_is(text, "talk"))
        for (u64 i = 0; i < size; i++)
            put_byte(i % 80 == 79 ? '\n' : (char)('a' + i % 26));
    else
        fail("unknown test");
}

int main(void)
{
    milliseconds = option_number("ms", 300);
    buffer_size = option_number("buffer", 2048);
    split = option("split") != 0;
    told = option("told") != 0;
    group = option_number("group", 16);
    tsc_khz();
    open_device();
    print("net offered=0x%x features=0x%x khz=%u\n", device.offered, device.features, tsc_khz());
    for (const char *text = option("t"); text; text = next_option(text, "t"))
        run_option(text);
    print("net end status=0x%x\n", (u64)virtio_status(&device));
    finish();
}
