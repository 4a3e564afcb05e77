/*
 * Reads the keyboard controller's status for ever, which is answered in Python. `cpus=N`: on so many processors; `quiet`: all
 * but the first.
 */
#include "bare.h"

void ap_main(u64 index)
{
    (void)index;
    for (;;)
        in8(0x64);
}

int main(void)
{
    u64 cpus = option_number("cpus", 1);
    for (u32 i = 1; i < cpus; i++)
        start_processor(i);
    print("hammer\n");
    if (option("quiet"))
        idle_for_ever();
    for (;;)
        in8(0x64);
}
