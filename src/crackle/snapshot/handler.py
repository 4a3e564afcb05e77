"""A page-fault handler for the microVMs that go on from one snapshot: `crackle snapshot serve | warm`, `PageHandler`.

Whoever loads the snapshot with this handler's socket (`crackle.snapshot.handover` has the protocol) gets its memory
from here, on a thread of its own. What the first of them wants in its first seconds is noted beside the memory file,
and read ahead for the others, in that order.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import sys
import time
from _socket import AF_UNIX, CMSG_SPACE, MSG_CMSG_CLOEXEC, SHUT_RDWR, SOCK_CLOEXEC, SOCK_STREAM, socket
from functools import partial
from threading import Condition

import msgspec

from crackle.errors import ConfigError, KvmError, os_reason, step
from crackle.memory.pager import WINDOW, Pager
from crackle.runtime.channel import descriptors
from crackle.runtime.threads import Thread
from crackle.snapshot import workingset
from crackle.snapshot.handover import Mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds from a microVM's beginning in which what it wants is noted.
RECORDED_S = 10.0
# Seconds that whoever connects may take to hand its memory over.
HANDOVER_S = 10.0
_BACKLOG = 128
_MESSAGE_SIZE = 65536
_PAGE_SIZES = frozenset((4096, 2 << 20, 1 << 30))
# Why nobody can be accepted now, and somebody else later; how many seconds later.
_PASSING = frozenset((errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_PAUSE_S = 0.1


def listen(path: str) -> socket:
    """The socket at which a handler listens; ConfigError when it cannot be had."""
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        with step("Cannot listen", path):
            listener.bind(path)
            listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


class Handler:
    """Serves the memory file at `memory_path` to whoever connects to `listener`, which is its own, until `close`.

    record: note what the next microVM wants, whatever was noted before. seconds: how long what is wanted is noted,
    None for as long as the microVM lives. report: takes what is to be told. ConfigError when there is no such file.
    """

    def __init__(
        self,
        memory_path: str,
        listener: socket,
        report: Callable[[str], None],
        *,
        record: bool = False,
        seconds: float | None = RECORDED_S,
    ) -> None:
        self._memory_path = memory_path
        self._listener = listener
        self._report = report
        self._record = record
        self._seconds = -1.0 if seconds is None else seconds
        self._served = 0
        self._changed = Condition()
        self._fd = -1
        try:
            self._fd = opened(memory_path)
        except BaseException:
            listener.close()
            raise

    def serve(self, until: int = -1) -> None:
        """Serve whoever connects, all at once, until that descriptor is readable, or an exception ends it.

        Where one more cannot be served that is told, and those that are go on.
        """
        refused = ""
        poll = select.poll()
        poll.register(self._listener.fileno(), select.POLLIN)
        if until >= 0:
            poll.register(until, select.POLLIN)
        while all(fd != until for fd, _ in poll.poll()):
            try:
                self._begin(self._accept())
            except (OSError, KvmError) as error:
                if isinstance(error, OSError) and error.errno not in _PASSING:
                    raise
                reason = os_reason(error) if isinstance(error, OSError) else str(error)
                if reason != refused:
                    self._report(f"No other microVM is served for now: {reason}")
                refused = reason
                time.sleep(_PAUSE_S)
            else:
                refused = ""

    def _begin(self, peer: socket) -> None:
        with self._changed:
            self._served += 1
        try:
            Thread("faults", partial(self._attend, peer))
        except BaseException:
            self._is_gone()
            peer.close()
            raise

    def _is_gone(self) -> None:
        with self._changed:
            self._served -= 1
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until all who are served are gone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._served)

    def serve_one(self) -> int:
        """Serve the next microVM until it is gone: bytes of the memory file that were noted for the others.

        OSError, or ConfigError, when it cannot be served, or they cannot be noted; and once there is no listener.
        """
        return self._serve(self._accept())

    def _accept(self) -> socket:
        fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        return socket(fileno=fd)

    def _attend(self, peer: socket) -> None:
        """On a thread of its own: give one microVM its memory."""
        try:
            self._serve(peer)
        except (ConfigError, OSError, ValueError) as error:
            reason = os_reason(error) if isinstance(error, OSError) else str(error)
            self._report(f"A microVM is not served any more: {reason}")
        finally:
            self._is_gone()

    def _serve(self, peer: socket) -> int:
        fault = file = -1
        try:
            mappings, fault = handed_over(peer)
            # Its own, which stays open when nobody else is served any more.
            file = os.dup(self._fd)
            return self._page(mappings, fault, peer, file)
        finally:
            for fd in (fault, file):
                if fd >= 0:
                    os.close(fd)
            peer.close()

    def _page(self, mappings: list[Mapping], fault: int, peer: socket, file: int) -> int:
        page_size = mappings[0].page_size
        window = max(WINDOW, page_size)
        record, self._record = self._record, False
        wanted = [] if record else workingset.read(self._memory_path, file, window)
        ranges = [(each.base_host_virt_addr, each.size, each.offset) for each in mappings]
        pager = Pager(fault, peer.fileno(), file, ranges, page_size, wanted)
        gone = pager.run(-1.0 if wanted else self._seconds)
        noted = [] if wanted else pager.asked
        if noted:
            self._note(file, window, noted)
        if not gone:
            pager.run()
        return len(noted) * window

    def _note(self, file: int, window: int, noted: list[int]) -> None:
        path = workingset.path_beside(self._memory_path)
        try:
            workingset.write(self._memory_path, file, window, noted)
        except OSError as error:
            # The others wait longer for their memory, and no more.
            self._report(f"Cannot note what a microVM wants: {os_reason(error)}: {path}")

    def close(self) -> None:
        """Listen no more. Who is served, is so for as long as the process lives. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            # Whoever waits for a microVM on another thread does so no more.
            with contextlib.suppress(OSError):
                self._listener.shutdown(SHUT_RDWR)
            self._listener.close()


def opened(memory_path: str) -> int:
    """A memory file's descriptor; ConfigError when it is none."""
    with step("Cannot open the memory file", memory_path):
        fd = os.open(memory_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"the memory file is no regular file: {memory_path}")
    return fd


def handed_over(peer: socket) -> tuple[list[Mapping], int]:
    """What a microVM sends: where its memory is, and the userfaultfd. ConfigError when it is anything else."""
    peer.settimeout(HANDOVER_S)
    try:
        text, ancillary, _, _ = peer.recvmsg(_MESSAGE_SIZE, CMSG_SPACE(4), MSG_CMSG_CLOEXEC)
    except TimeoutError:
        raise ConfigError(f"it has handed nothing over within {HANDOVER_S:g} s") from None
    fds = descriptors(ancillary)
    try:
        if not text:
            raise ConfigError("it has closed its connection and handed nothing over")
        mappings = msgspec.json.decode(text, type=list[Mapping])
        _check(mappings)
        return mappings, _userfault(fds)
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, msgspec.DecodeError | ValueError | RecursionError):
            raise ConfigError(f"what it handed over is no memory: {error}") from None
        raise


def _check(mappings: list[Mapping]) -> None:
    """ValueError when these are no regions that can be served."""
    if not mappings:
        raise ValueError("there is no region")
    page_size = mappings[0].page_size
    if page_size not in _PAGE_SIZES:
        raise ValueError(f"there are no pages of {page_size} bytes")
    for each in mappings:
        if each.page_size != page_size:
            raise ValueError(f"pages of {page_size} and of {each.page_size} bytes cannot be served together")
        for name in ("base_host_virt_addr", "size", "offset"):
            value = getattr(each, name)
            if not 0 <= value < 1 << 56 or value % page_size:
                raise ValueError(f"{name} is {value}, which is no address or size of whole pages")


def _userfault(fds: list[int]) -> int:
    """The one descriptor that came, if it is what it should be: then nobody waits in reading it."""
    if len(fds) != 1:
        raise ValueError(f"there came {len(fds)} descriptors with it, not one")
    name = os.readlink(f"/proc/self/fd/{fds[0]}")
    if name != "anon_inode:[userfaultfd]":
        raise ValueError(f"the descriptor is no userfaultfd but {name}")
    os.set_blocking(fds[0], False)
    return fds[0]


def main() -> None:
    """For `crackle.PageHandler`: `LISTENER MEMORY RECORD`, until standard input ends, and all who are served."""
    number, memory_path, record = sys.argv[1:]

    def report(sentence: str) -> None:
        print(f"crackle: {sentence}", file=sys.stderr, flush=True)

    listener = socket(fileno=int(number))
    path = listener.getsockname()
    handler = Handler(memory_path, listener, report, record=record == "record")
    handler.serve(until=0)
    handler.close()
    # A program that was killed has not done it.
    for remove, what in ((os.unlink, path), (os.rmdir, os.path.dirname(path))):
        with contextlib.suppress(OSError):
            remove(what)
    handler.settle()


if __name__ == "__main__":
    main()
