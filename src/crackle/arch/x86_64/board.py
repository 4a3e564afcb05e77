"""The board of an x86_64 microVM: what of a PC a kernel needs beside virtio, at a PC's ports and interrupts."""

from __future__ import annotations

import os

import msgspec

from crackle.arch.x86_64 import acpi, layout
from crackle.devices.boot_timer import SIZE as BOOT_TIMER_SIZE
from crackle.devices.boot_timer import BootTimer
from crackle.devices.hotplug import SIZE as HOTPLUG_SIZE
from crackle.devices.hotplug import HotPlug
from crackle.devices.i8042 import I8042
from crackle.devices.power import SleepControl
from crackle.devices.pvpanic import PvPanic
from crackle.devices.serial import Serial
from crackle.devices.state import (
    HotPlugState,
    I8042State,
    PvPanicState,
    SerialState,
    VmClockState,
    VmGenIdState,
)
from crackle.devices.vmclock import VmClock
from crackle.devices.vmgenid import VmGenId
from crackle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from crackle.arch.interface import DeviceInfo, Host
    from crackle.schema.rate_limiter import TokenBucket

_UART = (
    *("error_count", "flush_count", "missed_read_count", "missed_write_count", "read_count", "write_count"),
    "rate_limiter_dropped_bytes",
)
_I8042 = (
    "error_count",
    "missed_read_count",
    "missed_write_count",
    "read_count",
    "reset_count",
    "write_count",
)


class BoardState(msgspec.Struct, frozen=True, kw_only=True):
    """What the board saves in a snapshot. The sleep registers and the boot timer hold nothing.

    vmgenid, vmclock, hotplug: None of a guest that was begun without.
    """

    serial: SerialState
    i8042: I8042State
    pvpanic: PvPanicState
    vmgenid: VmGenIdState | None = None
    vmclock: VmClockState | None = None
    hotplug: HotPlugState | None = None


class Board:
    """Console, keyboard controller, sleep registers, power button, pvpanic, boot timer, VM generation ID, VMClock.

    And what tells of devices that come.
    """

    def __init__(
        self,
        host: Host,
        *,
        console: tuple[int, int],
        console_waits: bool,
        console_limit: TokenBucket | None,
        ends_on_panic: bool,
        report: Callable[[str], None],
        report_boot_time: Callable[[int, int], None] | None,
    ) -> None:
        self.serial = Serial(*console, host.interrupt(layout.GSI_COM1), console_waits, console_limit)
        self.serial.attach(host.pio, layout.COM1_PORT, host.io)
        self.i8042 = I8042(host.interrupt(layout.GSI_KEYBOARD))
        host.pio.attach_python(layout.I8042_PORT, layout.I8042_PORT_COUNT, self.i8042)
        host.pio.attach_python(layout.SLEEP_PORT, layout.SLEEP_PORT_COUNT, SleepControl(layout.S5_SLEEP_TYPE))
        self.pvpanic = PvPanic(report, ends=ends_on_panic)
        host.pio.attach_python(layout.PVPANIC_PORT, layout.PVPANIC_PORT_COUNT, self.pvpanic)
        event_fd = host.interrupt(layout.GSI_VMGENID)
        self._vmgenid: VmGenId | None = VmGenId(host.memory, layout.VMGENID_ADDR, event_fd)
        self._vmclock: VmClock | None = VmClock(host.memory, layout.VMCLOCK_ADDR, event_fd)
        self._hotplug: HotPlug | None = HotPlug(lambda level: host.assert_line(layout.GSI_VMGENID, level))
        host.mmio.attach_python(layout.HOTPLUG_ADDR, HOTPLUG_SIZE, self._hotplug)
        self._power_fd = host.interrupt(layout.GSI_POWER)
        self._boot_timer: BootTimer | None = None
        if report_boot_time is not None:
            self._boot_timer = BootTimer(report_boot_time)
            host.mmio.attach_python(layout.BOOT_TIMER_ADDR, BOOT_TIMER_SIZE, self._boot_timer)

    @property
    def panicked(self) -> bool:
        """Whether the guest's kernel has said that it panicked."""
        return self.pvpanic.panicked

    def start(self) -> None:
        """The guest begins now."""
        if self._vmgenid is not None:
            self._vmgenid.start()
        if self._vmclock is not None:
            self._vmclock.start()
        if self._boot_timer is not None:
            self._boot_timer.start()

    def send_ctrl_alt_del(self) -> None:
        """Press Ctrl-Alt-Del on the guest's keyboard."""
        self.i8042.send_ctrl_alt_del()

    def press_power_button(self) -> None:
        """Raise the interrupt of the ACPI event device."""
        os.eventfd_write(self._power_fd, 1)

    def announce(self, device: DeviceInfo) -> None:
        """Tell the guest of a device that has come. ConfigError when there is no way to."""
        if self._hotplug is None:
            raise ConfigError(
                "This guest was begun by a version of Crackle that attached no devices to running guests: give it this "
                "one before its next start."
            )
        if self._hotplug.given == acpi.MAX_ARRIVALS:
            raise ConfigError(
                f"This guest has been given {acpi.MAX_ARRIVALS} devices since its start, and can be told of no more "
                "before the next."
            )
        self._hotplug.arrive(device.address, acpi.arrival(self._hotplug.given, device))

    def ask_back(self, device: DeviceInfo) -> bool:
        """Ask the guest to let go of a device that came while it ran. Whether it can be asked, which is once."""
        return self._hotplug is not None and self._hotplug.depart(device.address, acpi.departure)

    def withdraw(self, device: DeviceInfo) -> None:
        """A device has gone."""
        if self._hotplug is not None:
            self._hotplug.withdraw(device.address, lambda number: acpi.arrival(number, device))

    def counters(self) -> dict[str, dict[str, int]]:
        """What the devices have counted, by section of the metrics."""
        return {
            "uart": {name: getattr(self.serial, name) for name in _UART},
            "i8042": {name: getattr(self.i8042, name) for name in _I8042},
        }

    def save(self) -> BoardState:
        """The machine is paused."""
        return BoardState(
            serial=self.serial.save(),
            i8042=self.i8042.save(),
            pvpanic=self.pvpanic.save(),
            vmgenid=None if self._vmgenid is None else self._vmgenid.save(),
            vmclock=None if self._vmclock is None else self._vmclock.save(),
            hotplug=None if self._hotplug is None else self._hotplug.save(),
        )

    def restore(self, state: BoardState) -> None:
        """The reverse of `save`, before the vCPUs run."""
        self.serial.restore(state.serial)
        self.i8042.restore(state.i8042)
        self.pvpanic.restore(state.pvpanic)
        if state.hotplug is None or self._hotplug is None:
            self._hotplug = None
        else:
            self._hotplug.restore(state.hotplug)
        if state.vmgenid is None or self._vmgenid is None:
            self._vmgenid = None
        else:
            self._vmgenid.restore(state.vmgenid)
        if state.vmclock is None or self._vmclock is None:
            self._vmclock = None
        else:
            self._vmclock.restore(state.vmclock)
