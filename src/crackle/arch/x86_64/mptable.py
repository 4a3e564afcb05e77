"""The MP table, for kernels without ACPI (Intel MultiProcessor Specification 1.4, chapter 4)."""

from __future__ import annotations

from functools import cache
from struct import Struct, pack

from crackle.arch.x86_64.layout import APIC_ADDR, GSI_LAST, IOAPIC_ADDR

_FLOATING_POINTER = Struct("<4sIBBBB4x")
_HEADER = Struct("<4sHBB8s12sIHHIHBx")
_PROCESSOR = Struct("<BBBBII8x")
_BUS = Struct("<BB6s")
_IOAPIC = Struct("<BBBBI")
_INTERRUPT = Struct("<BBHBBBB")

_SPECIFICATION = 4  # 1.4
_APIC_VERSION = 0x14
_PROCESSOR_ENTRY, _BUS_ENTRY, _IOAPIC_ENTRY, _IO_INTERRUPT_ENTRY, _LOCAL_INTERRUPT_ENTRY = range(5)
_ENABLED, _BOOT_PROCESSOR = 1 << 0, 1 << 1
_FAMILY_6 = 0x600
_HAS_FPU_AND_APIC = 1 << 0 | 1 << 9
_INT, _NMI, _EXTINT = 0, 1, 3
_ISA_BUS = 0
_ALL_APICS = 0xFF


@cache
def build(address: int, vcpu_count: int) -> bytes:
    """The floating pointer, to be written at guest physical `address` (a multiple of 16), and the table
    behind it.

    APIC ids are the vCPU indices. The IOAPIC's pins are ISA interrupts of the same number; LINT0 takes
    external interrupts and LINT1 NMIs.
    """
    ioapic_id = vcpu_count + 1
    entries = [
        _PROCESSOR.pack(
            _PROCESSOR_ENTRY,
            index,
            _APIC_VERSION,
            _ENABLED if index else _ENABLED | _BOOT_PROCESSOR,
            _FAMILY_6,
            _HAS_FPU_AND_APIC,
        )
        for index in range(vcpu_count)
    ]
    entries.append(_BUS.pack(_BUS_ENTRY, _ISA_BUS, b"ISA   "))
    entries.append(_IOAPIC.pack(_IOAPIC_ENTRY, ioapic_id, _APIC_VERSION, _ENABLED, IOAPIC_ADDR))
    entries.extend(
        _INTERRUPT.pack(_IO_INTERRUPT_ENTRY, _INT, 0, _ISA_BUS, pin, ioapic_id, pin)
        for pin in range(GSI_LAST + 1)
    )
    entries.append(_INTERRUPT.pack(_LOCAL_INTERRUPT_ENTRY, _EXTINT, 0, _ISA_BUS, 0, 0, 0))
    entries.append(_INTERRUPT.pack(_LOCAL_INTERRUPT_ENTRY, _NMI, 0, _ISA_BUS, 0, _ALL_APICS, 1))
    body = b"".join(entries)

    size = _HEADER.size + len(body)
    header = bytearray(
        _HEADER.pack(
            b"PCMP",
            size,
            _SPECIFICATION,
            0,
            b"CRACKLE ",
            b"MICROVM     ",
            0,
            0,
            len(entries),
            APIC_ADDR,
            0,
            0,
        )
    )
    header[7] = -(sum(header) + sum(body)) & 0xFF
    pointer = bytearray(
        _FLOATING_POINTER.pack(b"_MP_", address + _FLOATING_POINTER.size, 1, _SPECIFICATION, 0, 0)
    )
    pointer[10] = -sum(pointer) & 0xFF
    return pack("16s", pointer) + header + body
