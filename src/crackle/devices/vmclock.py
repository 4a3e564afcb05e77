"""VMClock: how a guest learns that its clock was disturbed and that it is a copy.

A page in guest memory (<linux/vmclock-abi.h>, version 1) with a marker that is another one whenever the time stamp
counter may no longer be what it was, and a counter of how often the guest was restored or forked. An interrupt tells of
a change. Linux's driver is CONFIG_PTP_1588_CLOCK_VMCLOCK (6.13): programs map /dev/vmclock0 and compare. How
the counter and the time of day belong together is not said here: guests have kvmclock for that.
"""

from __future__ import annotations

import os
from struct import Struct

from crackle.devices.state import VmClockState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.memory import GuestMemory

SIZE = 0x1000

_MAGIC = b"VCLK"
_VERSION = 1
_NO_COUNTER = 0xFF
_HAS_GENERATION = 1 << 8
_NOTIFIES = 1 << 9

# struct vmclock_abi: constants; sequence, marker, flags; a clock that is not there, its status 0, unknown; generation.
_PAGE = Struct("<4sIHBB IQQ 8x 64x Q")


class VmClock:
    """The page at guest physical `address`. interrupt_fd: an eventfd, the caller's."""

    def __init__(self, memory: GuestMemory, address: int, interrupt_fd: int) -> None:
        self._memory = memory
        self._interrupt_fd = interrupt_fd
        self._state = VmClockState(address=address)

    def start(self) -> None:
        """Of a guest that begins."""
        state = self._state
        page = _PAGE.pack(
            *(_MAGIC, SIZE, _VERSION, _NO_COUNTER, 0),
            *(state.sequence, state.marker, _HAS_GENERATION | _NOTIFIES, state.generation),
        )
        self._memory.write(state.address, page.ljust(SIZE, b"\0"))

    def save(self) -> VmClockState:
        """The machine is paused."""
        return self._state

    def restore(self, state: VmClockState) -> None:
        """As `VmGenId.restore`. The sequence is even while the rest may be read."""
        self._state = VmClockState(
            address=state.address,
            sequence=state.sequence + 2 & 0xFFFF_FFFE,
            marker=state.marker + 1 & 0xFFFF_FFFF_FFFF_FFFF,
            generation=state.generation + 1 & 0xFFFF_FFFF_FFFF_FFFF,
        )
        self.start()
        os.eventfd_write(self._interrupt_fd, 1)
