"""The ACPI sleep registers: how a guest switches itself off (ACPI 6.5, sections 4.8.3.7 and 7.4.2.6).

A hardware-reduced platform has one byte to write and one to read. A cold device, called under the GIL.
"""

from __future__ import annotations

from crackle.kvm.bus import CONTINUE, SHUTDOWN

_SLEEP_ENABLE = 0x20
_SLEEP_TYPE = 0x1C
_SLEEP_TYPE_SHIFT = 2


class SleepControl:
    """Sleep control at offset 0, sleep status at offset 1. Only S5, soft off, is known.

    soft_off: the sleep type that the DSDT's \\_S5 object names.
    """

    def __init__(self, soft_off: int) -> None:
        self._soft_off = soft_off

    def read(self, offset: int, size: int) -> int:
        """Never woken from anything."""
        return 0

    def write(self, offset: int, size: int, value: int) -> int:
        """What the vCPU is to do: go on, or be switched off."""
        wanted = (value & _SLEEP_TYPE) >> _SLEEP_TYPE_SHIFT
        if offset == 0 and value & _SLEEP_ENABLE and wanted == self._soft_off:
            return SHUTDOWN
        return CONTINUE
