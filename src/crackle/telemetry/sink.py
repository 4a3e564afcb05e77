"""Where lines go: a file, a named pipe or standard output, none of which may ever make the microVM wait."""

from __future__ import annotations

import os
import select

from crackle.errors import ConfigError, os_reason

# What a pipe that polls writable is sure to take at once (pipe(7), PIPE_BUF).
_PIPE_BUF = 4096


class Sink:
    """Takes whole lines.

    A line that does not fit now is refused; one that fits in part is finished by a later write.

    Owns its descriptor when made by :meth:`open`; a descriptor handed to the constructor is only borrowed,
    and keeps its blocking mode because other processes may share it.
    """

    __slots__ = ("_borrowed", "_fd", "_rest")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self._borrowed: select.poll | None = select.poll()
        self._borrowed.register(fd, select.POLLOUT)

    @classmethod
    def open(cls, path: str, problem: str) -> Sink:
        """Open ``path`` for appending, made if missing; a named pipe needs no reader yet.

        Raises ConfigError, which begins with ``problem``.
        """
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            sink = cls(os.open(path, flags, 0o644))
        except OSError as error:
            raise ConfigError(f"{problem}: {os_reason(error)}: {path}") from None
        except ValueError as error:
            raise ConfigError(f"{problem}: {error}") from None
        sink._borrowed = None
        return sink

    def write(self, line: bytes) -> bool:
        """True if ``line`` was taken.

        False if it is lost because its reader is behind or the device failed.
        """
        try:
            if self._rest:
                self._rest = self._rest[self._put(self._rest) :]
                if self._rest:
                    return False
            taken = self._put(line)
        except OSError:
            return False
        if not taken:
            return False
        self._rest = line[taken:]
        return True

    def _put(self, data: bytes) -> int:
        """The number of bytes of ``data`` that were written without waiting."""
        if self._borrowed is None:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:
                return 0
        taken = 0
        while taken < len(data):
            ready = self._borrowed.poll(0)
            if not ready or not ready[0][1] & select.POLLOUT:
                break
            taken += os.write(self._fd, data[taken : taken + _PIPE_BUF])
        return taken

    def close(self) -> None:
        """Close an owned descriptor; idempotent."""
        if self._borrowed is None and self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
