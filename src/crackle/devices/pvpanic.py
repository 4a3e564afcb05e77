"""pvpanic: how a guest's kernel says that it has panicked (QEMU, docs/specs/pvpanic.rst).

One byte, which the ACPI tables name as QEMU0001: reading tells what the device understands, writing what has happened.
Linux's driver is CONFIG_PVPANIC_MMIO. A cold device, called under the GIL.
"""

from __future__ import annotations

from collections.abc import Callable

from crackle.devices.state import PvPanicState
from crackle.kvm.bus import CONTINUE, PANIC

_PANICKED = 1 << 0
_CRASH_LOADED = 1 << 1
"""The kernel has panicked, and goes on with a crash kernel that looks after the rest."""


class PvPanic:
    """Notes that the guest has panicked, and calls `report` with a sentence.

    ends: a panic ends the guest, unless it has a crash kernel; otherwise it goes on as it would without this device,
    and resets itself or hangs.
    """

    def __init__(self, report: Callable[[str], None], *, ends: bool) -> None:
        self._report = report
        self._ends = ends
        self.panicked = False

    def read(self, offset: int, size: int) -> int:
        """What can be told."""
        return _PANICKED | _CRASH_LOADED

    def write(self, offset: int, size: int, value: int) -> int:
        """What the vCPU is to do: go on, or end."""
        if value & _PANICKED:
            self.panicked = True
            self._report("The guest's kernel has panicked.")
            return PANIC if self._ends else CONTINUE
        if value & _CRASH_LOADED:
            self._report("The guest's kernel has panicked, and goes on with its crash kernel.")
        return CONTINUE

    # -- saved state ---------------------------------------------------------------------------------------------

    def save(self) -> PvPanicState:
        """The machine is paused."""
        return PvPanicState(panicked=self.panicked)

    def restore(self, state: PvPanicState) -> None:
        """The reverse of `save`, before the vCPUs run."""
        self.panicked = state.panicked
