"""Guest memory: regions around the MMIO gap, bounds-checked access, dirty tracking, and what backs it."""

from crackle.memory.guest import BACKINGS, GuestMemory, Region

__all__ = ["BACKINGS", "GuestMemory", "Region"]
