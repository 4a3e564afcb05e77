/*
 * virtio-blk from the guest's side. Command line:
 *   device=N        the N-th block device (default 0)
 *   noindirect, noevent   do not negotiate these
 *   irq             sleep until the interrupt instead of polling the used ring
 *   ms=N            how long each timed test runs (default 300), or bytes=N how much it moves
 *   seed=N          of the data pattern
 *   t=OP,SIZE,DEPTH[,SEGMENT]   may be repeated; run in order. OP is
 *     randread randwrite seqread seqwrite     timed; prints `blk OP SIZE DEPTH bytes=B cycles=C us=U mibs=M notify=N`
 *     fill check                              writes, verifies the whole device: 8-byte word w holds pattern(w, seed)
 *     sum                                     reads the whole device and prints a checksum of it
 *   t=id t=flush t=beyond t=unsupported t=write t=read    single requests; print `blk OP status=S ...`
 *   reopen          resets the device after the tests and runs them again
 */
#include "lib/virtio.h"

static struct block block;
static u64 seed, milliseconds, byte_limit;

static u64 pattern(u64 word) { return (word + seed) * 0x9e3779b97f4a7c15ul; }

static u64 random_next(void)
{
    static u64 state = 88172645463325252ul;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

struct run {
    u32 type, size;
    bool random, fill, check, sum;
    u64 next, blocks, bytes, checksum;
};

static void submit_next(struct run *run, u32 slot)
{
    u64 number = run->random ? random_next() % run->blocks : run->next++ % run->blocks;
    u64 word = number * run->size / 8;
    if (run->fill)
        for (u32 i = 0; i < run->size / 8; i++)
            ((u64 *)block.requests[slot].data)[i] = pattern(word + i);
    block_submit(&block, slot, run->type, number * (run->size / SECTOR), run->size);
}

static void finished(struct run *run, u32 slot)
{
    struct block_request *request = &block.requests[slot];
    if (request->status != BLOCK_OK) {
        print("blk request type=%u sector=%u status=%u\n", (u64)request->type, request->sector, (u64)request->status);
        fail("a request failed");
    }
    run->bytes += run->size;
    u64 word = request->sector * SECTOR / 8;
    const u64 *data = (const u64 *)request->data;
    if (run->check)
        for (u32 i = 0; i < run->size / 8; i++)
            if (data[i] != pattern(word + i)) {
                print("blk word %u is 0x%x, not 0x%x\n", word + i, data[i], pattern(word + i));
                fail("data differ");
            }
    if (run->sum) /* independent of the order in which requests finish */
        for (u32 i = 0; i < run->size / 8; i++)
            run->checksum += data[i] * (2 * (word + i) + 1);
}

static void wait_for_used(void)
{
    if (!block.interrupts) {
        queue_want_interrupts(&block.queue, 0);
        for (u64 spins = 0, start = rdtsc(); !queue_has_used(&block.queue); spins++) {
            cpu_relax();
            if (spins % 1024 == 1023 && rdtsc() - start > tsc_khz() * 5000)
                fail("the device stopped answering");
        }
        return;
    }
    volatile u64 *count = &irq_counts[block.device.gsi];
    u64 seen = *count;
    queue_want_interrupts(&block.queue, 1);
    if (!queue_has_used(&block.queue))
        wait_beyond(count, seen);
    mmio_write32(block.device.base + MMIO_INTERRUPT_ACK, mmio_read32(block.device.base + MMIO_INTERRUPT_STATUS));
}

/* Keeps `depth` requests in flight until the time or the bytes are used up. */
static void run_test(const char *name, struct run *run, u32 depth, u32 segment, bool whole)
{
    block_shape(&block, depth, run->size, segment);
    run->blocks = block.sectors * SECTOR / run->size;
    if (!run->blocks)
        fail("device smaller than a request");
    u64 limit = whole ? run->blocks * run->size : byte_limit ? byte_limit : ~0ul;
    u64 cycles = whole || byte_limit ? ~0ul : milliseconds * tsc_khz();
    u64 started = 0, notified = block.queue.notifications, flying = 0;
    u64 start = rdtsc();
    for (; flying < depth && started < limit; flying++, started += run->size)
        submit_next(run, (u32)flying);
    queue_publish(&block.queue);
    while (flying) {
        if (!queue_has_used(&block.queue))
            wait_for_used();
        bool more = rdtsc() - start < cycles;
        int slot;
        while ((slot = block_poll(&block)) >= 0) {
            finished(run, (u32)slot);
            flying--;
            if (more && started < limit) {
                submit_next(run, (u32)slot);
                started += run->size;
                flying++;
            }
        }
        queue_publish(&block.queue);
    }
    u64 taken = rdtsc() - start, us = taken / (tsc_khz() / 1000);
    print("blk %s %u %u bytes=%u cycles=%u us=%u mibs=%u notify=%u", name, (u64)run->size, (u64)depth, run->bytes, taken, us,
          run->bytes * 1000000 / (us ? us : 1) >> 20, block.queue.notifications - notified);
    if (run->sum)
        print(" sum=0x%x", run->checksum);
    print("\n");
}

/* A single request. */
static void run_single(const char *name, u32 type, u64 sector, u32 size)
{
    block_shape(&block, 1, 4096, 0);
    u8 *data = block.requests[0].data;
    memset(data, 0, 4096);
    if (type == BLOCK_OUT)
        for (u32 i = 0; i < size / 8; i++)
            ((u64 *)data)[i] = pattern(sector * SECTOR / 8 + i);
    u8 status = block_do(&block, type, sector, size);
    print("blk %s status=%u", name, (u64)status);
    if (type == BLOCK_GET_ID) {
        data[20] = 0;
        print(" id=%s", (const char *)data);
    }
    if (type == BLOCK_IN)
        print(" first=0x%x", *(u64 *)data);
    print("\n");
}

static const struct {
    const char *name;
    struct run run;
    bool whole;
} tests[] = {
    {"randread", {.type = BLOCK_IN, .random = 1}, 0},
    {"randwrite", {.type = BLOCK_OUT, .random = 1}, 0},
    {"seqread", {.type = BLOCK_IN}, 0},
    {"seqwrite", {.type = BLOCK_OUT}, 0},
    {"fill", {.type = BLOCK_OUT, .fill = 1}, 1},
    {"check", {.type = BLOCK_IN, .check = 1}, 1},
    {"sum", {.type = BLOCK_IN, .sum = 1}, 1},
};

static void run_option(const char *text)
{
    for (u32 i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (!word_is(text, tests[i].name))
            continue;
        while (*text && *text != ' ' && *text != ',')
            text++;
        u64 numbers[3] = {4096, 1, 0};
        for (u32 n = 0; n < 3 && *text == ','; n++)
            numbers[n] = parse_number(text + 1, &text);
        struct run run = tests[i].run;
        run.size = (u32)numbers[0];
        run_test(tests[i].name, &run, (u32)numbers[1], (u32)numbers[2], tests[i].whole);
        return;
    }
    if (word_is(text, "id"))
        run_single("id", BLOCK_GET_ID, 0, 20);
    else if (word_is(text, "flush"))
        run_single("flush", BLOCK_FLUSH, 0, 0);
    else if (word_is(text, "beyond"))
        run_single("beyond", BLOCK_IN, block.sectors, 512);
    else if (word_is(text, "unsupported"))
        run_single("unsupported", 0x55, 0, 512);
    else if (word_is(text, "write"))
        run_single("write", BLOCK_OUT, 0, 4096);
    else if (word_is(text, "read"))
        run_single("read", BLOCK_IN, 0, 4096);
    else
        fail("unknown test");
}

int main(void)
{
    seed = option_number("seed", 1);
    milliseconds = option_number("ms", 300);
    byte_limit = option_number("bytes", 0);
    block.interrupts = !!option("irq");
    u64 without = (option("noindirect") ? F_INDIRECT : 0) | (option("noevent") ? F_EVENT_IDX : 0);
    for (u32 rounds = option("reopen") ? 2 : 1; rounds; rounds--) {
        block_open(&block, (u32)option_number("device", 0), without);
        if (block.interrupts) {
            interrupts_on();
            pic_unmask(block.device.gsi);
        }
        print("blk sectors=%u offered=0x%x features=0x%x queue=%u khz=%u\n", block.sectors, block.device.offered,
              block.device.features, (u64)block.queue.size, tsc_khz());
        for (const char *text = option("t"); text; text = next_option(text, "t"))
            run_option(text);
    }
    print("blk end status=0x%x\n", (u64)virtio_status(&block.device));
    finish();
}
