"""Where lines go: a file, a named pipe or standard output, none of which may ever make the microVM wait."""

from __future__ import annotations

import os

from crackle.errors import ConfigError, os_reason
from crackle.runtime.stream import OWN, borrow, put

# How it begins to say that there can be no metrics file.
BAD_INPUT = "Cannot initialize the metrics system due to bad user input"


class Sink:
    """Takes whole lines.

    A line that does not fit now is refused; one that fits in part is finished by a later write.

    A descriptor handed to the constructor is only borrowed: other processes may share it, and its mode stays as it is.
    """

    __slots__ = ("_borrowed", "_fd", "_how", "_rest")

    def __init__(self, fd: int) -> None:
        self._borrowed = fd
        self._fd = -1
        self._how = OWN
        self._rest = b""

    @classmethod
    def open(cls, path: str, problem: str) -> Sink:
        """Open ``path`` for appending, made if missing; a named pipe needs no reader yet.

        Raises ConfigError, which begins with ``problem``.
        """
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            sink = cls(-1)
            sink._fd = os.open(path, flags, 0o644)
        except OSError as error:
            raise ConfigError(f"{problem}: {os_reason(error)}: {path}") from None
        except ValueError as error:
            raise ConfigError(f"{problem}: {os_reason(error)}: {path!r}") from None
        return sink

    def write(self, line: bytes) -> bool:
        """True if ``line`` was taken.

        False if it is lost because its reader is behind or the device failed.
        """
        try:
            if self._fd < 0:
                self._fd, self._how = borrow(self._borrowed, os.O_WRONLY)
            if self._rest:
                self._rest = self._rest[put(self._fd, self._how, self._rest) :]
                if self._rest:
                    return False
            taken = put(self._fd, self._how, line)
        except OSError:
            return False
        if not taken:
            return False
        self._rest = line[taken:]
        return True

    @property
    def unwaiting(self) -> int:
        """The descriptor, opened now, for whoever can do no more than write to it; -1 where that may wait."""
        if self._fd < 0:
            try:
                self._fd, self._how = borrow(self._borrowed, os.O_WRONLY)
            except OSError:
                return -1
        return self._fd if self._how == OWN else -1

    @property
    def file(self) -> int:
        """The descriptor of what `open` opened; -1 for a borrowed one."""
        return self._fd if self._borrowed < 0 else -1

    def inherited(self) -> Sink:
        """The forked process's: of a line that the other is in the middle of it has no part."""
        if self._borrowed >= 0:
            self.close()
        sink = Sink(self._borrowed)
        sink._fd = self._fd
        return sink

    def close(self) -> None:
        """Close what is our own; idempotent. A borrowed descriptor can be written to again."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
