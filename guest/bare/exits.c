/*
 * What an exit to the monitor costs, in TSC cycles, from CPL 3: the best of `slices=` (default 20) times `n=` (default 1000) exits.
 * Prints `exits KIND n=N cycles=C` with C the cost of one, for
 *   out     a write to a port nobody claims           in      a read of the serial line status register
 *   mmio    a read of a virtio-mmio magic value       scratch a write to the serial scratch register
 * and, for scale, `loop` (no exit at all). `kinds=in,mmio` chooses some.
 * `kernel`: from CPL 0 instead, where a host that interprets that level need not leave it for the exit.
 * `spin=KIND`: prints `spin` and then does nothing but such exits for ever, in the same loop.
 */
#include "bare.h"

static u64 loops, slices;

static bool chosen(const char *kind)
{
    const char *list = option("spin") ? option("spin") : option("kinds");
    if (!list)
        return 1;
    for (; *list && *list != ' '; list++)
        if ((list[-1] == '=' || list[-1] == ',') && word_is(list, kind))
            return 1;
    return 0;
}

/* One slice must be shorter than what a busy host lets a thread run undisturbed. */
#define MEASURE(kind, exit) \
    if (chosen(kind)) { \
        u64 best = ~0ul; \
        for (u64 slice = 0; slice < slices; slice++) { \
            u64 start = rdtsc(); \
            for (u64 i = 0; i < loops; i++) \
                exit; \
            u64 taken = rdtsc() - start; \
            best = taken < best ? taken : best; \
        } \
        print("exits %s n=%u cycles=%u\n", kind, loops, best / loops); \
    }

static u64 measure(u64 argument, struct service_frame *frame)
{
    (void)argument, (void)frame;
    u16 port = (u16)option_number("port", 0x2f0); /* nobody's: the second serial port is not there */
    MEASURE("loop", barrier());
    MEASURE("out", out8(port, 0));
    MEASURE("in", in8(SERIAL_PORT + 5));
    MEASURE("scratch", out8(SERIAL_PORT + 7, 0));
    MEASURE("mmio", mmio_read32(VIRTIO_MMIO_BASE));
    return 0;
}

int main(void)
{
    loops = option_number("n", 1000);
    slices = option_number("slices", 20);
    if (option("spin")) {
        loops = ~0ul;
        print("spin\n");
    } else {
        print("khz %u\n", tsc_khz());
    }
    if (option("kernel"))
        call_kernel(measure, 0);
    else
        measure(0, 0);
    finish();
}
