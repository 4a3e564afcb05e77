"""Devices that come while the guest runs: how its ACPI interpreter gets to know them.

Two registers, in a page that only the DSDT knows of. Reading EVENT, one byte, tells what has happened that the guest
does not know yet, and takes it off the list; when that is a device, there is from then on a table at offset 0 that
declares it (an SSDT, ACPI 6.5, section 5.2.11.2), and the guest loads it. An interrupt of the generic event device has
it look. The same interrupt stands for another VM generation ID, which is an event like the others.

The tables are here and not in guest memory, of which nothing has to be set aside then. A cold device, called under the
GIL.
"""

from __future__ import annotations

import os

from crackle.devices.state import HotPlugState
from crackle.kvm.bus import CONTINUE

SIZE = 0x1000
EVENT = 0xFF0
"""Offset of the register; a table is shorter than that."""

GENERATION = 1
TABLE = 2


class HotPlug:
    """What the guest is still to be told. interrupt_fd: an eventfd, the caller's."""

    def __init__(self, interrupt_fd: int) -> None:
        self._interrupt_fd = interrupt_fd
        self._events: list[bytes] = []
        self._table = b""
        self.given = 0

    def announce(self, table: bytes) -> None:
        """Have the guest load `table`, after those before it."""
        self._events.append(table)
        self.given += 1
        os.eventfd_write(self._interrupt_fd, 1)

    def read(self, offset: int, size: int) -> int:
        """The next event, 0 for none; or of the table that the last one came with."""
        if offset != EVENT:
            return int.from_bytes(self._table[offset : offset + size], "little")
        if not self._events:
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
        return HotPlugState(events=tuple(self._events), table=self._table, given=self.given)

    def restore(self, state: HotPlugState) -> None:
        """The reverse of `save`; and the generation ID is another one, of which the guest hears first.

        Who makes that raises the interrupt.
        """
        self._events = [b"", *(event for event in state.events if event)]
        self._table, self.given = state.table, state.given
