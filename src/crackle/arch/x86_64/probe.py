"""What an x86_64 KVM is asked: does it run guest user code, system calls and interrupts as Linux needs?

Two tiny bare-metal guests, each a few milliseconds, in memory of their own. One starts at CPL 3: it computes,
takes a timer interrupt from the local APIC, executes SYSCALL and comes back by SYSRET. The other stays at
CPL 0: it counts, to see whether kernel code runs natively or is interpreted, and executes INT3, as Linux does
early in its boot. Both tell how far they got by writing to ports. One that hangs is stopped after TIME_LIMIT.

Formats: Intel SDM vol. 3, 3.4 (segments), 4.5 (page tables), 6.14 (IDT), 8.7 (TSS), 11.4 (local APIC).
"""

from __future__ import annotations

import os
import select
import struct
import time
from typing import TYPE_CHECKING, Any

from crackle.arch.interface import Finding
from crackle.arch.x86_64 import layout
from crackle.kvm import Bus
from crackle.memory import GuestMemory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crackle.kvm import Kvm

TIME_LIMIT = 2.0
"""Seconds each guest may take."""

# Guest physical addresses, mapped one to one. The first 2 MiB and the local APIC are all the guest can see.
MEMORY_SIZE = 0x10000
PAGE_MAP, PAGE_POINTERS, PAGES_LOW, PAGES_HIGH = 0x1000, 0x2000, 0x3000, 0x4000
GDT, TSS, IDT, CODE = 0x5000, 0x6000, 0x7000, 0x8000
KERNEL_STACK, USER_STACK, TICKS = 0xA000, 0xB000, 0xB000
LOCAL_APIC = layout.APIC_ADDR

# Selectors: SYSCALL takes CS and SS from STAR[47:32] and the next, SYSRET from STAR[63:48] + 16 and + 8.
KERNEL_CODE, KERNEL_DATA, SYSRET_BASE, USER_DATA, USER_CODE, TASK = 0x08, 0x10, 0x18, 0x23, 0x2B, 0x30

# What the guests report, as the port they write to.
REPORTS = 0xF0
USER, INTERRUPT, SYSCALL, BREAKPOINT, DONE, KERNEL, COUNTED, FAULT = range(8)

SUM = 500500  # 1 + 2 + ... + 1000
LOOPS = 10_000
TIMER_VECTOR = 0x20
SYSCALL_RESULT = 0x600D

USER_PROGRAM = (
    b"\xb9\xe8\x03\x00\x00"  #                          mov   ecx, 1000
    b"\x31\xc0"  #                                      xor   eax, eax
    b"\x01\xc8"  #                                  1:  add   eax, ecx
    b"\xe2\xfc"  #                                      loop  1b
    b"\xe7\xf0"  #                                      out   USER, eax
    b"\xbe\x00\x00\xe0\xfe"  #                          mov   esi, LOCAL_APIC
    b"\xc7\x86\xf0\x00\x00\x00\xff\x01\x00\x00"  #      mov   dword [rsi + 0xf0], 0x1ff ; enable
    b"\xc7\x86\x20\x03\x00\x00\x20\x00\x00\x00"  #      mov   dword [rsi + 0x320], 0x20 ; once, TIMER_VECTOR
    b"\xc7\x86\xe0\x03\x00\x00\x0b\x00\x00\x00"  #      mov   dword [rsi + 0x3e0], 0xb ; divide by 1
    b"\xc7\x86\x80\x03\x00\x00\x00\x10\x00\x00"  #      mov   dword [rsi + 0x380], 0x1000 ; go
    b"\xf3\x90"  #                                  2:  pause
    b"\x83\x3c\x25\x00\xb0\x00\x00\x00"  #              cmp   dword [TICKS], 0
    b"\x74\xf4"  #                                      je    2b
    b"\xe7\xf1"  #                                      out   INTERRUPT, eax
    b"\x0f\x05"  #                                      syscall
    b"\xe7\xf4"  #                                      out   DONE, eax
    b"\xf3\x90"  #                                  3:  pause
    b"\xeb\xfc"  #                                      jmp   3b
)
SYSCALL_ENTRY = (
    b"\x8c\xc8"  #                                      mov   eax, cs
    b"\xe7\xf2"  #                                      out   SYSCALL, eax
    b"\xb8\x0d\x60\x00\x00"  #                          mov   eax, SYSCALL_RESULT
    b"\x48\x0f\x07"  #                                  sysretq
)
TIMER_HANDLER = (
    b"\xff\x04\x25\x00\xb0\x00\x00"  #                  inc   dword [TICKS]
    b"\xc7\x86\xb0\x00\x00\x00\x00\x00\x00\x00"  #      mov   dword [rsi + 0xb0], 0 ; end of interrupt
    b"\x48\xcf"  #                                      iretq
)
FAULT_HANDLER = (
    b"\xe7\xf7"  #                                      out   FAULT, eax
    b"\xf4"  #                                      1:  hlt
    b"\xeb\xfd"  #                                      jmp   1b
)
KERNEL_PROGRAM = (
    b"\xe7\xf5"  #                                      out   KERNEL, eax
    b"\xb9\x10\x27\x00\x00"  #                          mov   ecx, LOOPS
    b"\xe2\xfe"  #                                  1:  loop  1b
    b"\xe7\xf6"  #                                      out   COUNTED, eax
    b"\xcc"  #                                          int3
    b"\xe7\xf4"  #                                      out   DONE, eax
    b"\xf4"  #                                      2:  hlt
    b"\xeb\xfd"  #                                      jmp   2b
)
BREAKPOINT_HANDLER = (
    b"\xe7\xf3"  #                                      out   BREAKPOINT, eax
    b"\x48\xcf"  #                                      iretq
)
PROGRAMS = (USER_PROGRAM, SYSCALL_ENTRY, TIMER_HANDLER, FAULT_HANDLER, KERNEL_PROGRAM, BREAKPOINT_HANDLER)
ENTRY = {program: CODE + 0x80 * n for n, program in enumerate(PROGRAMS)}


class Trace:
    """The device behind the report ports: what was written where, and when. Tells `done_fd` at the end."""

    def __init__(self, done_fd: int) -> None:
        self.done_fd = done_fd
        self.values: dict[int, int] = {}
        self.times: dict[int, float] = {}

    def read(self, _offset: int, _size: int) -> int:
        return 0

    def write(self, offset: int, _size: int, value: int) -> int:
        self.times[offset] = time.perf_counter()
        self.values[offset] = value
        if offset in (DONE, FAULT):
            os.eventfd_write(self.done_fd, 1)
        return 0


def _gate(vector_entry: int) -> bytes:
    """A 64-bit interrupt gate to CPL 0."""
    low, high = vector_entry & 0xFFFF, vector_entry >> 16
    return struct.pack("<HHBBHQ", low, KERNEL_CODE, 0, 0x8E, high, 0)


def _write_tables(memory: GuestMemory) -> None:
    """Page tables, GDT, TSS, IDT and the programs."""
    user_table, user_page, uncached = 0x07, 0xE7, 0x18
    memory.write(PAGE_MAP, struct.pack("<Q", PAGE_POINTERS | user_table))
    memory.write(PAGE_POINTERS, struct.pack("<4Q", PAGES_LOW | user_table, 0, 0, PAGES_HIGH | user_table))
    memory.write(PAGES_LOW, struct.pack("<Q", user_page))
    apic_page = LOCAL_APIC >> 21
    memory.write(PAGES_HIGH + apic_page % 512 * 8, struct.pack("<Q", apic_page << 21 | user_page | uncached))

    task = 0x0000_8900_0000_0000 | TSS << 16 | 0xFF
    code0, data0, base3, data3, code3 = 0x00AF9B, 0x00CF93, 0x00CFFB, 0x00CFF3, 0x00AFFB
    flat = [access << 40 | 0xFFFF for access in (code0, data0, base3, data3, code3)]
    memory.write(GDT, struct.pack("<8Q", 0, *flat, task, 0))

    # RSP0 at 4; the I/O permission bitmap (zeros: all ports below 256 allowed) begins at 104.
    memory.write(TSS, struct.pack("<IQ90xH", 0, KERNEL_STACK, 104) + bytes(32) + b"\xff")

    gates = [_gate(ENTRY[FAULT_HANDLER])] * 256
    gates[3] = _gate(ENTRY[BREAKPOINT_HANDLER])
    gates[TIMER_VECTOR] = _gate(ENTRY[TIMER_HANDLER])
    memory.write(IDT, b"".join(gates))
    for program, address in ENTRY.items():
        memory.write(address, program)


def _segment(selector: int, kind: int, *, code: bool = False) -> dict[str, int]:
    """struct kvm_segment of a flat segment as in the GDT. kind: type field of the descriptor."""
    return {
        "base": 0,
        "limit": 0xFFFFFFFF,
        "selector": selector,
        "type": kind,
        "present": 1,
        "dpl": selector & 3,
        "db": 0 if code else 1,
        "s": 1,
        "l": 1 if code else 0,
        "g": 1,
        "avl": 0,
        "unusable": 0,
        "padding": 0,
    }


def _special_registers(sregs: dict[str, Any], *, user: bool) -> dict[str, Any]:
    """Long mode with the tables of `_write_tables`, at CPL 3 or CPL 0."""
    code, data = (USER_CODE, USER_DATA) if user else (KERNEL_CODE, KERNEL_DATA)
    sregs |= {"cs": _segment(code, 0xB, code=True)}
    sregs |= dict.fromkeys(("ds", "es", "fs", "gs", "ss"), _segment(data, 0x3))
    sregs["tr"] = _segment(TASK, 0xB) | {"base": TSS, "limit": 0xFF, "s": 0, "g": 0, "db": 0}
    sregs["gdt"] = {**sregs["gdt"], "base": GDT, "limit": 63}
    sregs["idt"] = {**sregs["idt"], "base": IDT, "limit": 0xFFF}
    protected, numeric, paging, address_extension, fxsr = 1 << 0, 1 << 5, 1 << 31, 1 << 5, 1 << 9
    syscall_enable, long_enable, long_active = 1 << 0, 1 << 8, 1 << 10
    return sregs | {
        "cr0": sregs["cr0"] | protected | numeric | paging,
        "cr3": PAGE_MAP,
        "cr4": sregs["cr4"] | address_extension | fxsr,
        "efer": sregs["efer"] | syscall_enable | long_enable | long_active,
    }


def _run(kvm: Kvm, program: bytes) -> tuple[Trace, str]:
    """Run one of the guests: its reports, and how it ended ("done", "stuck", "fault" or KVM's reason)."""
    user = program is USER_PROGRAM
    done_fd = os.eventfd(0, os.EFD_CLOEXEC)
    trace = Trace(done_fd)
    try:
        with GuestMemory([(0, MEMORY_SIZE)]) as memory, kvm.create_vm() as vm:
            _write_tables(memory)
            vm.set_tss_addr(layout.KVM_TSS_ADDRESS)
            vm.create_irqchip()
            vm.set_user_memory_region(0, 0, MEMORY_SIZE, memory.regions[0].hva)
            vcpu = vm.create_vcpu(0)
            try:
                vcpu.set_cpuid2(kvm.supported_cpuid())
                vcpu.set_sregs(_special_registers(vcpu.get_sregs(), user=user))
                star, lstar, fmask = 0xC0000081, 0xC0000082, 0xC0000084
                entry = ENTRY[SYSCALL_ENTRY]
                vcpu.set_msrs({star: SYSRET_BASE << 48 | KERNEL_CODE << 32, lstar: entry, fmask: 0x200})
                registers = dict.fromkeys(vcpu.get_regs(), 0)
                # Ports are open to CPL 3 by I/O privilege level 3 and by the bitmap: some heed only one.
                interrupts_and_ports = 0x3200 if user else 0
                registers |= {"rip": ENTRY[program], "rflags": 2 | interrupts_and_ports}
                vcpu.set_regs(registers | {"rsp": USER_STACK if user else KERNEL_STACK})
                pio = Bus("pio")
                pio.attach_python(REPORTS, 16, trace)
                vcpu.start(pio, Bus("mmio"), exit_fd=done_fd)
                in_time = select.select([done_fd], [], [], TIME_LIMIT)[0]
                vcpu.stop()
                failure = vcpu.failure
            finally:
                vcpu.close()
    finally:
        os.close(done_fd)
    if failure:
        return trace, failure.removeprefix("vCPU 0: ").partition(", data")[0]
    return trace, "fault" if FAULT in trace.values else "done" if in_time else "stuck"


def _how(end: str) -> str:
    return {"stuck": f"nothing for {TIME_LIMIT:g} s", "fault": "the guest faulted"}.get(end, end)


def _judge_user(values: Mapping[int, int], end: str) -> list[Finding]:
    code = values.get(USER) == SUM
    interrupt = INTERRUPT in values
    if SYSCALL in values and values[SYSCALL] & 3:
        syscall, detail = False, "syscall from user mode does not enter the kernel (it arrives at CPL 3)"
    elif SYSCALL not in values:
        syscall, detail = False, f"no system call arrived: {_how(end)}"
    else:
        syscall = values.get(DONE) == SYSCALL_RESULT
        detail = "syscall enters CPL 0, sysret returns" if syscall else f"sysret does not return: {_how(end)}"
    none = f"none: {_how(end)}"
    return [
        Finding("user code", code, "runs at CPL 3" if code else f"wrong result or {none}"),
        Finding("interrupts", interrupt, "timer interrupt delivered at CPL 3" if interrupt else none),
        Finding("system calls", syscall, detail),
    ]


def _judge_kernel(trace: Trace, end: str) -> list[Finding]:
    if COUNTED not in trace.times:
        return [Finding("kernel code", False, f"does not run at CPL 0: {_how(end)}")]
    seconds = trace.times[COUNTED] - trace.times[KERNEL]
    speed = f"{LOOPS / seconds / 1e6:.1f} million instructions a second"
    # Even an emulated host runs tens of millions a second; an interpreter of single instructions one or two.
    kind = "interpreted" if LOOPS / seconds < 5e6 else "native"
    trap = BREAKPOINT in trace.values and DONE in trace.values
    return [
        Finding("kernel code", True, f"runs at CPL 0, {kind}: {speed}"),
        Finding("kernel traps", trap, "int3 at CPL 0" + (" is delivered" if trap else f": {_how(end)}")),
    ]


def examine(kvm: Kvm) -> list[Finding]:
    """Both guests, one after the other. KvmError when a machine for them cannot be had."""
    user, user_end = _run(kvm, USER_PROGRAM)
    kernel, kernel_end = _run(kvm, KERNEL_PROGRAM)
    return _judge_user(user.values, user_end) + _judge_kernel(kernel, kernel_end)
