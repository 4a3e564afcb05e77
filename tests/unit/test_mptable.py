"""The MP table, entry by entry against Intel's MultiProcessor Specification 1.4, chapter 4."""

from __future__ import annotations

import struct

import pytest

from crackle.arch.x86_64 import mptable

ADDRESS = 0x9FC00
SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def entries(table: bytes) -> list[bytes]:
    """The entries behind the 16-byte floating pointer and the 44-byte header."""
    found, at = [], 16 + 44
    while at < len(table):
        size = SIZES[table[at]]
        found.append(table[at : at + size])
        at += size
    assert at == len(table)
    return found


def test_the_floating_pointer_leads_to_the_table() -> None:
    table = mptable.build(ADDRESS, 1)
    signature, address, length, specification, _, feature1, feature2 = struct.unpack("<4sIBBBBI", table[:16])
    assert (signature, address, length, specification) == (b"_MP_", ADDRESS + 16, 1, 4)
    assert (feature1, feature2) == (0, 0), "a table is present, and interrupts start in virtual wire mode"
    assert sum(table[:16]) % 256 == 0


@pytest.mark.parametrize("vcpus", [1, 2, 32])
def test_the_header_tells_length_entries_and_local_apic(vcpus: int) -> None:
    table = mptable.build(ADDRESS, vcpus)
    header = struct.unpack("<4sHBB8s12sIHHIHBB", table[16:60])
    signature, length, revision, _, oem, product, oem_table, oem_size, count, apic, extended, _, _ = header
    assert (signature, revision, apic) == (b"PCMP", 4, 0xFEE0_0000)
    assert length == len(table) - 16
    assert (oem, product) == (b"CRACKLE ", b"MICROVM     ")
    assert (oem_table, oem_size, extended) == (0, 0, 0)
    assert count == len(entries(table)) == vcpus + 1 + 1 + 24 + 2
    assert sum(table[16:]) % 256 == 0


def test_entries_come_in_ascending_order_of_type() -> None:
    kinds = [entry[0] for entry in entries(mptable.build(ADDRESS, 4))]
    assert kinds == sorted(kinds)


@pytest.mark.parametrize("vcpus", [1, 32])
def test_processors_are_enabled_and_the_first_boots(vcpus: int) -> None:
    processors = [
        struct.unpack("<BBBBIIII", entry) for entry in entries(mptable.build(ADDRESS, vcpus)) if not entry[0]
    ]
    assert [processor[1] for processor in processors] == list(range(vcpus))
    assert [processor[3] for processor in processors] == [3] + [1] * (vcpus - 1)
    assert all(processor[5] == 0x201 for processor in processors), "FPU and APIC on chip"


def test_the_ioapic_takes_isa_interrupts_on_the_pins_of_the_same_number() -> None:
    found = entries(mptable.build(ADDRESS, 2))
    assert [entry for entry in found if entry[0] == 1] == [b"\x01\x00ISA   "]
    (ioapic,) = [struct.unpack("<BBBBI", entry) for entry in found if entry[0] == 2]
    assert ioapic[3:] == (1, 0xFEC0_0000)
    assert ioapic[1] not in range(2), "its id differs from every processor's"
    lines = [struct.unpack("<BBHBBBB", entry) for entry in found if entry[0] == 3]
    assert lines == [(3, 0, 0, 0, pin, ioapic[1], pin) for pin in range(24)]


def test_local_interrupts_are_external_on_lint0_and_nmi_on_lint1() -> None:
    local = [
        struct.unpack("<BBHBBBB", entry) for entry in entries(mptable.build(ADDRESS, 2)) if entry[0] == 4
    ]
    assert local == [(4, 3, 0, 0, 0, 0, 0), (4, 1, 0, 0, 0, 0xFF, 1)]


def test_the_largest_table_stays_in_the_kibibyte_kernels_search() -> None:
    assert len(mptable.build(ADDRESS, 32)) <= 1024
