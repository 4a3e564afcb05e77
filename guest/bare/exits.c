/*
 * What an exit to the monitor costs, in TSC cycles, from CPL 3: `n=` exits of each kind (default 20000).
 * Prints `exits KIND n=N cycles=C` with C the cost of one, for
 *   out     a write to a port nobody claims           in      a read of the serial line status register
 *   mmio    a read of a virtio-mmio magic value       scratch a write to the serial scratch register
 * and, for scale, `loop` (no exit at all). `spin=in` or `spin=mmio`: prints `spin` and then does nothing but such exits for ever.
 */
#include "bare.h"

static u64 loops;

static void report(const char *kind, u64 start)
{
    u64 cycles = rdtsc() - start;
    print("exits %s n=%u cycles=%u\n", kind, loops, cycles / loops);
}

int main(void)
{
    if (option_is("spin", "in")) {
        print("spin\n");
        for (;;)
            in8(SERIAL_PORT + 5);
    }
    if (option_is("spin", "mmio")) {
        print("spin\n");
        for (;;)
            mmio_read32(VIRTIO_MMIO_BASE);
    }
    loops = option_number("n", 20000);
    u16 port = (u16)option_number("port", 0x2f0); /* nobody's: the second serial port is not there */
    print("khz %u\n", tsc_khz());
    for (u64 round = option_number("rounds", 1); round; round--) {
        u64 start = rdtsc();
        for (u64 i = 0; i < loops; i++)
            barrier();
        report("loop", start);
        if (!option("noout")) { /* some monitors log every unclaimed port */
            start = rdtsc();
            for (u64 i = 0; i < loops; i++)
                out8(port, 0);
            report("out", start);
        }
        start = rdtsc();
        for (u64 i = 0; i < loops; i++)
            in8(SERIAL_PORT + 5);
        report("in", start);
        start = rdtsc();
        for (u64 i = 0; i < loops; i++)
            out8(SERIAL_PORT + 7, (u8)i);
        report("scratch", start);
        if (option("nommio"))
            continue;
        start = rdtsc();
        for (u64 i = 0; i < loops; i++)
            mmio_read32(VIRTIO_MMIO_BASE);
        report("mmio", start);
    }
    finish();
}
