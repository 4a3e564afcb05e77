/*
 * Entry and CPL 0 side of every bare-metal guest.
 *
 * Entered by the 64-bit Linux boot protocol: long mode, paging on, RSI = zero page, interrupts off. With -DPVH the image
 * also carries the Xen PVH note and is entered in 32-bit protected mode, EBX = struct hvm_start_info.
 *
 * Everything the processor needs (page tables, GDT, IDT, TSS with an I/O permission bitmap of zeros) is laid out here at
 * assembly time, so that CPL 0, which some hosts interpret instruction by instruction, has only a dozen instructions to run
 * before it drops to CPL 3, where code runs natively. CPL 0 is entered again for interrupts, for `hlt` (which raises #GP at
 * CPL 3: idling, service calls) and to report faults. It uses no XSAVE, cmpxchg16b, int3, clac or stac.
 *
 * -DFIRST_OUTPUT=c writes the byte c to the serial port before anything else.
 */
#define BASE        0x100000            /* must match link.ld */
#define ADDRESS(symbol) (BASE + (symbol - boot_base))

#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define USER_DATA   (0x20 | 3)          /* the order that SYSRET wants: data, then code */
#define USER_CODE   (0x28 | 3)
#define TASK_STATE  0x30

#define PAGE_TABLE  0x007               /* present, writable, user */
#define PAGE_LARGE  0x0e7               /* + accessed, dirty, 2 MiB */
#define PAGE_MMIO   0x0ff               /* + write-through, cache disabled */

    .section .boot, "awx"
    .globl _start
boot_base:
    .code64
_start:
#ifdef FIRST_OUTPUT
    mov     $0x3f8, %edx
    mov     $FIRST_OUTPUT, %al
    out     %al, (%dx)
#endif
    mov     $page_map, %eax
    mov     %rax, %cr3
    mov     %rsi, boot_params(%rip)
long_mode:
    lgdt    gdt_pointer(%rip)
    lidt    idt_pointer(%rip)
    mov     $TASK_STATE, %eax
    ltr     %ax
    mov     $kernel_stack_top, %esp
    pushq   $USER_DATA
    pushq   $user_stack_top
    pushq   $0x3002                     /* RFLAGS: interrupts off; I/O privilege level 3, for hosts that heed no bitmap */
    pushq   $USER_CODE
    pushq   $user_entry
    iretq

user_entry:
    call    bare_main
    /* Not reached. */
1:  hlt
    jmp     1b

/* Application processors arrive here in long mode from the trampoline, RDI = index, and take their own stack and TSS. */
    .globl ap_long_mode
ap_long_mode:
    lidt    idt_pointer(%rip)
    mov     %edi, %ebp
    mov     %edi, %eax
    shl     $4, %eax
    add     $TASK_STATE, %eax
    ltr     %ax
    mov     %edi, %eax
    shl     $14, %eax                   /* 16 KiB of stack each, halved between CPL 0 and CPL 3 */
    add     $ap_stacks, %eax
    mov     %eax, %esp                  /* grows down from the end of processor N's area: index starts at 1 */
    lea     -8192(%rax), %rax
    pushq   $USER_DATA
    pushq   %rax
    pushq   $0x3002
    pushq   $USER_CODE
    pushq   $ap_user_entry
    iretq
ap_user_entry:
    mov     %rbp, %rdi
    call    ap_main
1:  hlt
    jmp     1b

/* ---- faults ------------------------------------------------------------------------------------------------------- */
    .macro fault_stub vector, has_error_code
fault_\vector:
    .if !\has_error_code
    pushq   $0
    .endif
    pushq   $\vector
    jmp     fault_common
    .endm

    .irp vector, 0,1,2,3,4,5,6,7,9,15,16,18,19,20,22,23,24,25,26,27,28,31
    fault_stub \vector, 0
    .endr
    .irp vector, 8,10,11,12,14,17,21,29,30
    fault_stub \vector, 1
    .endr

/*
 * #GP from `hlt` at CPL 3 is how CPL 3 asks for something (INT n would do on real hardware, but not on every KVM). RAX says what:
 *   0  idle for ever with interrupts off
 *   1  halt with interrupts on, unless the counter at RDI differs from RSI by now
 *   otherwise the address of a function to call here with (RDI, struct service_frame *); RAX is then its result
 */
fault_13:
    testb   $3, 16(%rsp)
    jz      2f
    push    %rax
    mov     16(%rsp), %rax
    cmpb    $0xf4, (%rax)
    pop     %rax
    jne     2f
    add     $8, %rsp                    /* the error code */
    incq    (%rsp)                      /* past the hlt */
    cmp     $1, %rax
    jb      3f
    ja      service
    cmp     %rsi, (%rdi)
    jne     1f
    sti
    hlt
    cli
1:  iretq
2:  pushq   $13
    jmp     fault_common
3:  cli
    hlt
    jmp     3b

service:
    push    %rcx
    push    %rdx
    push    %rsi
    push    %rdi
    push    %r8
    push    %r9
    push    %r10
    push    %r11
    mov     %rsp, %rsi
    sub     $8, %rsp                    /* 13 words so far, and calls want 16 bytes */
    call    *%rax
    add     $8, %rsp
    pop     %r11
    pop     %r10
    pop     %r9
    pop     %r8
    pop     %rdi
    pop     %rsi
    pop     %rdx
    pop     %rcx
    iretq

fault_common:
    push    %rax
    push    %rcx
    push    %rdx
    push    %rbx
    push    %rbp
    push    %rsi
    push    %rdi
    mov     %rsp, %rdi
    mov     %cr2, %rsi
    call    bare_fault
1:  hlt
    jmp     1b

/* ---- interrupts: vectors 0x20..0x2f from the two 8259s, 0x30..0x33 from the local APIC ------------------------------- */
    .macro irq_stub vector
irq_\vector:
    push    %rax
    lock incq irq_counts + 8 * (\vector - 32)(%rip)
    .if \vector >= 48
    mov     $0xfee000b0, %eax           /* local APIC EOI */
    movl    $0, (%rax)
    .else
    mov     $0x20, %al                  /* 8259 non-specific EOI */
    .if \vector >= 40
    out     %al, $0xa0
    .endif
    out     %al, $0x20
    .endif
    pop     %rax
    iretq
    .endm
    .irp vector, 32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48,49,50,51
    irq_stub \vector
    .endr
spurious:
    iretq

/* Target of the SYSCALL instruction in the probe: counts, and goes back the way it came. */
    .globl syscall_entry
syscall_entry:
    mov     $0x600d, %eax
    sysretq

/* ---- tables --------------------------------------------------------------------------------------------------------- */
    .balign 16
    .globl gdt_pointer
gdt_pointer:
    .word   gdt_end - gdt - 1
    .quad   gdt
idt_pointer:
    .word   idt_end - idt - 1
    .quad   idt
    .globl no_idt_pointer
no_idt_pointer:
    .word   0
    .quad   0

    .macro task_state_descriptor symbol
    .word   task_state_end - task_state - 1
    .word   ADDRESS(\symbol) & 0xffff
    .byte   BASE >> 16                  /* all of .boot lies within 64 KiB of BASE */
    .byte   0x89, 0, 0
    .quad   0
    .endm

    .balign 16
gdt:
    .quad   0
    .quad   0x00af9b000000ffff          /* 0x08 CPL 0 code, 64-bit */
    .quad   0x00cf93000000ffff          /* 0x10 CPL 0 data */
    .quad   0x00cffb000000ffff          /* 0x18 CPL 3 code, 32-bit: SYSRET's base, unused */
    .quad   0x00cff3000000ffff          /* 0x20 CPL 3 data */
    .quad   0x00affb000000ffff          /* 0x28 CPL 3 code, 64-bit */
    task_state_descriptor task_state    /* 0x30 boot processor */
    .irp n, 1,2,3,4,5,6,7
    task_state_descriptor ap_task_state_\n
    .endr
gdt_end:

    .macro gate symbol, type
    .word   (\symbol - boot_base) & 0xffff
    .word   KERNEL_CODE
    .byte   0, \type
    .word   BASE >> 16
    .quad   0
    .endm

    .balign 16
idt:
    .irp v, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    gate fault_\v, 0x8e
    .endr
    .irp v, 32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48,49,50,51
    gate irq_\v, 0x8e
    .endr
    .rept 256 - 52
    gate spurious, 0x8e
    .endr
idt_end:

/* Application processors use the boot processor's bitmap, which follows theirs within the limit (all ports below 0xe000). */
    .balign 16
    .irp n, 1,2,3,4,5,6,7
ap_task_state_\n:
    .long   0
    .quad   ap_stacks + (\n << 14)
    .fill   90, 1, 0
    .word   task_state_bitmap - ap_task_state_\n
    .endr
task_state:
    .long   0
    .quad   kernel_stack_top            /* RSP0 */
    .fill   90, 1, 0
    .word   task_state_bitmap - task_state
task_state_bitmap:
    .fill   8192, 1, 0
    .byte   0xff
task_state_end:

/* Identity map of the first 4 GiB in 2 MiB pages, all open to CPL 3; uncached from the MMIO gap up. */
    .balign 4096
    .globl page_map
page_map:
    .quad   ADDRESS(page_pointers) + PAGE_TABLE
    .fill   511, 8, 0
page_pointers:
    .set    n, 0
    .rept   4
    .quad   ADDRESS(page_directories) + n * 4096 + PAGE_TABLE
    .set    n, n + 1
    .endr
    .fill   508, 8, 0
page_directories:
    .set    n, 0
    .rept   3 * 512
    .quad   (n << 21) + PAGE_LARGE
    .set    n, n + 1
    .endr
    .rept   512
    .quad   (n << 21) + PAGE_MMIO
    .set    n, n + 1
    .endr

/* ---- real mode, at the address the start-up IPI names: copied there by the boot processor ---------------------------- */
    .globl ap_trampoline, ap_trampoline_end, ap_trampoline_index
    .balign 16
    .code16
ap_trampoline:
    cli
    mov     %cs, %ax
    mov     %ax, %ds
    movzwl  ap_trampoline_index - ap_trampoline, %edi
    lgdtl   ap_gdt_pointer - ap_trampoline
    mov     $page_map, %eax
    mov     %eax, %cr3
    mov     %cr4, %eax
    or      $0x20, %eax                 /* PAE */
    mov     %eax, %cr4
    mov     $0xc0000080, %ecx           /* EFER.LME */
    rdmsr
    or      $0x100, %eax
    wrmsr
    mov     %cr0, %eax
    or      $0x80000001, %eax           /* paging and protection at once: straight to long mode */
    mov     %eax, %cr0
    ljmpl   $KERNEL_CODE, $ap_long_mode
    .balign 4
ap_gdt_pointer:
    .word   gdt_end - gdt - 1
    .long   gdt
ap_trampoline_index:
    .word   0
ap_trampoline_end:
    .code64

#ifdef PVH
/* ---- Xen PVH: 32-bit protected mode, no paging, EBX = struct hvm_start_info ------------------------------------------ */
    .code32
    .globl pvh_entry
pvh_entry:
    mov     $page_map, %eax
    mov     %eax, %cr3
    mov     %cr4, %eax
    or      $0x20, %eax
    mov     %eax, %cr4
    mov     $0xc0000080, %ecx
    rdmsr
    or      $0x100, %eax
    wrmsr
    mov     %ebx, pvh_start_info
    mov     %cr0, %eax
    or      $0x80000000, %eax
    mov     %eax, %cr0
    lgdt    gdt_pointer
    ljmp    $KERNEL_CODE, $long_mode
    .code64

    .section .note.pvh, "a"
    .balign 4
    .long   4, 4, 18                    /* name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz  "Xen"
    .long   pvh_entry
#endif

    .section .data
    .globl boot_params, pvh_start_info
boot_params:    .quad 0
pvh_start_info: .quad 0

    .section .bss
    .globl irq_counts
    .balign 16
irq_counts:     .fill 20, 8, 0
    .balign 16
kernel_stack:   .fill 8192, 1, 0
kernel_stack_top:
user_stack:     .fill 32768, 1, 0
user_stack_top:
ap_stacks:      .fill 8 << 14, 1, 0
