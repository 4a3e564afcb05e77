"""Register state at the kernel's first instruction, and the tables in guest memory that it points to.

The 64-bit Linux protocol (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol") enters in long mode with
[0, 1 GiB) mapped to itself; PVH (Xen `docs/misc/pvh.pandoc`) in 32-bit protected mode without paging. Only
the boot vCPU needs any of it: the others wait for a start-up IPI, which resets them.
"""

from __future__ import annotations

from struct import pack, pack_into, unpack_from
from typing import TYPE_CHECKING

from crackle.arch.x86_64 import layout

if TYPE_CHECKING:
    from typing import Any

    from crackle.memory import GuestMemory

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10

_RFLAGS_FIXED = 1 << 1
_FCW_DEFAULT = 0x37F
_MXCSR_DEFAULT = 0x1F80

_PRESENT_WRITABLE = 0b11
_LARGE_PAGE = 1 << 7 | _PRESENT_WRITABLE
_LARGE_PAGE_SIZE = 2 << 20

# Access bytes and flag nibbles of segment descriptors (Intel SDM volume 3, 3.4.5): present, DPL 0, accessed.
_CODE = 0x9B
_DATA = 0x93
_BUSY_TSS = 0x8B
_GRANULAR, _SIZE_32, _LONG = 8, 4, 2

# (access, flags, limit) at the selectors that boot.rst names: code at __BOOT_CS (0x10), data at __BOOT_DS (0x18).
# Then a TSS, whose descriptor has 16 bytes in long mode (Intel SDM volume 3, 8.2.3). PVH leaves the selectors to us.
_UNUSED = (0, 0, 0)
_GDT_LINUX64 = (
    _UNUSED,
    _UNUSED,
    (_CODE, _GRANULAR | _LONG, 0xF_FFFF),
    (_DATA, _GRANULAR | _SIZE_32, 0xF_FFFF),
    (_BUSY_TSS, _GRANULAR, 0xF_FFFF),
    _UNUSED,
)
_GDT_PVH = (
    _UNUSED,
    _UNUSED,
    (_CODE, _GRANULAR | _SIZE_32, 0xF_FFFF),
    (_DATA, _GRANULAR | _SIZE_32, 0xF_FFFF),
    (_BUSY_TSS, 0, 0x67),
    _UNUSED,
)
_CODE_INDEX, _DATA_INDEX, _TSS_INDEX = 2, 3, 4
_IDT_LIMIT = 7

_LVT_LINT0 = 0x350
_LVT_LINT1 = 0x360
_DELIVERY_MODE_MASK = 7 << 8
_DELIVER_NMI = 4 << 8
_DELIVER_EXTINT = 7 << 8

_REGISTER_NAMES = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)


def write_tables(memory: GuestMemory, *, pvh: bool) -> None:
    """Write the GDT and an empty IDT, and for the 64-bit protocol the page tables."""
    descriptors = [_descriptor(*entry) for entry in (_GDT_PVH if pvh else _GDT_LINUX64)]
    memory.write(layout.BOOT_GDT, pack("<6Q", *descriptors))
    memory.write(layout.BOOT_IDT, bytes(_IDT_LIMIT + 1))
    if not pvh:
        memory.write(layout.PML4_START, pack("<Q", layout.PDPTE_START | _PRESENT_WRITABLE))
        memory.write(layout.PDPTE_START, pack("<Q", layout.PDE_START | _PRESENT_WRITABLE))
        pages = range(_LARGE_PAGE, layout.IDENTITY_MAP_END, _LARGE_PAGE_SIZE)
        memory.write(layout.PDE_START, pack("<512Q", *pages))


def boot_regs(entry: int, *, pvh: bool) -> dict[str, int]:
    """The general registers of the boot vCPU, with all the keys of struct kvm_regs."""
    regs = dict.fromkeys(_REGISTER_NAMES, 0)
    regs["rip"] = entry
    regs["rflags"] = _RFLAGS_FIXED
    if pvh:
        regs["rbx"] = layout.PVH_INFO_START
    else:
        regs["rsi"] = layout.ZERO_PAGE_START
        regs["rsp"] = regs["rbp"] = layout.BOOT_STACK_POINTER
    return regs


def boot_sregs(sregs: dict[str, Any], *, pvh: bool) -> dict[str, Any]:
    """The segment and control registers of the boot vCPU: those KVM made, `sregs`, changed where the
    protocol says.
    """
    gdt = _GDT_PVH if pvh else _GDT_LINUX64
    data = _segment(gdt, _DATA_INDEX)
    result = {
        **sregs,
        "cs": _segment(gdt, _CODE_INDEX),
        **{name: dict(data) for name in ("ds", "es", "fs", "gs", "ss")},
        "tr": _segment(gdt, _TSS_INDEX),
        "gdt": {"base": layout.BOOT_GDT, "limit": len(gdt) * 8 - 1},
        "idt": {"base": layout.BOOT_IDT, "limit": _IDT_LIMIT},
    }
    if pvh:
        result.update(cr0=CR0_PE | CR0_ET, cr4=0)
    else:
        result.update(
            cr0=sregs["cr0"] | CR0_PE | CR0_PG,
            cr3=layout.PML4_START,
            cr4=sregs["cr4"] | CR4_PAE,
            efer=sregs["efer"] | EFER_LME | EFER_LMA,
        )
    return result


def boot_fpu() -> dict[str, Any]:
    """The x87 and SSE state after FNINIT: the fields of struct kvm_fpu that are not zero."""
    return {"fcw": _FCW_DEFAULT, "mxcsr": _MXCSR_DEFAULT}


def boot_lapic(registers: bytes) -> bytes:
    """The local APIC page of the boot vCPU: LINT0 takes external interrupts, LINT1 NMIs, as the MP table
    says.
    """
    page = bytearray(registers)
    for offset, mode in ((_LVT_LINT0, _DELIVER_EXTINT), (_LVT_LINT1, _DELIVER_NMI)):
        (entry,) = unpack_from("<I", page, offset)
        pack_into("<I", page, offset, entry & ~_DELIVERY_MODE_MASK | mode)
    return bytes(page)


def _descriptor(access: int, flags: int, limit: int) -> int:
    """A segment descriptor with base 0."""
    return limit & 0xFFFF | access << 40 | (limit >> 16) << 48 | flags << 52


def _segment(gdt: tuple[tuple[int, int, int], ...], index: int) -> dict[str, int]:
    """The hidden part of a segment register, as struct kvm_segment, for entry `index` of the table."""
    access, flags, limit = gdt[index]
    granular = flags >> 3
    return {
        "base": 0,
        "limit": limit << 12 | 0xFFF if granular else limit,
        "selector": index * 8,
        "type": access & 0xF,
        "present": access >> 7,
        "dpl": access >> 5 & 3,
        "db": flags >> 2 & 1,
        "s": access >> 4 & 1,
        "l": flags >> 1 & 1,
        "g": granular,
        "avl": flags & 1,
        "unusable": 0,
        "padding": 0,
    }
