/* Says so on the serial port: the first byte by the first instruction it runs (FIRST_OUTPUT in start.S), the line after. */
#include "bare.h"

int main(void)
{
    mmio_write8(BOOT_TIMER, BOOT_TIMER_MAGIC);
    print("hello\n");
    if (option("cmdline"))
        print("cmdline: %s\n", command_line());
    finish();
}
