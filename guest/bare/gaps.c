/*
 * Never rests, and notes the longest time for which it has stood still. Command line:
 *   touch=MIB       with so much memory that it has written to (default 1)
 *   busy=MIB        and so much of that to which it goes on writing (default 1)
 * For each byte on the serial port prints `gap N us`, since the one before.
 */
#include "bare.h"

int main(void)
{
    enum { LSR = SERIAL_PORT + 5 };
    u64 size = option_number("touch", 1) << 20, busy = option_number("busy", 1) << 20, khz = tsc_khz();
    volatile u64 *memory = memory_take(size, 4096);
    for (u64 at = 0; at < size / 8; at += 512)
        memory[at] = 1;
    print("gaps begins\n");
    u64 longest = 0, looked = rdtsc();
    for (u64 at = 0, before = looked;; at = (at + 4096) % busy) {
        memory[at / 8]++;
        u64 now = rdtsc();
        if (now - before > longest)
            longest = now - before;
        before = now;
        if (now - looked < khz) /* once a millisecond: an exit takes time, too */
            continue;
        looked = now;
        if (in8(LSR) & 1) {
            in8(SERIAL_PORT);
            print("gap %u us\n", longest * 1000 / khz);
            longest = 0;
            before = rdtsc();
        }
    }
}
