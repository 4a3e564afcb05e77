/* The runtime of the bare-metal guests: everything here is called at CPL 3 unless it says otherwise. */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef _Bool bool;

#define SERIAL_PORT 0x3f8u
#define BOOT_TIMER 0xc0000000ul
#define BOOT_TIMER_MAGIC 123
#define VIRTIO_MMIO_BASE 0xc0001000ul
#define VIRTIO_MMIO_STEP 0x1000ul
#define PIC_VECTOR_BASE 0x20
#define APIC_VECTOR_BASE 0x30
#define LOCAL_APIC 0xfee00000ul

#define barrier() __asm__ volatile("" ::: "memory")
#define full_barrier() __asm__ volatile("mfence" ::: "memory")
#define cpu_relax() __asm__ volatile("pause" ::: "memory")

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
static inline u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}
/* Single move instructions whatever the compiler thinks best: what a monitor has to decode. */
static inline u32 mmio_read32(u64 address)
{
    u32 value;
    __asm__ volatile("movl (%1), %0" : "=r"(value) : "r"(address) : "memory");
    return value;
}
static inline void mmio_write32(u64 address, u32 value) { __asm__ volatile("movl %0, (%1)" ::"r"(value), "r"(address) : "memory"); }
static inline u8 mmio_read8(u64 address)
{
    u8 value;
    __asm__ volatile("movb (%1), %0" : "=q"(value) : "r"(address) : "memory");
    return value;
}
static inline void mmio_write8(u64 address, u8 value) { __asm__ volatile("movb %0, (%1)" ::"q"(value), "r"(address) : "memory"); }
static inline u64 rdtsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return low | (u64)high << 32;
}

/* Console. print() knows %s %c %u %d(=%u) %x, all of 64 bits except %c. */
void put_byte(char c);
void print(const char *format, ...) __attribute__((format(printf, 1, 0)));

/* Kernel command line: words separated by spaces, `key` or `key=value`. */
const char *command_line(void);
const char *option(const char *key);                     /* text after `key=`, or "" for a bare key; 0 when absent */
const char *next_option(const char *after, const char *key); /* the next occurrence after that one; 0 for the first */
bool option_is(const char *key, const char *value);
u64 option_number(const char *key, u64 otherwise);       /* decimal or 0x... */
u64 parse_number(const char *text, const char **end);
bool word_is(const char *text, const char *word);        /* does the word that starts at text equal word? */

void *memory_take(u64 size, u64 alignment); /* zeroed; never given back; faults the guest when memory runs out */
void memory_copy(void *to, const void *from, u64 size);
void *memset(void *to, int value, u64 size);

/* Time stamp counter frequency: `khz=` on the command line, else measured against the PIT in 30 ms. */
u64 tsc_khz(void);

/* CPL 0. call_kernel runs function(argument, frame) there; the frame's rflags take effect on return. */
struct service_frame {
    u64 r11, r10, r9, r8, rdi, rsi, rdx, rcx, rip, cs, rflags, rsp, ss;
};
typedef u64 kernel_function(u64 argument, struct service_frame *frame);
u64 call_kernel(kernel_function *function, u64 argument);
void write_msr(u32 msr, u64 value);
u64 read_msr(u32 msr);

/* Interrupts: counted by vector, nothing else. */
extern volatile u64 irq_counts[20];
void interrupts_on(void);                       /* also maps the 8259s to PIC_VECTOR_BASE, all lines masked */
void pic_unmask(u32 line);
void pit_periodic(u32 hertz);
void wait_beyond(volatile u64 *count, u64 seen); /* sleeps until *count differs from seen (interrupts_on first) */
void start_processor(u32 apic_id);              /* INIT, SIPI, SIPI; it runs ap_main */
void ap_main(u64 index);

/* Ends. */
_Noreturn void idle_for_ever(void);   /* hlt with interrupts off: costs nothing */
_Noreturn void reset(void);           /* through the keyboard controller: a clean end for the monitor */
_Noreturn void triple_fault(void);
_Noreturn void finish(void);          /* `end=reset` (default), `end=idle`, `end=triple` */
_Noreturn void fail(const char *what); /* says FAIL: what, and resets */

int main(void); /* each program's */
