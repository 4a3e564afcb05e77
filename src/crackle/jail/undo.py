"""What a refusal takes back."""

from __future__ import annotations

import contextlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Undo:
    """How to take back what was made, the last first. Owns the descriptors that this needs."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []
        self._fds: list[int] = []

    def hold(self, fd: int) -> int:
        """Keep a descriptor until `close`; the same."""
        self._fds.append(fd)
        return fd

    def push(self, call: Callable[[], object]) -> None:
        """Do that when all is taken back."""
        self._calls.append(call)

    def run(self) -> None:
        """Take everything back; what cannot be is left."""
        while self._calls:
            with contextlib.suppress(OSError):
                self._calls.pop()()
        self.close()

    def close(self) -> None:
        """There is no way back any more."""
        self._calls.clear()
        while self._fds:
            os.close(self._fds.pop())
