"""What `crackle.Snapshot`, `Pool` and `PageHandler` are as context managers."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Closing:
    """Is closed at the end of its block."""

    def close(self) -> None:
        """Idempotent."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
