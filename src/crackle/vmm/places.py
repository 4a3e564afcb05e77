"""Who has which address and interrupt: one allocator for every device of a machine, which takes back what it gave.

Windows of virtio-mmio registers are given in ascending order. Interrupt lines are the pins of the IOAPIC that no legacy
device has; each device gets one of its own as long as there are any, and then one that as few others as can be have.
"""

from __future__ import annotations

from crackle.arch import platform
from crackle.errors import ConfigError
from crackle.kvm.line import Line


class Pool:
    """The numbers from `first` to `last`, `step` apart, each free or somebody's. `what` they are is for messages."""

    def __init__(self, what: str, first: int, last: int, step: int = 1) -> None:
        self.what = what
        self._numbers = range(first, last + 1, step)
        self._taken: set[int] = set()
        self._lowest = 0  # no number before this index is free

    def take(self) -> int:
        """The lowest that is free; ConfigError when none is."""
        for index in range(self._lowest, len(self._numbers)):
            if self._numbers[index] not in self._taken:
                self._lowest = index + 1
                self._taken.add(self._numbers[index])
                return self._numbers[index]
        raise ConfigError(f"a microVM has room for {len(self._numbers)} {self.what}; remove one")

    def claim(self, number: int) -> int:
        """This one, which a saved device had; ConfigError when it is taken, or none of these."""
        if number not in self._numbers or number in self._taken:
            raise ConfigError(f"{number:#x} is not free among the {self.what}")
        self._taken.add(number)
        return number

    def release(self, number: int) -> None:
        """Free it; KeyError when it is."""
        self._taken.remove(number)
        self._lowest = min(self._lowest, self._numbers.index(number))


class Spans:
    """Addresses from `first` on, before `end`, of which each device gets as many together as it asks for."""

    def __init__(self, what: str, first: int, end: int) -> None:
        self.what = what
        self._first, self._end = first, end
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> int:
        """The lowest place for so many bytes, a multiple of what all ask in; ConfigError when there is none."""
        at = self._first
        for start in sorted(self._taken):
            if at + size <= start:
                break
            at = start + self._taken[start]
        return self.claim(at, size)

    def claim(self, at: int, size: int) -> int:
        """This place, which a saved device had; ConfigError when that cannot be."""
        fits = self._first <= at and at + size <= self._end
        if not fits or any(at < start + taken and start < at + size for start, taken in self._taken.items()):
            raise ConfigError(f"there is no room for {size:#x} bytes of {self.what} at {at:#x}")
        self._taken[at] = size
        return at

    def release(self, at: int) -> None:
        """Free it; KeyError when it is."""
        del self._taken[at]


class Lines:
    """The interrupt lines from `first` to `last`, of which several devices may have the same.

    last_saved: the last that a saved device may have had, when it is not the same.
    """

    def __init__(self, first: int, last: int, last_saved: int | None = None) -> None:
        self._gsis = range(first, last + 1)
        self._saved = range(first, (last if last_saved is None else last_saved) + 1)
        self._lines: dict[int, Line] = {}

    def take(self) -> Line:
        """The line that the fewest devices have, for one more; ConfigError when there is no descriptor left."""
        return self._give(min(self._gsis, key=self._load))

    def claim(self, gsi: int) -> Line:
        """The line that a saved device had; ConfigError when no device can have it."""
        if gsi not in self._saved:
            raise ConfigError(
                f"interrupt {gsi} is none for devices: these are {self._saved[0]} to {self._saved[-1]}"
            )
        return self._give(gsi)

    def release(self, line: Line) -> None:
        """One of its devices has gone."""
        line.devices -= 1
        if not line.devices:
            del self._lines[line.gsi]
            line.close()

    def close(self) -> None:
        """Give all descriptors back; the devices have gone. Idempotent."""
        for line in self._lines.values():
            line.close()
        self._lines.clear()

    def _load(self, gsi: int) -> int:
        return self._lines[gsi].devices if gsi in self._lines else 0

    def _give(self, gsi: int) -> Line:
        if gsi not in self._lines:
            self._lines[gsi] = Line(gsi)
        self._lines[gsi].devices += 1
        return self._lines[gsi]


class Places:
    """What a machine's devices are given.

    `windows`, `lines`, `memory`, and `routes`: numbers of message-signalled interrupts.
    """

    def __init__(self) -> None:
        windows, lines, routes = platform.DEVICE_WINDOWS, platform.DEVICE_LINES, platform.DEVICE_ROUTES
        self.windows = Pool("devices", windows[0], windows[-1], windows.step)
        self.lines = Lines(lines[0], lines[-1], platform.SAVED_DEVICE_LINES[-1])
        memory = platform.DEVICE_MEMORY
        self.memory = Spans("devices' memory", memory.start, memory.stop)
        self.routes = Pool("message-signalled interrupts", routes[0], routes[-1])
