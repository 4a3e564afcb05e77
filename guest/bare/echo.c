/* Echoes serial input, asleep until the receive interrupt (IRQ 4). A line `end` ends it; `poll` on the command line polls instead. */
#include "bare.h"

int main(void)
{
    enum { IER = SERIAL_PORT + 1, IIR = SERIAL_PORT + 2, MCR = SERIAL_PORT + 4, LSR = SERIAL_PORT + 5 };
    bool poll = !!option("poll");
    print("echo\n");
    interrupts_on();
    out8(MCR, 0x0b); /* DTR, RTS, OUT2: the gate of the interrupt line */
    if (!poll) {
        pic_unmask(4);
        out8(IER, 1); /* received data available */
    }
    const char *end = "end\n";
    for (u64 matched = 0;;) {
        u64 seen = irq_counts[4];
        while (in8(LSR) & 1) {
            char c = (char)in8(SERIAL_PORT);
            if (c == '\r')
                c = '\n';
            put_byte(c);
            matched = c == end[matched] ? matched + 1 : c == end[0];
            if (!end[matched]) {
                print("interrupts %u iir=0x%x\n", irq_counts[4], (u64)in8(IIR));
                finish();
            }
        }
        if (!poll)
            wait_beyond(&irq_counts[4], seen);
    }
}
