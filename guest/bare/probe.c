/* What `crackle doctor` asks of a KVM, said aloud: user code, SYSCALL and back, a timer interrupt delivered at CPL 3. */
#include "bare.h"

extern char syscall_entry[];
enum { MSR_EFER = 0xc0000080, MSR_STAR = 0xc0000081, MSR_LSTAR = 0xc0000082, MSR_FMASK = 0xc0000084 };

int main(void)
{
    u64 cs;
    __asm__ volatile("mov %%cs, %0" : "=r"(cs));
    print("probe user cs=0x%x\n", cs);

    interrupts_on();
    u64 ticks = irq_counts[0], start = rdtsc(), limit = tsc_khz() * 500;
    pit_periodic(1000);
    while (irq_counts[0] == ticks && rdtsc() - start < limit)
        cpu_relax();
    print("probe interrupt %s\n", irq_counts[0] != ticks ? "ok" : "none");

    write_msr(MSR_EFER, read_msr(MSR_EFER) | 1);
    write_msr(MSR_STAR, 0x18ul << 48 | 0x08ul << 32);
    write_msr(MSR_LSTAR, (u64)syscall_entry);
    write_msr(MSR_FMASK, 0x200);
    print("probe syscall ...\n"); /* where it does not work it may not come back */
    u64 result = 0;
    __asm__ volatile("syscall" : "+a"(result)::"rcx", "r11", "memory");
    print("probe syscall %s\n", result == 0x600d ? "ok" : "wrong");
    finish();
}
