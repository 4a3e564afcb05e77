"""Devices that come while the guest runs: how its ACPI interpreter gets to know them.

Two registers, in a page that only the DSDT knows of. Reading EVENT, one byte, tells what has happened that the guest
does not know yet, and takes it off the list; when that is a device, there is from then on a table at offset 0 that
declares it (an SSDT, ACPI 6.5, section 5.2.11.2), and the guest loads it. An interrupt of the generic event device has
it look, and is asserted until the guest has found that there is nothing more: a guest whose driver is not there yet
looks when it is. The same interrupt stands for another VM generation ID, which is an event like the others.

The tables are here and not in guest memory, of which nothing has to be set aside then. A cold device, called under the
GIL.
"""

from __future__ import annotations

from crackle.devices.state import HotPlugState
from crackle.kvm.bus import CONTINUE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 0x1000
EVENT = 0xFF0
"""Offset of the register; a table is shorter than that."""

GENERATION = 1
TABLE = 2


class HotPlug:
    """What the guest is still to be told. assert_line: sets the level of the interrupt's line."""

    def __init__(self, assert_line: Callable[[bool], None]) -> None:
        self._assert_line = assert_line
        self._events: list[bytes] = []
        self._table = b""
        self._arrived: dict[int, int] = {}
        self.given = 0

    def arrive(self, address: int, table: bytes) -> None:
        """Have the guest load the table of a device whose window is at `address`, after those before it."""
        self._arrived[address] = self.given
        self.given += 1
        self._tell(table)

    def depart(self, address: int, table: Callable[[int], bytes]) -> bool:
        """Have the guest load `table(number)` of the device that arrived there as that; False if none did.

        Or if it has been asked for: a table can be loaded once.
        """
        number = self._arrived.pop(address, None)
        if number is not None:
            self._tell(table(number))
        return number is not None

    def withdraw(self, address: int, table: Callable[[int], bytes]) -> None:
        """That device has gone: `table(number)`, which it arrived with, need not be loaded any more."""
        number = self._arrived.pop(address, None)
        if number is not None and (arrival := table(number)) in self._events:
            self._events.remove(arrival)

    def _tell(self, table: bytes) -> None:
        self._events.append(table)
        self._assert_line(True)

    def read(self, offset: int, size: int) -> int:
        """The next event, 0 for none; or of the table that the last one came with."""
        if offset != EVENT:
            return int.from_bytes(self._table[offset : offset + size], "little")
        if not self._events:
            self._assert_line(False)
            # Another thread may have added one meanwhile.
            if self._events:
                self._assert_line(True)
            return 0
        event = self._events.pop(0)
        if not event:
            return GENERATION
        self._table = event
        return TABLE

    def write(self, offset: int, size: int, value: int) -> int:
        """Nothing can be written."""
        return CONTINUE

    # -- saved state ---------------------------------------------------------------------------------------------

    def save(self) -> HotPlugState:
        """The machine is paused."""
        return HotPlugState(
            events=tuple(self._events), table=self._table, given=self.given, arrived=self._arrived.copy()
        )

    def restore(self, state: HotPlugState) -> None:
        """The reverse of `save`; and the generation ID is another one, of which the guest hears first.

        The interrupt controllers are there already.
        """
        self._events = [b"", *(event for event in state.events if event)]
        self._table, self.given, self._arrived = state.table, state.given, state.arrived.copy()
        self._assert_line(True)
