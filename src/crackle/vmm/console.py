"""The guest's serial console, held by a program: what came out of it so far, and something to type into it.

Owns two pipes. One thread empties those of all consoles, while there are any, so that a guest that writes much never
waits for its reader. Nothing waits with the lock held.
"""

from __future__ import annotations

import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable

from crackle.errors import ConfigError, CrackleError, StateError

DEFAULT_LIMIT = 4 << 20
"""Bytes of output that a console keeps."""

_CHUNK = 1 << 16
_CHUNKS = 16  # read in one go, before others get the lock
_TAIL = 2000  # bytes of output shown in a message
_LONG = 10.0  # seconds of silence after which it is asked whether the host is to blame

# A match is looked for at once where it begins at most so many bytes before what is new.
_WINDOW = 1024


class Match:
    """What `Console.expect` found, and what came before it. `match[0]` is all of it, as bytes.

    A regular expression's groups are had as from `re.Match`: by number or name, `group`, `groups`, `groupdict`.
    """

    __slots__ = ("_groups", "_names", "before")

    def __init__(self, found: re.Match[bytes], before: bytes) -> None:
        self.before = before
        """The output between the last match, or the start, and this one; as much of it as was kept."""
        # Copies: what was searched goes on growing.
        self._groups = tuple(None if part is None else bytes(part) for part in (found[0], *found.groups()))
        self._names = found.re.groupindex

    def __getitem__(self, group: int | str) -> bytes:
        """The bytes of a group, which for one that took no part are none. IndexError when there is no such group."""
        part = self.group(group)
        return b"" if part is None else part

    def group(self, group: int | str = 0) -> bytes | None:
        """The bytes of a group, or None when it took no part. IndexError when there is no such group."""
        number = self._names.get(group, -1) if isinstance(group, str) else group
        if not 0 <= number < len(self._groups):
            raise IndexError(f"no such group: {group!r}")
        return self._groups[number]

    def groups(self) -> tuple[bytes | None, ...]:
        """All groups but the whole."""
        return self._groups[1:]

    def groupdict(self) -> dict[str, bytes | None]:
        """The groups that have names."""
        return {name: self._groups[number] for name, number in self._names.items()}

    def __repr__(self) -> str:
        return f"<crackle console match {self[0]!r}>"


class Console:
    """The last `limit` bytes of output are kept; `expect` goes on where the one before it found something.

    `guest_in` and `guest_out` are the machine's ends of the pipes.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigError(f"a console keeps at least 1 byte of output, not {limit!r}")
        self._limit = limit
        self.guest_in, self._input = os.pipe2(os.O_CLOEXEC)
        self._output, self.guest_out = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._output, False)
        os.set_blocking(self._input, False)
        # Readable once `close` has begun.
        self._gone = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._exit = -1
        self._why_ended: Callable[[], CrackleError | None] | None = None
        # All that is below is guarded by this lock; places in the output are counted from its start.
        self._changed = threading.Condition()
        self._kept = bytearray()
        self._dropped = 0
        self._position = 0
        self._end: CrackleError | None = None
        self._closing = self._closed = False
        self._writers = 0
        self._events = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._events.register(self._output, select.EPOLLIN)
        self._events.register(self._gone, select.EPOLLIN)
        # What a writer waits for: room, or that there will be none.
        self._room = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._room.register(self._input, select.EPOLLOUT)
        self._room.register(self._gone, select.EPOLLIN)
        _reader.add(self, self._events.fileno())

    def watch(self, exit_fd: int, why_ended: Callable[[], CrackleError | None]) -> None:
        """From now on the guest ends when `exit_fd` is readable; `why_ended` then says why, as the error to raise."""
        self._why_ended = why_ended
        self._exit = os.dup(exit_fd)
        for events in (self._events, self._room):
            events.register(self._exit, select.EPOLLIN)

    # -- the thread ----------------------------------------------------------------------------------------------

    def serve(self) -> bool:
        """Do what there is to do; False when it was the last time."""
        ready = {fd for fd, _ in self._events.poll(0)}
        with self._changed:
            if self._exit in ready:
                self._note_end()
            self._take(every=self._closing)
            return not self._closing

    def served(self) -> None:
        """The thread looks no more at the descriptors."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take(self, every: bool = False) -> None:
        """Read what there is, or a good part of it; the lock is held."""
        chunks = 0
        while self._output >= 0 and (every or chunks < _CHUNKS):
            try:
                data = os.read(self._output, _CHUNK)
            except BlockingIOError:
                return
            if not data:
                return
            chunks += 1
            self._kept += data
            excess = len(self._kept) - self._limit
            if excess > 0:
                del self._kept[:excess]
                self._dropped += excess
            self._changed.notify_all()

    def _note_end(self) -> None:
        """The guest has ended, and all that it wrote is in the pipe. The lock is held."""
        if self._end is not None or self._why_ended is None:
            return
        self._take(every=True)
        try:
            self._end = self._why_ended()
        except CrackleError as error:
            self._end = error
        if self._end is None:
            self._end = CrackleError("the guest ended")
        self._events.unregister(self._exit)
        self._changed.notify_all()

    # -- output --------------------------------------------------------------------------------------------------

    @property
    def output(self) -> bytes:
        """What the guest has written since it was started: the last `limit` bytes of it."""
        with self._changed:
            self._take()
            return bytes(self._kept)

    @property
    def text(self) -> str:
        """`output` as text; bytes that are no UTF-8 are replaced."""
        return self.output.decode(errors="replace")

    @property
    def dropped(self) -> int:
        """Bytes of output, its first, that are not kept any more."""
        with self._changed:
            return self._dropped

    def expect(self, pattern: str | bytes, timeout: float = 30.0) -> Match:
        """Wait until the regular expression matches what came after the last match, and return what it found.

        Look-behind and `^` see what was kept of the output before that; `$` is the end of what has come so far, so a
        match may be longer when more has come. What is searched already is not searched again for each new byte: a
        match that begins more than 1 KiB before what is new may be noticed later, at the latest when as much again has
        come, the time is over, or the guest has ended. (What an expression that begins with `(?s).*?` would collect is
        in `before`, at no cost.)

        Raises, with the last lines of output: GuestError, with the registers, as soon as the guest has failed;
        StateError when the microVM is stopped; CrackleError when the guest has ended otherwise, or after `timeout`
        seconds.
        """
        expression = re.compile(pattern.encode() if isinstance(pattern, str) else pattern)
        deadline = time.monotonic() + timeout
        looked = whole = -1
        with self._changed:
            self._take()
            while True:
                left = deadline - time.monotonic()
                last = left <= 0 or self._end is not None or self._closed
                end = self._dropped + len(self._kept)
                if end > looked or (last and end > whole):
                    start = max(self._position, self._dropped)
                    thorough = last or whole < 0 or end - start >= 2 * (whole - start)
                    found = None
                    if not thorough:
                        near = self._near(start, looked) - self._dropped
                        # What is found near the end may begin before that.
                        thorough = expression.search(self._kept, near) is not None
                    if thorough:
                        found = expression.search(self._kept, start - self._dropped)
                    if found is not None:
                        before = bytes(self._kept[start - self._dropped : found.start()])
                        self._position = self._dropped + found.end()
                        return Match(found, before)
                    looked, whole = end, end if thorough else whole
                if last:
                    break
                self._changed.wait(left)
            tail = bytes(self._kept[-_TAIL:]).decode(errors="replace")
            ended = self._end
            if ended is None and self._closed:
                ended = StateError("the microVM has been stopped")
        kind, why = (
            (CrackleError, f"nothing in {timeout:g} s") if ended is None else (type(ended), str(ended))
        )
        if ended is None and timeout >= _LONG:
            from crackle.vmm.probe import why_no_linux

            why = ". ".join(filter(None, (why, why_no_linux())))
        raise kind(f"the console did not show {pattern!r}: {why}. It ends with:\n{tail}")

    def _near(self, start: int, looked: int) -> int:
        """Where a search begins that `looked` has been reached before: at the start of a line if there is one."""
        place = looked - _WINDOW
        if place <= start:
            return start
        line = self._kept.find(b"\n", place - self._dropped, looked - self._dropped)
        return place if line < 0 else line + 1 + self._dropped

    # -- input ---------------------------------------------------------------------------------------------------

    def write(self, data: bytes | str, timeout: float | None = None) -> None:
        """Type `data` into the guest. Waits while more than a pipe's room is unread.

        StateError as soon as the guest has ended or the microVM is stopped. TimeoutError after `timeout` seconds.
        """
        view = memoryview(data.encode() if isinstance(data, str) else data)
        deadline = None if timeout is None else time.monotonic() + timeout
        size = len(view)
        with self._changed:
            self._check_open()
            self._writers += 1
        try:
            while view:
                try:
                    view = view[os.write(self._input, view) :]
                    continue
                except BlockingIOError:
                    pass
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(
                        f"the guest has taken {size - len(view)} of {size} bytes in {timeout:g} s"
                    )
                self._room.poll(left)
                with self._changed:
                    self._check_open()
        finally:
            with self._changed:
                self._writers -= 1
                self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closing:
            raise StateError("the guest's console is closed: the microVM has stopped")
        self._look_for_end()
        if self._end is not None:
            raise StateError(f"nobody reads the guest's console: {self._end}")

    def _look_for_end(self) -> None:
        if self._exit >= 0 and self._end is None:
            poll = select.poll()
            poll.register(self._exit, select.POLLIN)
            if poll.poll(0):
                self._note_end()

    # -- the end -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Note how the guest has ended, if it has: before its machine goes."""
        with self._changed:
            if not self._closing:
                self._look_for_end()

    def disown(self) -> None:
        """In a forked child, where there is no thread and others may have had the lock: close the copies."""
        self._changed = threading.Condition()
        self._closing = self._closed = True
        self._close_descriptors()

    def close(self) -> None:
        """Close the pipes, after the machine is stopped; the output stays. Idempotent."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        os.eventfd_write(self._gone, 1)
        with self._changed:
            while self._writers or not self._closed:
                self._changed.wait()
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        for events in (self._events, self._room):
            events.close()
        for fd in (self.guest_in, self.guest_out, self._input, self._output, self._gone, self._exit):
            if fd >= 0:
                os.close(fd)
        self.guest_in = self.guest_out = self._input = self._output = self._gone = self._exit = -1


class _Reader:
    """The thread of all consoles, which ends with the last of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._consoles: dict[int, Console] = {}
        self._ready: select.epoll | None = None

    def add(self, console: Console, fd: int) -> None:
        """Serve a console whenever `fd` is readable, until it has been served for the last time."""
        with self._lock:
            starts = self._ready is None
            ready = self._ready = self._ready or select.epoll(flags=select.EPOLL_CLOEXEC)
            try:
                ready.register(fd, select.EPOLLIN)
                self._consoles[fd] = console
                if starts:
                    threading.Thread(target=self._run, args=(ready,), name="console", daemon=True).start()
            except BaseException:
                self._consoles.pop(fd, None)
                if starts:
                    ready.close()
                    self._ready = None
                raise

    def _run(self, ready: select.epoll) -> None:
        while True:
            for fd, _ in ready.poll():
                console = self._consoles[fd]
                try:
                    if console.serve():
                        continue
                except Exception as error:
                    # It is this one's end, and not that of the others.
                    sys.excepthook(type(error), error, error.__traceback__)
                with self._lock:
                    del self._consoles[fd]
                    ready.unregister(fd)
                    last = not self._consoles
                    if last:
                        ready.close()
                        self._ready = None
                console.served()
                if last:
                    return

    def disown(self) -> None:
        """In a forked child, which has not the thread."""
        self._lock = threading.Lock()
        self._consoles = {}
        ready, self._ready = self._ready, None
        if ready is not None:
            ready.close()


_reader = _Reader()
os.register_at_fork(after_in_child=_reader.disown)
