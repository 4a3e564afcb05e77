"""The ACPI tables, byte by byte against ACPI 6.5 chapter 5.2, and as Intel's compiler sees them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from crackle.arch import platform
from crackle.arch.x86_64 import DeviceInfo, acpi, layout, memory_layout, mptable
from crackle.memory import GuestMemory

MIB = 1 << 20
START = 0x9FFA4
DEVICES = [DeviceInfo(0xC000_1000 + index * 0x1000, 0x1000, 5 + index) for index in range(3)]

needs_iasl = pytest.mark.skipif(not shutil.which("iasl"), reason="iasl is missing: install acpica-tools")


def tables(
    vcpus: int = 2, devices: list[DeviceInfo] = DEVICES, sleep_port: int | None = None
) -> tuple[GuestMemory, dict[str, bytes]]:
    """Guest memory with all tables written, and the tables found by following pointers from the RSDP."""
    memory = GuestMemory(memory_layout(MIB))
    end = acpi.write_tables(memory, START, vcpu_count=vcpus, devices=devices, sleep_port=sleep_port)
    found = {"RSDP": memory.read(0xE0000, 36)}

    def follow(address: int) -> bytes:
        assert START <= address < end <= 0xE0000
        assert address % 16 == 0
        (size,) = struct.unpack("<I", memory.read(address + 4, 4))
        table = memory.read(address, size)
        found[table[:4].decode()] = table
        return table

    xsdt = follow(struct.unpack_from("<Q", found["RSDP"], 24)[0])
    for address in struct.unpack_from(f"<{(len(xsdt) - 36) // 8}Q", xsdt, 36):
        follow(address)
    follow(struct.unpack_from("<Q", found["FACP"], 140)[0])
    return memory, found


def test_the_rsdp_is_revision_2_and_both_checksums_hold() -> None:
    rsdp = tables()[1]["RSDP"]
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) % 256 == 0
    assert sum(rsdp) % 256 == 0
    assert rsdp[9:15] == b"CRACKL"
    assert rsdp[15] == 2
    assert struct.unpack_from("<II", rsdp, 16) == (0, 36)
    assert rsdp[33:] == bytes(3)


def test_all_tables_are_reached_and_have_a_sound_header() -> None:
    found = tables()[1]
    assert set(found) == {"RSDP", "XSDT", "FACP", "APIC", "DSDT"}
    revisions = {"XSDT": 1, "FACP": 6, "APIC": 6, "DSDT": 2}
    for signature, revision in revisions.items():
        table = found[signature]
        assert sum(table) % 256 == 0, signature
        assert struct.unpack_from("<IB", table, 4) == (len(table), revision)
        assert table[10:16] == b"CRACKL"
        assert table[16:24] == b"CRACKLVM"
        assert table[28:32] == b"CRKL"


def test_the_fadt_is_that_of_a_hardware_reduced_machine() -> None:
    fadt = tables()[1]["FACP"]
    assert len(fadt) == 276
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 20, "HW_REDUCED_ACPI"
    assert flags & 1 << 4, "no fixed power button: it is a control method device"
    assert flags & 1 << 5, "no fixed sleep button"
    assert not any(fadt[46:109]), "fields from SCI_INT to CENTURY are ignored and zero"
    assert struct.unpack_from("<H", fadt, 109) == (0b100110,), "8042, no VGA, no CMOS clock"
    assert (fadt[8], fadt[131]) == (6, 5)
    assert fadt[268:276] == b"CRACKLVM"


def test_the_reset_register_is_the_keyboard_controllers_reset_line() -> None:
    fadt = tables()[1]["FACP"]
    assert struct.unpack_from("<I", fadt, 112)[0] & 1 << 10, "RESET_REG_SUP"
    assert fadt[116:128] == bytes.fromhex("01 08 00 01 64 00 00 00 00 00 00 00")
    assert fadt[128] == 0xFE


def test_sleep_registers_and_the_s5_package_come_together() -> None:
    without, with_port = tables()[1], tables(sleep_port=0x600)[1]
    assert not any(without["FACP"][244:268])
    assert b"_S5_" not in without["DSDT"]
    assert with_port["FACP"][244:256] == bytes.fromhex("01 08 00 01 00 06 00 00 00 00 00 00")
    assert with_port["FACP"][256:268] == bytes.fromhex("01 08 00 01 01 06 00 00 00 00 00 00")
    assert b"\x08\\_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00" in with_port["DSDT"]


@pytest.mark.parametrize("vcpus", [1, 2, 32])
def test_the_madt_has_the_ioapic_and_every_local_apic(vcpus: int) -> None:
    madt = tables(vcpus)[1]["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 0)
    assert struct.unpack_from("<BBBBII", madt, 44) == (1, 12, 0, 0, 0xFEC0_0000, 0)
    local = list(struct.iter_unpack("<BBBBI", madt[56:]))
    assert local == [(0, 8, index, index, 1) for index in range(vcpus)]


def test_devices_keep_their_order_in_the_dsdt() -> None:
    dsdt = tables()[1]["DSDT"]
    places = [dsdt.index(f"V{index:03d}".encode()) for index in range(3)]
    assert places == sorted(places)
    assert dsdt.count(b"\x0dLNRO0005\0") == 3


def test_without_a_power_button_there_is_no_event_device() -> None:
    dsdt = acpi.dsdt([], power_gsi=None, sleep_port=None)
    assert b"GED_" not in dsdt
    assert b"PWRB" not in dsdt


def test_the_largest_machine_fits_below_the_rsdp() -> None:
    devices = [DeviceInfo(0xC000_1000 + index * 0x1000, 0x1000, 5 + index) for index in range(19)]
    memory = GuestMemory(memory_layout(MIB))
    end = acpi.write_tables(
        memory, START, vcpu_count=32, devices=devices, sleep_port=0x600, vmgenid=0xE1000, vmclock=0xE2000
    )
    assert end <= 0xE0000


ASL = r"""
DefinitionBlock ("dsdt.aml", "DSDT", 2, "CRACKL", "CRACKLVM", 1)
{
    Scope (\_SB)
    {
        Device (COM1)
        {
            Name (_HID, EisaId ("PNP0501"))
            Name (_UID, Zero)
            Name (_DDN, "COM1")
            Name (_CRS, ResourceTemplate ()
            {
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 4 }
                IO (Decode16, 0x3F8, 0x3F8, 1, 8)
            })
        }
        Device (PS2)
        {
            Name (_HID, EisaId ("PNP0303"))
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, 0x60, 0x60, 1, 1)
                IO (Decode16, 0x64, 0x64, 1, 1)
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 1 }
            })
        }
        Device (PEVT)
        {
            Name (_HID, "QEMU0001")
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, 0x505, 0x505, 1, 1)
            })
        }
        Device (PWRB)
        {
            Name (_HID, EisaId ("PNP0C0C"))
        }
        Device (VGEN)
        {
            Name (_HID, "CRKL0001")
            Name (_CID, Package (2) { "VMGENCTR", "VM_Gen_Counter" })
            Name (_DDN, "VM_Gen_Counter")
            Name (ADDR, Package (2) { 0x9ABCDEF0, 0x12345678 })
        }
        Device (VCLK)
        {
            Name (_HID, "AMZNC10C")
            Name (_CID, "VMCLOCK")
            Name (_DDN, "VMCLOCK")
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xE2000, 0x1000)
            })
        }
        Device (GED)
        {
            Name (_HID, "ACPI0013")
            Name (_CRS, ResourceTemplate ()
            {
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 3 }
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 23 }
            })
            Method (_EVT, 1, Serialized)
            {
                If (LEqual (Arg0, 3))
                {
                    Notify (\_SB.PWRB, 0x80)
                }
                If (LEqual (Arg0, 23))
                {
                    Notify (\_SB.VGEN, 0x80)
                }
                If (LEqual (Arg0, 23))
                {
                    Notify (\_SB.VCLK, 0x80)
                }
            }
        }
        Device (V000)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, Zero)
            Name (_CCA, One)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xC0001000, 0x1000)
                Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 5 }
            })
        }
    }
    Name (\_S5, Package (4) { 5, 5, Zero, Zero })
}
"""


@needs_iasl
def test_the_dsdt_is_what_intels_compiler_makes_of_the_same_source(tmp_path: Path) -> None:
    (tmp_path / "dsdt.asl").write_text(ASL)
    subprocess.run(["iasl", "-oa", "dsdt.asl"], cwd=tmp_path, check=True, capture_output=True, timeout=30)
    compiled = (tmp_path / "dsdt.aml").read_bytes()
    ours = acpi.dsdt(DEVICES[:1], power_gsi=3, sleep_port=0x600, vmgenid=0x12345678_9ABCDEF0, vmclock=0xE2000)
    header = 36  # names the compiler
    assert ours[header:] == compiled[header:]


@needs_iasl
@pytest.mark.parametrize("signature", ["FACP", "APIC", "XSDT"])
def test_the_data_tables_are_understood_by_intels_disassembler(tmp_path: Path, signature: str) -> None:
    (tmp_path / "table.dat").write_bytes(tables(sleep_port=0x600)[1][signature])
    done = subprocess.run(
        ["iasl", "-d", "table.dat"], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=30
    )
    text = (tmp_path / "table.dsl").read_text()
    for word in ("Warning", "Error", "Invalid", "Unknown"):
        assert word not in text + done.stderr
    expected = {
        "FACP": ["Hardware Reduced (V5) : 1", "Reset Register Supported (V2) : 1", "0000000000000600"],
        "APIC": ["[I/O APIC]", "[Processor Local APIC]"],
        "XSDT": ["ACPI Table Address   1"],
    }
    for line in expected[signature]:
        assert line in text


def test_what_a_zygote_has_made_is_not_made_again() -> None:
    made = (acpi._board, acpi._virtio_device, acpi._power_off, acpi.fadt, acpi.madt, mptable.build)
    platform.make_ready()
    before = [each.cache_info().misses for each in made]
    with GuestMemory(platform.memory_layout(64 << 20)) as memory:
        table = mptable.build(layout.SYSTEM_MEM_START, 2)
        places = zip(platform.DEVICE_WINDOWS, platform.DEVICE_LINES, strict=False)
        acpi.write_tables(
            memory,
            layout.SYSTEM_MEM_START + len(table),
            vcpu_count=2,
            devices=[DeviceInfo(address, 4096, line) for address, line in list(places)[:3]],
            sleep_port=layout.SLEEP_PORT,
            vmgenid=layout.VMGENID_ADDR,
            vmclock=layout.VMCLOCK_ADDR,
            hotplug=layout.HOTPLUG_ADDR,
        )
    assert [each.cache_info().misses for each in made] == before
