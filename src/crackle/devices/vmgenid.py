"""VM generation ID: how a guest learns that it is a copy (Microsoft, "Virtual Machine Generation ID", version 1.0).

Sixteen random bytes in guest memory, other ones each time that a saved or forked microVM goes on; an interrupt tells of
that. Linux's driver is CONFIG_VMGENID: it reseeds the kernel's random numbers. The guest learns from its tables where
the bytes are, and which interrupt it is.
"""

from __future__ import annotations

import os

from crackle.devices.state import VmGenIdState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.memory import GuestMemory

SIZE = 16


class VmGenId:
    """The generation ID at guest physical `address`, a multiple of 8. interrupt_fd: an eventfd, the caller's."""

    def __init__(self, memory: GuestMemory, address: int, interrupt_fd: int) -> None:
        self._memory = memory
        self._interrupt_fd = interrupt_fd
        self.address = address

    def start(self) -> None:
        """Of a guest that begins."""
        self._memory.write(self.address, os.urandom(SIZE))

    def save(self) -> VmGenIdState:
        """The machine is paused."""
        return VmGenIdState(address=self.address)

    def restore(self, state: VmGenIdState) -> None:
        """Another one, of which the guest hears first when it goes on. The interrupt controllers are there already."""
        self.address = state.address
        self.start()
        os.eventfd_write(self._interrupt_fd, 1)
