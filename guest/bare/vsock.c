/*
 * virtio-vsock from the guest's side: a driver that polls, or with `irq` sleeps until something comes. Command line:
 *   buffer=N        bytes of each receive buffer, its header not counted (default 4096); buffers=N of them (default 128)
 *   credit=N        what the host may send before it hears that it has been taken (default 262144)
 *   ms=N            how long `send` sends (default 300)
 *   irq noevent     sleep; do not negotiate the event index
 *   t=OP,NUMBERS    may be repeated; run in order. OP is
 *     recv          takes what a host program sends to port 52 until that finishes, and agrees to the end.
 *                   Prints `vsock recv bytes=B us=U packets=P sum=S`; us from the first data
 *     send,SIZE,PORT   connects to PORT of the host and sends packets of SIZE bytes for `ms`. Prints `vsock send bytes=B us=U packets=P`
 *     echo,COUNT    any number of connections to port 53 at once, all that comes on each is sent back, until COUNT have ended.
 *                   Prints `vsock echo bytes=B ended=N`
 *     wait,MS       idles
 */
#include "lib/virtio.h"

#define VIRTIO_ID_VSOCK 19

enum { RX = 0, TX = 1, EVENT = 2, ENTRIES = 256, HEADER = 44, SLOTS = 64, MOST = 65536, CONNECTIONS = 1024, HOST = 2, ECHO_ROOM = 8192 };
enum { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };
enum { SHUT_RECEIVE = 1, SHUT_SEND = 2 };

struct header { /* 5.10.6 */
    u64 src_cid, dst_cid;
    u32 src_port, dst_port, len;
    u16 type, op;
    u32 flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

struct connection {
    u32 here, there;
    bool used;
    u32 received, told;           /* of what came, and of that what the host knows */
    u32 sent, peer_room, peer_forwarded;
};

static struct virtio device;
static struct queue rx, tx, events;
static u64 cid, milliseconds, buffer_size, credit;
static u8 *rx_data, *tx_data;
static u32 tx_free[SLOTS], tx_free_count;
static bool sleeping;
static struct connection connections[CONNECTIONS];

static void provide(u32 slot)
{
    u64 size = HEADER + buffer_size;
    rx.descriptors[slot] = (struct descriptor){(u64)rx_data + slot * size, (u32)size, DESC_WRITE, 0};
    queue_put(&rx, (u16)slot);
}

static void quiet(struct queue *queue) { queue_want_interrupts(queue, 0); }

static void open_device(void)
{
    if (!virtio_find(&device, VIRTIO_ID_VSOCK, 0))
        fail("no vsock device");
    virtio_negotiate(&device, (F_VERSION_1 | F_EVENT_IDX | F_INDIRECT) & ~(option("noevent") ? F_EVENT_IDX : 0));
    queue_set_up(&rx, &device, RX, ENTRIES);
    queue_set_up(&tx, &device, TX, ENTRIES);
    queue_set_up(&events, &device, EVENT, ENTRIES);
    u32 buffers = (u32)option_number("buffers", 128);
    if (buffers > rx.size)
        fail("more buffers than the queue holds");
    rx_data = memory_take(buffers * (HEADER + buffer_size), 4096);
    tx_data = memory_take((u64)SLOTS * (HEADER + MOST), 4096);
    for (u32 slot = 0; slot < SLOTS; slot++)
        tx_free[tx_free_count++] = slot;
    virtio_ready(&device);
    quiet(&rx);
    quiet(&tx);
    cid = config_read64(&device, 0);
    for (u32 slot = 0; slot < buffers; slot++)
        provide(slot);
    queue_publish(&rx);
}

static void pause_until(struct queue *queue, u64 limit)
{
    if (!sleeping) {
        for (u64 start = rdtsc(), spins = 0; !queue_has_used(queue); spins++) {
            cpu_relax();
            if (spins % 1024 == 1023 && rdtsc() - start > limit)
                fail("the device says nothing any more");
        }
        return;
    }
    volatile u64 *count = &irq_counts[device.gsi];
    u64 seen = *count;
    queue_want_interrupts(queue, 1);
    if (!queue_has_used(queue))
        wait_beyond(count, seen);
    mmio_write32(device.base + MMIO_INTERRUPT_ACK, mmio_read32(device.base + MMIO_INTERRUPT_STATUS));
    quiet(queue);
}

static void reap(void)
{
    while (queue_has_used(&tx))
        tx_free[tx_free_count++] = queue_take_used(&tx).id;
}

static u32 slot_for_packet(void)
{
    reap();
    if (!tx_free_count) {
        queue_publish(&tx);
        pause_until(&tx, tsc_khz() * 5000);
        reap();
    }
    if (!sleeping)
        quiet(&tx);
    return tx_free[--tx_free_count];
}

/* Not visible to the device before queue_publish(&tx). Data is what lies in the slot behind the header. */
static void put_packet(struct connection *c, u32 slot, u16 op, u32 size, u32 flags)
{
    struct header *h = (struct header *)(tx_data + (u64)slot * (HEADER + MOST));
    *h = (struct header){cid, HOST, c->here, c->there, size, 1, op, flags, (u32)credit, c->received};
    c->told = c->received;
    c->sent += size;
    tx.descriptors[slot] = (struct descriptor){(u64)h, HEADER + size, 0, 0};
    queue_put(&tx, (u16)slot);
}

static void control(struct connection *c, u16 op, u32 flags)
{
    put_packet(c, slot_for_packet(), op, 0, flags);
    queue_publish(&tx);
}

static struct header *next_packet(u32 *slot)
{
    if (!queue_has_used(&rx))
        return 0;
    barrier();
    *slot = queue_take_used(&rx).id;
    return (struct header *)(rx_data + *slot * (HEADER + buffer_size));
}

static struct connection *find(const struct header *h)
{
    struct connection *empty = 0;
    for (u32 i = 0; i < CONNECTIONS; i++) {
        struct connection *c = &connections[i];
        if (c->used && c->here == h->dst_port && c->there == h->src_port)
            return c;
        if (!c->used && !empty)
            empty = c;
    }
    if (h->op != REQUEST)
        return 0;
    if (!empty)
        fail("too many connections");
    *empty = (struct connection){h->dst_port, h->src_port, 1, 0, 0, 0, 0, 0};
    return empty;
}

/* What every packet says, and the answers that need no program. */
static void note(struct connection *c, const struct header *h)
{
    c->peer_room = h->buf_alloc;
    c->peer_forwarded = h->fwd_cnt;
    if (h->op == REQUEST)
        control(c, RESPONSE, 0);
    else if (h->op == CREDIT_REQUEST)
        control(c, CREDIT_UPDATE, 0);
    else if (h->op == RW) {
        c->received += h->len;
        if (c->received - c->told >= credit / 2)
            control(c, CREDIT_UPDATE, 0);
    }
}

static u64 sum_of(const u8 *data, u32 size, u64 sum)
{
    for (u32 i = 0; i < size; i++)
        sum = sum * 31 + data[i];
    return sum;
}

static void run_recv(void)
{
    u64 bytes = 0, packets = 0, start = 0, end = 0, sum = 0;
    bool summed = !!option("sum");
    u32 slot;
    print("vsock recv ready\n");
    for (bool done = 0; !done;) {
        struct header *h = next_packet(&slot);
        if (!h) {
            queue_publish(&rx);
            pause_until(&rx, tsc_khz() * 20000);
            continue;
        }
        struct connection *c = find(h);
        if (!c)
            fail("a packet of no connection");
        note(c, h);
        if (h->op == RW) {
            end = rdtsc();
            if (!start)
                start = end;
            bytes += h->len;
            packets++;
            if (summed)
                sum = sum_of((u8 *)(h + 1), h->len, sum);
        } else if (h->op == SHUTDOWN || h->op == RST) {
            done = 1;
            c->used = 0;
            if (h->op == SHUTDOWN)
                control(c, RST, 0);
        }
        provide(slot);
        if ((u16)(rx.available_index - rx.published) >= 16)
            queue_publish(&rx);
    }
    queue_publish(&rx);
    print("vsock recv bytes=%u us=%u packets=%u sum=0x%x\n", bytes, (end - start) / (tsc_khz() / 1000), packets, sum);
}

/* Takes what has come for c while it sends; returns whether the connection has ended. */
static bool hear(struct connection *c)
{
    u32 slot;
    bool ended = 0;
    for (struct header *h; (h = next_packet(&slot));) {
        if (h->dst_port != c->here)
            fail("a packet of another connection");
        c->peer_room = h->buf_alloc;
        c->peer_forwarded = h->fwd_cnt;
        ended |= h->op == RST || h->op == SHUTDOWN;
        provide(slot);
    }
    if (!sleeping)
        quiet(&rx);
    queue_publish(&rx);
    return ended;
}

static void run_send(u32 size, u32 port)
{
    static u32 from = 1000;
    struct connection *c = &connections[0];
    *c = (struct connection){from++, port, 1, 0, 0, 0, 0, 0};
    control(c, REQUEST, 0);
    while (!c->peer_room) {
        pause_until(&rx, tsc_khz() * 5000);
        if (hear(c))
            fail("no host program listens");
    }
    u64 packets = 0, limit = milliseconds * tsc_khz(), start = rdtsc();
    while (rdtsc() - start < limit) {
        u32 flying = c->sent - c->peer_forwarded, room = c->peer_room > flying ? c->peer_room - flying : 0;
        if (room < size) {
            queue_publish(&tx);
            pause_until(&rx, tsc_khz() * 5000);
            if (hear(c))
                fail("the host program has ended");
            continue;
        }
        put_packet(c, slot_for_packet(), RW, size, 0);
        packets++;
        queue_publish(&tx);
        if (queue_has_used(&rx))
            hear(c);
    }
    control(c, SHUTDOWN, SHUT_RECEIVE | SHUT_SEND);
    do
        pause_until(&rx, tsc_khz() * 5000);
    while (!hear(c));
    print("vsock send bytes=%u us=%u packets=%u\n", packets * size, (rdtsc() - start) / (tsc_khz() / 1000), packets);
    c->used = 0;
}

/* What a connection is still to be sent back: as much as the host was given credit for, at most. */
static struct {
    u32 begin, size;
    bool finished;
    u8 data[ECHO_ROOM];
} kept[CONNECTIONS];

static void keep(struct connection *c, const u8 *data, u32 size)
{
    u32 at = (u32)(c - connections);
    for (u32 i = 0; i < size; i++)
        kept[at].data[(kept[at].begin + kept[at].size + i) % ECHO_ROOM] = data[i];
    kept[at].size += size;
}

/* Send back what the host has room for, and the end when that was all. */
static void send_kept(struct connection *c)
{
    u32 at = (u32)(c - connections);
    while (kept[at].size) {
        u32 flying = c->sent - c->peer_forwarded, room = c->peer_room > flying ? c->peer_room - flying : 0;
        u32 size = ECHO_ROOM - kept[at].begin;
        size = size < kept[at].size ? size : kept[at].size;
        size = size < room ? size : room;
        if (!size)
            return;
        u32 out = slot_for_packet();
        memory_copy(tx_data + (u64)out * (HEADER + MOST) + HEADER, kept[at].data + kept[at].begin, size);
        kept[at].begin = (kept[at].begin + size) % ECHO_ROOM;
        kept[at].size -= size;
        c->received += size;
        put_packet(c, out, RW, size, 0);
        queue_publish(&tx);
    }
    if (kept[at].finished)
        control(c, SHUTDOWN, SHUT_RECEIVE | SHUT_SEND);
    kept[at].finished = 0;
}

static void run_echo(u32 count)
{
    u64 bytes = 0;
    u32 slot, ended = 0;
    credit = ECHO_ROOM;
    print("vsock echo ready\n");
    while (ended < count) {
        struct header *h = next_packet(&slot);
        if (!h) {
            queue_publish(&rx);
            pause_until(&rx, tsc_khz() * 20000);
            continue;
        }
        struct connection *c = find(h);
        if (c) {
            if (h->op == REQUEST)
                kept[c - connections].size = kept[c - connections].finished = 0;
            if (h->op == RW) {
                c->peer_room = h->buf_alloc;
                c->peer_forwarded = h->fwd_cnt;
                keep(c, (const u8 *)(h + 1), h->len);
                bytes += h->len;
            } else
                note(c, h);
            if (h->op == SHUTDOWN)
                kept[c - connections].finished = 1;
            if (h->op == RST) {
                c->used = 0;
                ended++;
            } else
                send_kept(c);
        }
        provide(slot);
    }
    queue_publish(&rx);
    print("vsock echo bytes=%u ended=%u\n", bytes, (u64)ended);
}

static void run_option(const char *text)
{
    const char *at = text;
    u64 numbers[2] = {4096, 80};
    while (*at && *at != ' ' && *at != ',')
        at++;
    for (u32 n = 0; n < 2 && *at == ','; n++)
        numbers[n] = parse_number(at + 1, &at);
    if (word_is(text, "recv"))
        run_recv();
    else if (word_is(text, "send"))
        run_send((u32)numbers[0], (u32)numbers[1]);
    else if (word_is(text, "echo"))
        run_echo((u32)numbers[0]);
    else if (word_is(text, "wait"))
        for (u64 start = rdtsc(); rdtsc() - start < numbers[0] * tsc_khz();)
            cpu_relax();
    else
        fail("unknown test");
}

int main(void)
{
    milliseconds = option_number("ms", 300);
    buffer_size = option_number("buffer", 4096);
    credit = option_number("credit", 262144);
    sleeping = !!option("irq");
    tsc_khz();
    open_device();
    if (sleeping) {
        interrupts_on();
        pic_unmask(device.gsi);
    }
    print("vsock cid=%u features=0x%x khz=%u\n", cid, device.features, tsc_khz());
    for (const char *text = option("t"); text; text = next_option(text, "t"))
        run_option(text);
    print("vsock end status=0x%x\n", (u64)virtio_status(&device));
    finish();
}
