/*
 * Prints for ever, 4,000 bytes with one string instruction; `bytes=N`: about so many, a multiple of it, and then
 * `flood end`.
 */
#include "bare.h"

static char page[4000];

int main(void)
{
    for (u64 i = 0; i < sizeof page; i++)
        page[i] = i % 80 == 79 ? '\n' : 'a' + i % 26;
    u64 bytes = option_number("bytes", ~0ull);
    print("flood\n");
    for (u64 done = 0; done < bytes; done += sizeof page) {
        const char *at = page;
        u64 n = sizeof page;
        __asm__ volatile("rep outsb" : "+S"(at), "+c"(n) : "d"((u16)SERIAL_PORT) : "memory");
    }
    print("flood end\n");
    finish();
}
