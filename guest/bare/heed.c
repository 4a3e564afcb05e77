/*
 * Sleeps until it is asked to end: `power` heeds the power button and switches itself off, `keys` heeds the keyboard and
 * resets. Each thing that it is asked is printed.
 */
#include "bare.h"

enum { POWER_LINE = 3, KEYBOARD_LINE = 1, KEYBOARD_DATA = 0x60, KEYBOARD_COMMAND = 0x64, SLEEP_CONTROL = 0x600 };

int main(void)
{
    bool power = !!option("power"), keys = !!option("keys");
    interrupts_on();
    pic_unmask(POWER_LINE);
    pic_unmask(KEYBOARD_LINE);
    out8(KEYBOARD_COMMAND, 0x60); /* the next byte says how the controller works: */
    out8(KEYBOARD_DATA, 0x01);    /* interrupts when there is a key */
    pit_periodic(100);            /* what is asked between a look and hlt is seen at the next tick */
    print("heed\n");
    for (u64 ticks = 0, pressed = 0, typed = 0;; ticks++) {
        wait_beyond(&irq_counts[0], ticks);
        if (irq_counts[POWER_LINE] != pressed) {
            pressed = irq_counts[POWER_LINE];
            print("power button\n");
            if (power)
                out8(SLEEP_CONTROL, 5 << 2 | 0x20);
        }
        if (irq_counts[KEYBOARD_LINE] != typed) {
            typed = irq_counts[KEYBOARD_LINE];
            print("keys\n");
            if (keys)
                reset();
        }
    }
}
