/*
 * Counts, on the serial port, and sees to it that nothing of it is lost: for whoever stops and saves it. Command line:
 *   cpus=N          with N - 1 other processors counting natively meanwhile (default 1, at most 8)
 *   touch=MIB       with so much memory full of numbers, all of which are looked at before each count (default 1)
 *   tick=HZ         how often (default 20)
 * Prints `count N` and, when something is not as it was, FAIL.
 */
#include "bare.h"

static volatile u64 counts[8];

void ap_main(u64 index)
{
    for (;;)
        counts[index]++;
}

int main(void)
{
    u64 cpus = option_number("cpus", 1), words = option_number("touch", 1) << 17;
    u64 *memory = memory_take(words * 8, 4096);
    for (u64 i = 0; i < words; i++)
        memory[i] = i * 0x9e3779b97f4a7c15ul;
    for (u32 i = 1; i < cpus; i++) {
        start_processor(i);
        while (!counts[i])
            cpu_relax();
    }
    u64 before[8] = {0};
    interrupts_on();
    pit_periodic((u32)option_number("tick", 20));
    print("count begins\n");
    for (u64 count = 1;; count++) {
        wait_beyond(&irq_counts[0], irq_counts[0]);
        for (u64 i = 0; i < words; i++)
            if (memory[i] != (i + count - 1) * 0x9e3779b97f4a7c15ul)
                fail("memory is not as it was");
        for (u64 i = 0; i < words; i++)
            memory[i] += 0x9e3779b97f4a7c15ul;
        for (u32 i = 1; i < cpus; i++) {
            for (u64 start = rdtsc(); counts[i] == before[i];)
                if (rdtsc() - start > 1ul << 36)
                    fail("a processor stands still");
            before[i] = counts[i];
        }
        print("count %u\n", count);
    }
}
