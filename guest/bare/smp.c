/* Starts `cpus=N` processors (2 to 8) with INIT and SIPI; each counts natively at CPL 3 until all have been seen counting at once. */
#include "bare.h"

static volatile u64 counts[8];
static volatile bool stop;

void ap_main(u64 index)
{
    while (!stop)
        counts[index]++;
    counts[index] = ~0ul;
    idle_for_ever();
}

int main(void)
{
    u64 cpus = option_number("cpus", 2), limit = tsc_khz() * option_number("ms", 3000);
    for (u32 i = 1; i < cpus; i++) {
        u64 start = rdtsc();
        start_processor(i);
        while (!counts[i] && rdtsc() - start < limit)
            cpu_relax();
        print("smp processor %u %s\n", (u64)i, counts[i] ? "runs" : "does not run");
    }
    u64 before[8];
    for (u32 i = 1; i < cpus; i++)
        before[i] = counts[i];
    u64 moving = 0;
    for (u64 start = rdtsc(); moving < cpus - 1 && rdtsc() - start < limit;) {
        moving = 0;
        for (u32 i = 1; i < cpus; i++)
            moving += counts[i] != before[i];
    }
    stop = 1;
    print("smp %u of %u run\n", moving + 1, cpus);
    finish();
}
