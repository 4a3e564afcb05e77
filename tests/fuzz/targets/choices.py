"""What the bytes of an input decide, taken from its beginning: to shorten or change an input changes little else.

An input that has ended gives zeros, and zero is always the harmless choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

WIDE = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 63,
    (1 << 64) - 1,
)
"""Numbers at which arithmetic goes wrong."""


class Choices:
    """`data`, read from the front."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def __bool__(self) -> bool:
        """Whether there is more."""
        return self.at < len(self.data)

    def byte(self) -> int:
        at = self.at
        self.at = at + 1
        return self.data[at] if at < len(self.data) else 0

    def number(self, size: int) -> int:
        """Of `size` bytes."""
        at = self.at
        self.at = at + size
        return int.from_bytes(self.data[at : at + size], "little")

    def bytes(self, size: int) -> bytes:
        """`size` bytes, fewer at the end."""
        at = self.at
        self.at = at + size
        return self.data[at : at + size]

    def below(self, limit: int) -> int:
        """0 to `limit` - 1, which is at most 65536."""
        return (self.byte() if limit <= 256 else self.number(2)) % limit

    def of(self, values: Sequence[T]) -> T:
        """One of up to 256."""
        return values[self.byte() % len(values)]

    def rarely(self) -> bool:
        """True for one byte in sixteen."""
        return self.byte() >= 0xF0

    def nearly(self, right: int, edges: Sequence[int] = WIDE) -> int:
        """`right` for most bytes, otherwise close to it, one of `edges`, or anything of 8 bytes."""
        kind = self.byte()
        if kind < 0xE0:
            return right
        if kind < 0xEC:
            return max(0, right + kind - 0xE6)
        if kind < 0xFA:
            return self.of(edges)
        return self.number(8)
