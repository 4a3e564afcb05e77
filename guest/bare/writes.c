/*
 * Writes to its disk and knows what it has written: for whoever forks or clones it with its disk. Asleep until a line comes
 * on the serial port:
 *   w SEED COUNT    writes so many blocks of 4 KiB, picked and filled by SEED; prints `wrote SEED`
 *   c               reads the whole disk and compares it with what was written, and with zeros where nothing was; prints
 *                   `checked N sum=X`, where N blocks have been written and X tells them from others, or FAIL
 */
#include "lib/virtio.h"

enum { SIZE = 4096, DEPTH = 8, LINE = 64 };

static struct block block;
static u64 blocks, *tags;

static u64 mix(u64 value)
{
    value = (value ^ value >> 31) * 0x9e3779b97f4a7c15ul;
    return (value ^ value >> 29) * 0xbf58476d1ce4e5b9ul | 1;
}

static void reap(u64 *flying)
{
    for (int slot; (slot = block_poll(&block)) >= 0; (*flying)--)
        if (block.requests[slot].status != BLOCK_OK)
            fail("a request failed");
}

static void write_blocks(u64 seed, u64 count)
{
    for (u64 n = 0, flying = 0; n < count || flying;) {
        /* A slot is free when all of them are: requests end in any order. */
        for (; !flying && n < count;) {
            for (; flying < DEPTH && n < count; n++, flying++) {
                u64 at = mix(seed << 32 | n) % blocks, tag = mix(seed << 32 | n << 1);
                bool again = 0;
                for (u64 slot = 0; slot < flying; slot++)
                    again |= block.requests[slot].sector == at * (SIZE / SECTOR);
                if (again)
                    break; /* not twice at a time */
                tags[at] = tag;
                for (u64 i = 0; i < SIZE / 8; i++)
                    ((u64 *)block.requests[flying].data)[i] = tag + i;
                block_submit(&block, (u32)flying, BLOCK_OUT, at * (SIZE / SECTOR), SIZE);
            }
            queue_publish(&block.queue);
        }
        reap(&flying);
        cpu_relax();
    }
    print("wrote %u\n", seed);
}

static void check(void)
{
    u64 written = 0, sum = 0;
    for (u64 at = 0; at < blocks; at++) {
        if (block_do(&block, BLOCK_IN, at * (SIZE / SECTOR), SIZE) != BLOCK_OK)
            fail("a read failed");
        const u64 *data = (const u64 *)block.requests[0].data;
        for (u64 i = 0; i < SIZE / 8; i++)
            if (data[i] != (tags[at] ? tags[at] + i : 0)) {
                print("block %u word %u is 0x%x, not of 0x%x\n", at, i, data[i], tags[at]);
                fail("the disk is not as it was written");
            }
        written += !!tags[at];
        sum += tags[at] * (2 * at + 1);
    }
    print("checked %u sum=0x%x\n", written, sum);
}

int main(void)
{
    enum { IER = SERIAL_PORT + 1, MCR = SERIAL_PORT + 4, LSR = SERIAL_PORT + 5 };
    block_open(&block, 0, 0);
    block_shape(&block, DEPTH, SIZE, 0);
    blocks = block.sectors * SECTOR / SIZE;
    tags = memory_take(blocks * sizeof *tags, 4096);
    interrupts_on();
    out8(MCR, 0x0b); /* DTR, RTS, OUT2: the gate of the interrupt line */
    pic_unmask(4);
    out8(IER, 1); /* received data available */
    print("writes begins\n");
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
            const char *rest = line + 2;
            if (line[0] == 'w') {
                u64 seed = parse_number(rest, &rest);
                write_blocks(seed, parse_number(rest + 1, &rest));
            } else if (line[0] == 'c') {
                check();
            }
        }
        wait_beyond(&irq_counts[4], seen);
    }
}
