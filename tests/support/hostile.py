"""What guests that break every rule have in common: descriptors, rings and registers that are nearly right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from support.driver import STATUS, Bench, Ring

ENTRIES = 16

flags = st.sampled_from([0, 1, 2, 3, 2, 3, 4, 7, 0xFFFF])
indices = st.integers(0, 63).map(lambda n: n & 15 if n < 60 else (16, 255, 0x8000, 0xFFFF)[n & 3])
slots = st.integers(0, ENTRIES - 1)


def broken(
    queues: SearchStrategy[int], gpa: int, size: int, header: int, lengths: Sequence[int]
) -> SearchStrategy[tuple[str, Any, Any]]:
    """Steps for `HostileGuest.play`, over memory of `size` bytes at `gpa`, for a device whose chains begin with
    `header` bytes and are often of one of `lengths`.
    """
    end = gpa + size
    # Where a header, or a descriptor in an indirect table, just fits before the end, and one byte before that.
    last = [end - needed - more for needed in (header, 16) for more in (1, 0)]
    edges = [0, 1, gpa - 1, gpa, *last, end - 1, end, 1 << 32, (1 << 64) - 1]
    inside = st.integers(gpa, end - 64)
    descriptors = st.tuples(
        inside | inside | st.sampled_from(edges),
        st.integers(0, 80) | st.sampled_from([0, 1, *lengths, size, size + 1, 1 << 31, (1 << 32) - 1]),
        flags,
        indices,
    )
    return st.one_of(
        st.tuples(st.just("descriptor"), st.tuples(queues, slots), descriptors),
        st.tuples(st.just("indirect"), st.integers(0, 63), descriptors),
        st.tuples(st.just("offer"), queues, st.lists(indices, max_size=ENTRIES)),
        st.tuples(
            st.just("register"), st.integers(0, 0x45).map(lambda n: 4 * n), st.integers(0, (1 << 32) - 1)
        ),
        st.tuples(st.just("register"), st.just(STATUS), st.sampled_from([0, 1, 3, 11, 15, 128])),
    )


class HostileGuest(Bench):
    """A driver without manners, over memory that outlives it.

    tables: where it has its indirect tables.
    """

    rings: list[Ring]
    tables: int

    def close(self) -> None:
        self.io.close()
        self.device.close()

    def play(self, action: str, first: Any, second: Any) -> None:
        """One step of a script."""
        if action == "notify":
            self.notify(first)
        elif action == "descriptor":
            self.rings[first[0]].write_descriptor(first[1], *second)
        elif action == "indirect":
            self.rings[0].write_descriptor(first, *second, table=self.tables)
        elif action == "offer":
            self.rings[first].offer(*second)
        elif action == "register":
            self.registers[first] = second
        else:
            raise ValueError(action)
