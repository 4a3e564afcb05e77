"""Moves bytes between this process's standard streams and the emulated host's ports."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import time

_CHUNK = 1 << 16
_NUDGE_S = 1.0


class NotUpError(Exception):
    """The emulated host did not say in time that it is up. The command has not run."""


class Output:
    """One output stream of the command: passes on to `target` everything between two tokens."""

    def __init__(self, source: socket.socket, target: int, token: bytes) -> None:
        self.source = source
        self.begun = False
        self.ended = False
        self._target = target
        self._token = token
        self._held = b""

    def receive(self) -> None:
        """Take what has arrived, holding back a tail that may be the beginning of the token."""
        chunk = self.source.recv(_CHUNK)
        data = self._held + chunk
        if not self.begun and chunk:
            if len(data) < len(self._token):
                self._held = data
                return
            self.begun = True
            data = data[len(self._token) :]
        self._held = b""
        if data.endswith(self._token):
            self.ended = True
            data = data[: -len(self._token)]
        elif chunk:
            keep = next((n for n in range(len(self._token) - 1, 0, -1) if data.endswith(self._token[:n])), 0)
            data, self._held = data[: len(data) - keep], data[len(data) - keep :]
        else:
            self.ended = True
        _write(self._target, data)


class Input:
    """The command's standard input: reads from `source` no faster than the other side takes it."""

    def __init__(self, source: int, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.pending = b""
        self.ended = False
        target.setblocking(False)

    def read(self) -> None:
        """Take what `source` has; at its end, say so to the other side."""
        try:
            self.pending = os.read(self.source, _CHUNK)
        except OSError:
            self.pending = b""
        if not self.pending:
            self.ended = True
            self.target.shutdown(socket.SHUT_WR)

    def send(self) -> None:
        """Pass on what has been read."""
        try:
            self.pending = self.pending[self.target.send(self.pending) :]
        except BlockingIOError:
            return
        except OSError:
            self.pending, self.ended = b"", True


class Tail:
    """The last few KiB of what is of interest only when things go wrong; `copy`: a file for all of it."""

    def __init__(self, source: socket.socket, copy: int | None = None, size: int = 8192) -> None:
        self.source = source
        self.ended = False
        self.data = b""
        self._copy = copy
        self._size = size

    def receive(self) -> None:
        """Take what has arrived, forgetting the oldest."""
        chunk = self.source.recv(_CHUNK)
        if self._copy is not None:
            _write(self._copy, chunk)
        self.ended = not chunk
        self.data = (self.data + chunk)[-self._size :]


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


class Patience:
    """So many seconds from now, but for those in which a process waited for a processor of this machine's.

    tasks: its threads, /proc/PID/task.
    """

    def __init__(self, tasks: str, seconds: float) -> None:
        self._tasks = tasks
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """How many of them are left."""
        return self._end + self._waited() - time.monotonic()

    def _waited(self) -> float:
        """What the thread that waited longest has waited: the emulated processor, where others are busy."""
        longest = 0
        with contextlib.suppress(OSError):  # it has ended, or the kernel does not tell
            for task in os.listdir(self._tasks):
                with contextlib.suppress(OSError), open(f"{self._tasks}/{task}/schedstat") as file:
                    longest = max(longest, int(file.read().split()[1]))
        return longest / 1e9


def relay(
    stdin: Input,
    outputs: list[Output],
    tails: list[Tail],
    process: int,
    patience: Patience,
    nudged: socket.socket | None = None,
) -> None:
    """Move bytes until all `outputs` have ended or the process behind the pidfd `process` has.

    NotUpError when they have not begun before `patience` is at its end; nothing of `stdin` is read before. `nudged` is
    sent a NUL byte every second.
    """
    nudge_at = time.monotonic() + _NUDGE_S
    while True:
        up = all(output.begun for output in outputs)
        poll = select.poll()
        poll.register(process, select.POLLIN)
        readers: dict[int, Output | Tail] = {}
        sources: list[Output | Tail] = [*outputs, *tails]
        for reader in sources:
            if not reader.ended:
                readers[reader.source.fileno()] = reader
                poll.register(reader.source, select.POLLIN)
        if stdin.pending:
            poll.register(stdin.target, select.POLLOUT)
        elif up and not stdin.ended:
            poll.register(stdin.source, select.POLLIN)
        wait = min(nudge_at - time.monotonic() if nudged else math.inf, math.inf if up else patience.left())
        events = dict(poll.poll(None if wait == math.inf else max(0.0, wait) * 1000))
        if nudged and time.monotonic() >= nudge_at:
            nudge_at = time.monotonic() + _NUDGE_S
            with contextlib.suppress(OSError):
                nudged.send(b"\0", socket.MSG_DONTWAIT)
        if not up and patience.left() <= 0:
            raise NotUpError
        for fd, reader in readers.items():
            if fd in events:
                reader.receive()
        if all(output.ended for output in outputs):
            return
        if stdin.pending and stdin.target.fileno() in events:
            stdin.send()
        elif not stdin.pending and not stdin.ended and stdin.source in events:
            stdin.read()
        if process in events and not any(fd in events for fd in readers):
            return
