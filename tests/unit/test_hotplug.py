"""How a guest is told of devices that come while it runs: registers, tables, and what its DSDT does with them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import msgspec
import pytest

from crackle.arch.x86_64 import DeviceInfo, acpi, layout
from crackle.arch.x86_64.board import BoardState
from crackle.devices.hotplug import EVENT, GENERATION, SIZE, TABLE, HotPlug
from crackle.kvm.bus import CONTINUE, Bus
from support.snapshots import STATE

BASE = layout.HOTPLUG_ADDR
NOTHING = 0
INFO = DeviceInfo(0xC000_2000, 0x1000, 6)
OTHER = DeviceInfo(0xC000_3000, 0x1000, 7)

needs_iasl = pytest.mark.skipif(not shutil.which("iasl"), reason="iasl is missing: install acpica-tools")


class Guest:
    def __init__(self) -> None:
        self.asserted = False
        self.device = HotPlug(self._assert)
        self.bus = Bus("mmio")
        self.bus.attach_python(BASE, SIZE, self.device)

    def _assert(self, level: bool) -> None:
        self.asserted = level

    def event(self) -> int:
        return self.bus.read(BASE + EVENT, 1)

    def table(self) -> bytes:
        """Byte by byte, as ACPICA reads it."""
        size = int.from_bytes(bytes(self.bus.read(BASE + 4 + n, 1) for n in range(4)), "little")
        return bytes(self.bus.read(BASE + n, 1) for n in range(size))


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_a_guest_is_told_of_devices_in_their_order_and_once(guest: Guest) -> None:
    assert guest.event() == NOTHING
    infos = [DeviceInfo(0xC000_2000 + n * 0x1000, 0x1000, 6 + n) for n in range(3)]
    tables = [acpi.arrival(n, info) for n, info in enumerate(infos)]
    for info, table in zip(infos, tables, strict=True):
        guest.device.arrive(info.address, table)
    for table in tables:
        assert guest.asserted
        assert guest.event() == TABLE
        assert guest.table() == table
    assert guest.asserted, "it does not know yet that there is nothing more"
    assert guest.event() == NOTHING
    assert not guest.asserted
    assert guest.device.given == 3


def test_what_comes_while_the_guest_finds_nothing_more_is_not_lost(guest: Guest) -> None:
    def come_meanwhile(level: bool) -> None:
        guest.asserted = level
        if not level and not guest.device.given:
            guest.device.arrive(INFO.address, acpi.arrival(0, INFO))
            guest.asserted = False  # as if this had been the later of the two

    guest.device._assert_line = come_meanwhile
    assert guest.event() == NOTHING
    assert guest.asserted
    assert guest.event() == TABLE


def test_a_guest_is_asked_for_what_came_and_once(guest: Guest) -> None:
    for number in range(2):
        assert not guest.device.depart(OTHER.address, acpi.departure), "it did not come"
        guest.device.arrive(INFO.address, acpi.arrival(number, INFO))
        assert (guest.event(), guest.event()) == (TABLE, NOTHING)
        assert guest.device.depart(INFO.address, acpi.departure)
        assert not guest.device.depart(INFO.address, acpi.departure), "a table can be loaded once"
        assert (guest.event(), guest.table()) == (TABLE, acpi.departure(number))
        assert guest.event() == NOTHING


def test_a_guest_does_not_hear_of_what_has_gone_again_before_it_asked(guest: Guest) -> None:
    for number, info in enumerate((INFO, OTHER)):
        guest.device.arrive(info.address, acpi.arrival(number, info))
    guest.device.withdraw(INFO.address, lambda number: acpi.arrival(number, INFO))
    assert not guest.device.depart(INFO.address, acpi.departure)
    assert (guest.event(), guest.table()) == (TABLE, acpi.arrival(1, OTHER))
    guest.device.withdraw(OTHER.address, lambda number: acpi.arrival(number, OTHER))
    guest.device.withdraw(OTHER.address, lambda number: acpi.arrival(number, OTHER))
    assert guest.event() == NOTHING
    assert guest.device.given == 2


def test_accesses_that_no_guest_makes_do_nothing(guest: Guest) -> None:
    table = acpi.arrival(0, INFO)
    guest.device.arrive(INFO.address, table)
    assert guest.bus.read(BASE + EVENT - 4, 4) == 0
    assert guest.bus.read(BASE + SIZE - 8, 8) == 0
    assert guest.bus.write(BASE, 4, 0xFFFF_FFFF) == CONTINUE
    assert guest.bus.write(BASE + EVENT, 1, 0xFF) == CONTINUE
    assert (guest.event(), guest.table()) == (TABLE, table)
    assert guest.bus.read(BASE + 8, 8) == int.from_bytes(table[8:16], "little")


def test_a_copy_hears_of_its_generation_first_and_then_of_what_the_other_had_not_heard(guest: Guest) -> None:
    first, second = acpi.arrival(0, INFO), acpi.arrival(1, OTHER)
    guest.device.arrive(INFO.address, first)
    guest.device.arrive(OTHER.address, second)
    assert guest.event() == TABLE
    state = msgspec.msgpack.decode(
        msgspec.msgpack.encode(guest.device.save()), type=type(guest.device.save())
    )
    for _ in range(2):
        copy = Guest()
        copy.device.restore(state)
        assert copy.asserted
        assert copy.table() == first, "it may have been reading that one"
        assert [copy.event(), copy.event(), copy.event()] == [GENERATION, TABLE, NOTHING]
        assert copy.table() == second
        assert copy.device.given == 2
        assert copy.device.depart(OTHER.address, acpi.departure)
        assert (copy.event(), copy.table()) == (TABLE, acpi.departure(1))
        state = guest.device.save()


def test_the_state_of_a_guest_that_was_begun_without_is_read() -> None:
    state = msgspec.to_builtins(STATE.board)
    del state["hotplug"]
    assert msgspec.convert(state, BoardState).hotplug is None


def test_a_table_declares_one_device_with_a_name_of_its_own() -> None:
    names = set()
    for number in range(acpi.MAX_ARRIVALS):
        table = acpi.arrival(number, INFO)
        assert len(table) <= EVENT
        assert sum(table) % 256 == 0
        assert struct.unpack_from("<4sIB", table) == (b"SSDT", len(table), 2)
        names.add(table[table.index(b"_SB_") + 4 :][:4])
        assert table[table.index(b"_SB_") :][:8] in acpi.departure(number)
    assert len(names) == acpi.MAX_ARRIVALS
    # The same device twice is the same table: ACPICA keeps one of each.
    assert acpi.arrival(7, INFO) == acpi.arrival(7, INFO)


@needs_iasl
def test_the_tables_read_as_they_are_meant_for_intels_compiler(tmp_path: Path) -> None:
    dsdt = acpi.dsdt(
        [DeviceInfo(0xC000_1000, 0x1000, 5)],
        power_gsi=layout.GSI_POWER,
        sleep_port=None,
        vmgenid=layout.VMGENID_ADDR,
        hotplug=BASE,
    )
    found = {}
    tables = {"dsdt": dsdt, "ssdt": acpi.arrival(0x7BC, INFO), "gone": acpi.departure(0x7BC)}
    for name, table in tables.items():
        (tmp_path / f"{name}.aml").write_bytes(table)
        command = ["iasl", "-d", f"{name}.aml"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=30)
        found[name] = " ".join((tmp_path / f"{name}.dsl").read_text().split())
    for words in (
        "OperationRegion (HPTB, SystemMemory, 0xC1000000, 0x0FF0)",
        "OperationRegion (HPRG, SystemMemory, 0xC1000FF0, One)",
        "Field (HPRG, ByteAcc, NoLock, Preserve) { HPEV, 8 }",
        "If ((Local0 == One)) { Notify (\\_SB.VGEN, 0x80)",
        "If ((Local0 == 0x02)) { Load (HPTB, Local1) }",
        "Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive, ,, ) { 0x00000017, }",
    ):
        assert words in found["dsdt"]
    for words in (
        'Device (\\_SB.H7BC) { Name (_HID, "ACPI0004"',
        "Method (LEFT, 0, NotSerialized) { }",
        "If ((Arg0 == 0x03)) { LEFT () }",
        'Device (LEFT.VDEV) { Name (_HID, "LNRO0005")',
        "0xC0002000",
        "Edge, ActiveHigh, Shared",
    ):
        assert words in found["ssdt"]
    assert "Notify (\\_SB.H7BC, 0x03)" in found["gone"]
