#include "bare.h"

extern u64 boot_params, pvh_start_info;
extern char image_end[], page_map[], no_idt_pointer[];
extern char ap_trampoline[], ap_trampoline_end[], ap_trampoline_index[];

/* ---- console ---- */
void put_byte(char c)
{
    /* The transmitter of an emulated 16550 is always ready. */
    out8(SERIAL_PORT, (u8)c);
}

static void put_number(u64 value, u32 base)
{
    char digits[24];
    u32 count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (count)
        put_byte(digits[--count]);
}

void print(const char *format, ...)
{
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            put_byte(*format);
            continue;
        }
        switch (*++format) {
        case 's':
            for (const char *text = __builtin_va_arg(arguments, const char *); *text; text++)
                put_byte(*text);
            break;
        case 'c':
            put_byte((char)__builtin_va_arg(arguments, int));
            break;
        case 'x':
            put_number(__builtin_va_arg(arguments, u64), 16);
            break;
        default:
            put_number(__builtin_va_arg(arguments, u64), 10);
        }
    }
    __builtin_va_end(arguments);
}

/* ---- command line ---- */
const char *command_line(void)
{
    if (pvh_start_info) /* struct hvm_start_info: cmdline_paddr at 24 */
        return (const char *)*(u64 *)(pvh_start_info + 24);
    if (boot_params) /* struct boot_params: hdr.cmd_line_ptr at 0x228 */
        return (const char *)(u64) * (u32 *)(boot_params + 0x228);
    return "";
}

static const char *match_key(const char *word, const char *key)
{
    while (*key && *word == *key)
        word++, key++;
    if (*key)
        return 0;
    if (*word == '=')
        return word + 1;
    return *word == ' ' || !*word ? word : 0;
}

const char *next_option(const char *after, const char *key)
{
    const char *word = after ? after : command_line();
    if (after)
        while (*word && *word != ' ')
            word++;
    for (;;) {
        while (*word == ' ')
            word++;
        if (!*word)
            return 0;
        const char *value = match_key(word, key);
        if (value)
            return value;
        while (*word && *word != ' ')
            word++;
    }
}

const char *option(const char *key) { return next_option(0, key); }

bool word_is(const char *text, const char *word)
{
    while (*word && *text == *word)
        text++, word++;
    return !*word && (!*text || *text == ' ' || *text == ',');
}

bool option_is(const char *key, const char *value)
{
    const char *text = option(key);
    return text && word_is(text, value);
}

u64 parse_number(const char *text, const char **end)
{
    u64 value = 0, base = 10;
    if (text[0] == '0' && text[1] == 'x') {
        base = 16;
        text += 2;
    }
    for (;; text++) {
        char letter = *text | 0x20; /* digits have that bit already */
        u64 digit = letter >= 'a' ? (u64)(letter - 'a' + 10) : (u64)(letter - '0');
        if (digit >= base)
            break;
        value = value * base + digit;
    }
    if (end)
        *end = text;
    return value;
}

u64 option_number(const char *key, u64 otherwise)
{
    const char *text = option(key);
    return text && *text && *text != ' ' ? parse_number(text, 0) : otherwise;
}

/* ---- memory: what follows the image is free and, in a fresh microVM, zero ---- */
static u64 memory_next;

void *memory_take(u64 size, u64 alignment)
{
    if (!memory_next)
        memory_next = (u64)image_end;
    u64 address = (memory_next + alignment - 1) & ~(alignment - 1);
    memory_next = address + size;
    return (void *)address;
}

void memory_copy(void *to, const void *from, u64 size) { __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size)::"memory"); }

/* gcc may call these whatever -ffreestanding says. */
void *memcpy(void *to, const void *from, u64 size)
{
    memory_copy(to, from, size);
    return to;
}
void *memset(void *to, int value, u64 size)
{
    void *at = to;
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(value) : "memory");
    return to;
}

/* ---- time ---- */
u64 tsc_khz(void)
{
    static u64 khz;
    if (khz || (khz = option_number("khz", 0)))
        return khz;
    /* PIT channel 2 in mode 0, gate by port 0x61 bit 0, output in bit 5 (Intel 8254; PC/AT port B). The shortest of several
       measurements: an interrupted one is too long, never too short, as the clock is read before the counting begins. */
    enum { HERTZ = 1193182, MILLISECONDS = 5, COUNT = HERTZ * MILLISECONDS / 1000, TRIES = 6 };
    u64 shortest = ~0ul;
    out8(0x61, (in8(0x61) & 0xfc) | 1);
    for (u32 try = 0; try < TRIES; try++) {
        out8(0x43, 0xb0);
        out8(0x42, COUNT & 0xff);
        u64 start = rdtsc();
        out8(0x42, COUNT >> 8);
        while (!(in8(0x61) & 0x20))
            ;
        u64 taken = rdtsc() - start;
        if (taken < shortest)
            shortest = taken;
    }
    khz = shortest / MILLISECONDS;
    return khz;
}

/* ---- CPL 0 ---- */
u64 call_kernel(kernel_function *function, u64 argument)
{
    u64 result;
    __asm__ volatile("hlt" : "=a"(result) : "a"(function), "D"(argument) : "memory", "cc"); /* fault_13 in start.S */
    return result;
}

struct msr_access {
    u32 msr;
    u64 value;
};

static u64 kernel_write_msr(u64 argument, struct service_frame *frame)
{
    (void)frame;
    struct msr_access *access = (void *)argument;
    __asm__ volatile("wrmsr" ::"c"(access->msr), "a"((u32)access->value), "d"((u32)(access->value >> 32)));
    return 0;
}

static u64 kernel_read_msr(u64 argument, struct service_frame *frame)
{
    (void)frame;
    u32 low, high;
    __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"((u32)argument));
    return low | (u64)high << 32;
}

void write_msr(u32 msr, u64 value)
{
    struct msr_access access = {msr, value};
    call_kernel(kernel_write_msr, (u64)&access);
}

u64 read_msr(u32 msr) { return call_kernel(kernel_read_msr, msr); }

/* ---- interrupts ---- */
static u64 kernel_interrupts_on(u64 argument, struct service_frame *frame)
{
    (void)argument;
    frame->rflags |= 1 << 9;
    return 0;
}

void interrupts_on(void)
{
    /* Intel 8259A: ICW1 cascade with ICW4, ICW2 vector base, ICW3 cascade line 2, ICW4 8086 mode; OCW1 masks. */
    out8(0x20, 0x11), out8(0xa0, 0x11);
    out8(0x21, PIC_VECTOR_BASE), out8(0xa1, PIC_VECTOR_BASE + 8);
    out8(0x21, 4), out8(0xa1, 2);
    out8(0x21, 1), out8(0xa1, 1);
    out8(0x21, 0xfb), out8(0xa1, 0xff);
    call_kernel(kernel_interrupts_on, 0);
}

void pic_unmask(u32 line)
{
    u16 port = line < 8 ? 0x21 : 0xa1;
    out8(port, in8(port) & (u8) ~(1u << (line & 7)));
}

void pit_periodic(u32 hertz)
{
    u32 count = 1193182 / hertz;
    if (count > 0xffff)
        count = 0; /* means 65536: 18.2 Hz, as slow as it goes */
    out8(0x43, 0x34); /* channel 0, low then high byte, mode 2 */
    out8(0x40, count & 0xff);
    out8(0x40, (u8)(count >> 8));
    pic_unmask(0);
}

void wait_beyond(volatile u64 *count, u64 seen)
{
    while (*count == seen)
        __asm__ volatile("hlt" ::"a"(1ul), "D"(count), "S"(seen) : "memory");
}

void start_processor(u32 apic_id)
{
    enum { TRAMPOLINE = 0x10000, ICR_LOW = 0x300, ICR_HIGH = 0x310, INIT = 0x4500, STARTUP = 0x4600 };
    memory_copy((void *)TRAMPOLINE, ap_trampoline, (u64)(ap_trampoline_end - ap_trampoline));
    *(volatile u16 *)(TRAMPOLINE + (ap_trampoline_index - ap_trampoline)) = (u16)apic_id;
    mmio_write32(LOCAL_APIC + ICR_HIGH, apic_id << 24);
    mmio_write32(LOCAL_APIC + ICR_LOW, INIT);
    mmio_write32(LOCAL_APIC + ICR_HIGH, apic_id << 24);
    mmio_write32(LOCAL_APIC + ICR_LOW, STARTUP | TRAMPOLINE >> 12);
}

__attribute__((weak)) void ap_main(u64 index)
{
    (void)index;
    idle_for_ever();
}

/* ---- ends ---- */
_Noreturn void idle_for_ever(void)
{
    for (;;)
        __asm__ volatile("hlt" ::"a"(0ul) : "memory");
}

_Noreturn void reset(void)
{
    out8(0x64, 0xfe); /* 8042: pulse the reset line */
    idle_for_ever();
}

static u64 kernel_drop_idt(u64 argument, struct service_frame *frame)
{
    (void)argument, (void)frame;
    __asm__ volatile("lidt %0" ::"m"(*no_idt_pointer));
    return 0;
}

_Noreturn void triple_fault(void)
{
    call_kernel(kernel_drop_idt, 0);
    __asm__ volatile("ud2");
    __builtin_unreachable();
}

_Noreturn void finish(void)
{
    if (option_is("end", "idle"))
        idle_for_ever();
    if (option_is("end", "triple"))
        triple_fault();
    reset();
}

_Noreturn void fail(const char *what)
{
    print("FAIL: %s\n", what);
    reset();
}

struct fault_frame {
    u64 rdi, rsi, rbp, rbx, rdx, rcx, rax, vector, error, rip, cs, rflags, rsp, ss;
};

/* Runs at CPL 0. */
void bare_fault(struct fault_frame *frame, u64 cr2)
{
    print("FAULT: vector %u error 0x%x rip 0x%x cs 0x%x rsp 0x%x cr2 0x%x\n", frame->vector, frame->error, frame->rip,
          frame->cs, frame->rsp, cr2);
    out8(0x64, 0xfe);
}

void bare_main(void)
{
    main();
    finish();
}
