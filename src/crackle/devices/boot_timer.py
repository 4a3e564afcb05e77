"""The boot timer: a guest writes 123 to it when its init runs, and the log says how long that took.

One byte at 0xc0000000, the first page of the MMIO window, as in Firecracker. A cold device, called under the GIL.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from crackle.kvm.bus import CONTINUE

SIZE = 0x1000
MAGIC = 123


class BootTimer:
    """Calls `report(wall_us, cpu_us)` with the microseconds since `start` each time the guest writes 123."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report
        self._wall = 0
        self._cpu = 0

    def start(self) -> None:
        """InstanceStart has just been accepted."""
        self._wall, self._cpu = time.monotonic_ns(), time.process_time_ns()

    def read(self, offset: int, size: int) -> int:
        """Nothing can be read; the guest gets zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> int:
        """The guest's mark."""
        if offset == 0 and size == 1 and value == MAGIC:
            self._report(
                (time.monotonic_ns() - self._wall) // 1000, (time.process_time_ns() - self._cpu) // 1000
            )
        return CONTINUE
