/*
 * Idles in hlt. Without options: for ever, with interrupts off. `tick=HZ`: wakes on the PIT and goes back to sleep; then
 * `beats=N` prints `beat` after each N ticks, and `ticks=N` ends after that many. `touch=MIB` writes a byte to each page of so much memory first.
 * `spin=N` is not idle at all: it counts to N for ever, and prints a dot each time.
 */
#include "bare.h"

int main(void)
{
    u64 touch = option_number("touch", 0) << 20;
    if (touch) {
        volatile u8 *memory = memory_take(touch, 4096);
        for (u64 at = 0; at < touch; at += 4096)
            memory[at] = 1;
    }
    print("idle\n");
    for (u64 spin = option_number("spin", 0); spin; put_byte('.'))
        for (volatile u64 i = 0; i < spin; i++)
            ;
    u64 hertz = option_number("tick", 0);
    if (!hertz)
        idle_for_ever();
    u64 beats = option_number("beats", 0), last = option_number("ticks", 0);
    interrupts_on();
    pit_periodic((u32)hertz);
    for (u64 ticks = 0; !last || ticks < last;) {
        wait_beyond(&irq_counts[0], ticks);
        ticks++;
        if (beats && ticks % beats == 0)
            print("beat %u\n", ticks / beats);
    }
    print("idle end\n");
    finish();
}
