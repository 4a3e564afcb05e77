"""ACPI tables of a hardware-reduced machine (ACPI 6.5, chapters 4.1 and 5.2): RSDP, XSDT, FADT, MADT and
DSDT.

The DSDT declares the serial port, the keyboard controller, the pvpanic device, the VM generation ID, VMClock, a window
for each virtio device, and a power button. A hardware-reduced machine has no fixed power button, so pressing it is an
interrupt of the generic event device, whose `_EVT` method notifies the button (5.6.9, 4.8.2.2.2): raising GSI_POWER
asks the guest to shut down. GSI_VMGENID tells it in the same way that generation ID and VMClock's page have changed,
and that devices have come: each is declared in a table of its own, which `_EVT` loads from the registers of
:mod:`crackle.devices.hotplug`.
"""

from __future__ import annotations

from functools import cache
from struct import Struct, pack, pack_into
from typing import TYPE_CHECKING

from crackle.arch.x86_64 import aml, layout
from crackle.devices.hotplug import EVENT, GENERATION, TABLE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from crackle.arch.x86_64 import DeviceInfo

    class Memory(Protocol):
        """Guest memory."""

        def write(self, gpa: int, data: bytes | bytearray, /) -> None: ...


OEM_ID = b"CRACKL"
_OEM_TABLE_ID = b"CRACKLVM"
_CREATOR_ID = b"CRKL"
_HYPERVISOR_ID = b"CRACKLVM"
_HEADER = Struct("<4sIBB6s8sI4sI")
_ALIGNMENT = 16

_RSDP = Struct("<8sB6sBIIQB3x")
_RSDP_CHECKSUM = 8
_RSDP_EXTENDED_CHECKSUM = 32
_RSDP_FIRST_SIZE = 20

# Offsets in the FADT (table 5.9).
_FADT_SIZE = 276
_FADT_BOOT_ARCHITECTURE = 109
_FADT_FLAGS = 112
_FADT_RESET_REGISTER = 116
_FADT_RESET_VALUE = 128
_FADT_MINOR_VERSION = 131
_FADT_X_DSDT = 140
_FADT_SLEEP_CONTROL = 244
_FADT_SLEEP_STATUS = 256
_FADT_HYPERVISOR = 268

_HAS_8042 = 1 << 1
_NO_VGA = 1 << 2
_NO_CMOS_RTC = 1 << 5

_WBINVD_WORKS = 1 << 0
_NO_FIXED_POWER_BUTTON = 1 << 4
_NO_FIXED_SLEEP_BUTTON = 1 << 5
_HAS_RESET_REGISTER = 1 << 10
_HARDWARE_REDUCED = 1 << 20

_SYSTEM_IO = 1
_BYTE_ACCESS = 1

_LOCAL_APIC = 0
_IOAPIC = 1

_BUTTON_PRESSED = 0x80
_GENERATION_CHANGED = 0x80

_EJECT_REQUEST = 3

MAX_ARRIVALS = 2000
"""Devices that come: Linux 6.1 has numbers for 4095 tables, of which each wants two when it has gone again."""


def write_tables(
    memory: Memory,
    address: int,
    *,
    vcpu_count: int,
    devices: Sequence[DeviceInfo],
    power_gsi: int | None = layout.GSI_POWER,
    sleep_port: int | None = None,
    vmgenid: int | None = None,
    vmclock: int | None = None,
    hotplug: int | None = None,
) -> int:
    """Write the RSDP to its place and the other tables from guest physical `address` on. Returns where they
    end.

    power_gsi: the power button's interrupt; None declares no button. sleep_port: I/O port of a sleep control
    register, with the sleep status register at the next port; None declares no way to power off. vmgenid: where
    the VM generation ID is; vmclock: where VMClock's page is; None declares none. hotplug: where the registers are
    that tell of devices that come; None declares none.
    """
    start = _align(address)
    tables = bytearray()

    def add(table: bytes) -> int:
        tables.extend(bytes(_align(len(tables)) - len(tables)))
        place = start + len(tables)
        tables.extend(table)
        return place

    dsdt_address = add(
        dsdt(
            devices,
            power_gsi=power_gsi,
            sleep_port=sleep_port,
            vmgenid=vmgenid,
            vmclock=vmclock,
            hotplug=hotplug,
        )
    )
    fadt_address = add(fadt(dsdt_address, sleep_port=sleep_port))
    madt_address = add(madt(vcpu_count))
    xsdt_address = add(xsdt(fadt_address, madt_address))
    memory.write(start, tables)
    memory.write(layout.RSDP_ADDR, rsdp(xsdt_address))
    return start + len(tables)


def rsdp(xsdt_address: int) -> bytes:
    """Root system description pointer, revision 2, without an RSDT (5.2.5.3)."""
    pointer = bytearray(_RSDP.pack(b"RSD PTR ", 0, OEM_ID, 2, 0, _RSDP.size, xsdt_address, 0))
    pointer[_RSDP_CHECKSUM] = -sum(pointer[:_RSDP_FIRST_SIZE]) & 0xFF
    pointer[_RSDP_EXTENDED_CHECKSUM] = -sum(pointer) & 0xFF
    return bytes(pointer)


def xsdt(*addresses: int) -> bytes:
    """Extended system description table (5.2.8): where the other tables are."""
    return _table(b"XSDT", 1, pack(f"<{len(addresses)}Q", *addresses))


@cache
def fadt(dsdt_address: int, *, sleep_port: int | None) -> bytes:
    """Fixed ACPI description table (5.2.9). Writing 0xfe to the keyboard controller's command port resets."""
    table = bytearray(_FADT_SIZE)
    pack_into("<H", table, _FADT_BOOT_ARCHITECTURE, _HAS_8042 | _NO_VGA | _NO_CMOS_RTC)
    flags = (
        _WBINVD_WORKS
        | _NO_FIXED_POWER_BUTTON
        | _NO_FIXED_SLEEP_BUTTON
        | _HAS_RESET_REGISTER
        | _HARDWARE_REDUCED
    )
    pack_into("<I", table, _FADT_FLAGS, flags)
    pack_into("12s", table, _FADT_RESET_REGISTER, _port(layout.I8042_COMMAND_PORT))
    table[_FADT_RESET_VALUE] = layout.I8042_RESET
    table[_FADT_MINOR_VERSION] = 5
    pack_into("<Q", table, _FADT_X_DSDT, dsdt_address)
    if sleep_port is not None:
        pack_into("12s", table, _FADT_SLEEP_CONTROL, _port(sleep_port))
        pack_into("12s", table, _FADT_SLEEP_STATUS, _port(sleep_port + 1))
    pack_into("8s", table, _FADT_HYPERVISOR, _HYPERVISOR_ID)
    return _table(b"FACP", 6, table[_HEADER.size :])


@cache
def madt(vcpu_count: int) -> bytes:
    """Multiple APIC description table (5.2.12). GSI n is pin n of the one IOAPIC; no ISA interrupt is
    rerouted.
    """
    body = [pack("<II", layout.APIC_ADDR, 0), pack("<BBBBII", _IOAPIC, 12, 0, 0, layout.IOAPIC_ADDR, 0)]
    body.extend(pack("<BBBBI", _LOCAL_APIC, 8, index, index, 1) for index in range(vcpu_count))
    return _table(b"APIC", 6, b"".join(body))


def dsdt(
    devices: Sequence[DeviceInfo],
    *,
    power_gsi: int | None,
    sleep_port: int | None,
    vmgenid: int | None = None,
    vmclock: int | None = None,
    hotplug: int | None = None,
) -> bytes:
    """Differentiated system description table (5.2.11.1): devices, in the order the guest is to find them."""
    gsis = [info.gsi for info in devices]
    terms = [
        _virtio_device(f"V{index:03d}", index, info.address, info.size, info.gsi, gsis.count(info.gsi) > 1)
        for index, info in enumerate(devices)
    ]
    body = aml.scope("\\_SB", _board(power_gsi, vmgenid, vmclock, hotplug), *terms)
    if sleep_port is not None:
        body += _power_off()
    return _table(b"DSDT", 2, body)


def arrival(number: int, info: DeviceInfo) -> bytes:
    """Secondary system description table (5.2.11.2) of the device that came as the `number`-th after the start.

    It is in a container, and there below the name of a method. What is below that goes when the method has been
    executed, whoever put it there: so the guest's interpreter forgets the device when it tells (`_OST`, 6.3.5) that it
    has got the request to eject the container.
    """
    device = _virtio_device("LEFT.VDEV", 1000 + number, info.address, info.size, info.gsi, True)
    container = aml.device(
        _arrival_name(number),
        aml.name("_HID", aml.string("ACPI0004")),
        aml.name("_UID", aml.integer(number)),
        aml.method("LEFT", 0),
        aml.method("_OST", 3, aml.if_equal(aml.ARG0, aml.integer(_EJECT_REQUEST), aml.name_string("LEFT"))),
        device,
    )
    return _table(b"SSDT", 2, container)


def departure(number: int) -> bytes:
    """The table that, when it is loaded, asks for that device."""
    return _table(b"SSDT", 2, aml.notify(_arrival_name(number), _EJECT_REQUEST))


def _arrival_name(number: int) -> str:
    return f"\\_SB.H{number:03X}"


# What is the same for many machines is made once in a process that forks them.


@cache
def _board(power_gsi: int | None, vmgenid: int | None, vmclock: int | None, hotplug: int | None) -> bytes:
    terms = [
        aml.device(
            "COM1",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(0)),
            aml.name("_DDN", aml.string("COM1")),
            _resources(aml.interrupt(layout.GSI_COM1), aml.io(layout.COM1_PORT, layout.COM1_PORT_COUNT)),
        ),
        aml.device(
            "PS2_",
            aml.name("_HID", aml.eisa_id("PNP0303")),
            _resources(
                aml.io(layout.I8042_PORT, 1),
                aml.io(layout.I8042_COMMAND_PORT, 1),
                aml.interrupt(layout.GSI_KEYBOARD),
            ),
        ),
        aml.device(
            "PEVT",
            aml.name("_HID", aml.string("QEMU0001")),
            _resources(aml.io(layout.PVPANIC_PORT, layout.PVPANIC_PORT_COUNT)),
        ),
    ]
    events = []
    if power_gsi is not None:
        terms.append(aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C"))))
        events.append((power_gsi, aml.notify("\\_SB.PWRB", _BUTTON_PRESSED)))
    changed = []
    if vmgenid is not None:
        terms.append(_generation_id(vmgenid))
        changed.append(aml.notify("\\_SB.VGEN", _GENERATION_CHANGED))
    if vmclock is not None:
        terms.append(_clock(vmclock))
        changed.append(aml.notify("\\_SB.VCLK", _GENERATION_CHANGED))
    if hotplug is not None:
        changed = [_look(changed)]
    events.extend((layout.GSI_VMGENID, term) for term in changed)
    if events:
        terms.append(_event_device(events, hotplug))
    return b"".join(terms)


@cache
def _virtio_device(name: str, uid: int, address: int, size: int, gsi: int, shared: bool) -> bytes:
    return aml.device(
        name,
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(uid)),
        aml.name("_CCA", aml.integer(1)),
        _resources(aml.memory32_fixed(address, size), aml.interrupt(gsi, shared=shared)),
    )


@cache
def _power_off() -> bytes:
    sleep_type = aml.integer(layout.S5_SLEEP_TYPE)
    return aml.name("\\_S5", aml.package(sleep_type, sleep_type, aml.integer(0), aml.integer(0)))


def _generation_id(address: int) -> bytes:
    """Where it is, in two halves of 32 bits, under the two names that Microsoft gives it; Linux takes either."""
    half = (1 << 32) - 1
    return aml.device(
        "VGEN",
        aml.name("_HID", aml.string("CRKL0001")),
        aml.name("_CID", aml.package(aml.string("VMGENCTR"), aml.string("VM_Gen_Counter"))),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(aml.integer(address & half), aml.integer(address >> 32))),
    )


def _clock(address: int) -> bytes:
    """VMClock's page, under the names by which Linux and others know it."""
    return aml.device(
        "VCLK",
        aml.name("_HID", aml.string("AMZNC10C")),
        aml.name("_CID", aml.string("VMCLOCK")),
        aml.name("_DDN", aml.string("VMCLOCK")),
        _resources(aml.memory32_fixed(address, layout.PAGE_SIZE)),
    )


def _look(changed: Sequence[bytes]) -> bytes:
    """Ask what has happened until nothing more has: `changed` is what to do about another generation."""
    ask = aml.store(aml.name_string("HPEV"), aml.LOCAL0)
    return ask + aml.while_true(
        aml.LOCAL0,
        aml.if_equal(aml.LOCAL0, aml.integer(GENERATION), *changed),
        aml.if_equal(aml.LOCAL0, aml.integer(TABLE), aml.load("HPTB", aml.LOCAL1)),
        ask,
    )


def _event_device(events: Sequence[tuple[int, bytes]], hotplug: int | None) -> bytes:
    """The generic event device: for each (interrupt, term) it does what the term says.

    One interrupt may have several.
    """
    cases = [aml.if_equal(aml.ARG0, aml.integer(gsi), term) for gsi, term in events]
    registers, asserted = [], None
    if hotplug is not None:
        # It stays so until the guest has looked: what comes before the guest's driver is there is not lost.
        asserted = layout.GSI_VMGENID
        registers = [
            aml.memory_region("HPTB", hotplug, EVENT),
            aml.memory_region("HPRG", hotplug + EVENT, 1),
            aml.byte_field("HPRG", "HPEV"),
        ]
    return aml.device(
        "GED_",
        aml.name("_HID", aml.string("ACPI0013")),
        _resources(
            *(aml.interrupt(gsi, level=gsi == asserted) for gsi in dict.fromkeys(gsi for gsi, _ in events))
        ),
        *registers,
        aml.method("_EVT", 1, *cases, serialized=True),
    )


def _resources(*descriptors: bytes) -> bytes:
    return aml.name("_CRS", aml.resource_template(*descriptors))


def _port(port: int) -> bytes:
    """A generic address structure for a one-byte I/O port (5.2.3.2)."""
    return pack("<BBBBQ", _SYSTEM_IO, 8, 0, _BYTE_ACCESS, port)


def _table(signature: bytes, revision: int, body: bytes | bytearray) -> bytes:
    """A system description table: the header of 5.2.6, with its checksum, and the body."""
    size = _HEADER.size + len(body)
    table = bytearray(_HEADER.pack(signature, size, revision, 0, OEM_ID, _OEM_TABLE_ID, 1, _CREATOR_ID, 1))
    table += body
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def _align(address: int) -> int:
    return -(-address // _ALIGNMENT) * _ALIGNMENT
