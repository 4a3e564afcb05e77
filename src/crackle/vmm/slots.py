"""KVM's memory slots, which follow the regions of guest memory as they come and go."""

from __future__ import annotations

from crackle.kvm import MEM_LOG_DIRTY_PAGES, MEM_READONLY, Vm
from crackle.memory import GuestMemory, Region


class MemorySlots:
    """Gives each region of `memory` a slot of `vm` for as long as it is there.

    log_dirty_pages: let KVM note which pages vCPUs write. The first that listens, so that a region is in the guest's
    address space before any device hears of it, and leaves it after all of them. KvmError when KVM refuses a region.
    """

    def __init__(self, vm: Vm, memory: GuestMemory, *, log_dirty_pages: bool = False) -> None:
        self._vm, self._memory = vm, memory
        self._flags = MEM_LOG_DIRTY_PAGES if log_dirty_pages else 0
        self._slots: dict[int, int] = {}
        for region in memory.regions:
            self.region_added(region)
        memory.add_listener(self)

    def slot(self, region: Region) -> int:
        """The number of the slot of `region`; KeyError when it has none."""
        return self._slots[region.gpa]

    def region_added(self, region: Region) -> None:
        """It is in the guest's address space when this returns."""
        self._give(region.gpa, region.size, region.hva, self._flags)

    def region_removed(self, region: Region) -> None:
        """An access of the guest finds nothing there when this returns."""
        self.remove(region.gpa)

    def add(self, gpa: int, size: int, hva: int, *, read_only: bool) -> None:
        """Let the guest have what is no RAM of its own. An access that it may not make finds no device there."""
        self._give(gpa, size, hva, MEM_READONLY if read_only else 0)

    def remove(self, gpa: int) -> None:
        """The reverse; KeyError when there is nothing."""
        self._vm.set_user_memory_region(self._slots[gpa], gpa, 0, 0)
        del self._slots[gpa]

    def _give(self, gpa: int, size: int, hva: int, flags: int) -> None:
        """The lowest free slot."""
        slot = next(number for number in range(len(self._slots) + 1) if number not in self._slots.values())
        self._vm.set_user_memory_region(slot, gpa, size, hva, flags)
        self._slots[gpa] = slot

    def release(self) -> None:
        """Give all slots back, of a machine that has not run yet."""
        self._memory.remove_listener(self)
        for region in self._memory.regions:
            self.region_removed(region)
