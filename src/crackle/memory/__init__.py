"""Guest memory: regions that come and go, bounds-checked access, dirty tracking, what backs it, and memory files."""

from crackle.memory.guest import GuestMemory
from crackle.memory.region import BACKINGS, Region, huge_pages_missing

__all__ = ["BACKINGS", "GuestMemory", "Region", "huge_pages_missing"]
