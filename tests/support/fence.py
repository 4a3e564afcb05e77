"""Guest memory between two fences: under AddressSanitizer, touching a byte beside it ends the process."""

from __future__ import annotations

import ctypes
import os
from itertools import pairwise

from crackle.memory import GuestMemory

SANITIZED = "CRACKLE_ASAN" in os.environ
"""The tests run under AddressSanitizer, which `tests/fuzz/asan.py` sets up."""


def poison(address: int, size: int) -> None:
    """Forbid every access to this memory."""
    ctypes.CDLL(None).__asan_poison_memory_region(ctypes.c_void_p(address), ctypes.c_size_t(size))


def unpoison(address: int, size: int) -> None:
    """Allow it again."""
    ctypes.CDLL(None).__asan_unpoison_memory_region(ctypes.c_void_p(address), ctypes.c_size_t(size))


class Fenced:
    """`memory`, one region of `size` bytes from `gpa`, whose neighbours in this process are poisoned.

    Without AddressSanitizer it is only memory.
    """

    def __init__(self, gpa: int, size: int) -> None:
        self._others: list[GuestMemory] = []
        self._fences: list[tuple[int, int]] = []
        self.memory = GuestMemory([(gpa, size)])
        if not SANITIZED:
            return
        # The kernel puts mappings one beside the other once the holes are filled.
        found = [self.memory]
        while not (neighbours := _three_in_a_row(found)):
            found.append(GuestMemory([(gpa, size)]))
            assert len(found) < 1000, "no three mappings side by side"
        before, self.memory, after = neighbours
        self._others = [memory for memory in found if memory is not self.memory]
        for memory in (before, after):
            self._fences.append((memory.regions[0].hva, size))
            poison(*self._fences[-1])

    def __del__(self) -> None:
        # Whatever is mapped there next must be usable.
        self._lift()

    def _lift(self) -> None:
        for fence in self._fences:
            unpoison(*fence)
        self._fences.clear()

    def close(self) -> None:
        self._lift()
        for memory in (self.memory, *self._others):
            memory.close()


def _three_in_a_row(found: list[GuestMemory]) -> tuple[GuestMemory, GuestMemory, GuestMemory] | None:
    placed = sorted(found, key=lambda memory: memory.regions[0].hva)
    adjacent = [a.regions[0].hva + a.size == b.regions[0].hva for a, b in pairwise(placed)]
    for i, (left, right) in enumerate(pairwise(adjacent)):
        if left and right:
            return placed[i], placed[i + 1], placed[i + 2]
    return None
