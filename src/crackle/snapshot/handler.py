"""A page-fault handler for the microVMs that go on from one snapshot: `crackle snapshot serve` and `warm`.

Whoever loads the snapshot with this handler's socket (`crackle.snapshot.handover` has the protocol) gets its memory
from here, on a thread of its own. What the first of them wants in its first seconds is noted beside the memory file,
and read ahead for the others, in that order.
"""

from __future__ import annotations

import contextlib
import os
import stat
from _socket import AF_UNIX, CMSG_SPACE, SHUT_RDWR, SOCK_CLOEXEC, SOCK_STREAM, socket
from functools import partial

import msgspec

from crackle.errors import ConfigError, os_reason
from crackle.memory.pager import WINDOW, Pager
from crackle.runtime.channel import descriptors
from crackle.runtime.threads import Thread
from crackle.snapshot import workingset
from crackle.snapshot.handover import Mapping
from crackle.snapshot.pair import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds from a microVM's beginning in which what it wants is noted.
RECORDED_S = 10.0
_BACKLOG = 128
_MESSAGE_SIZE = 65536


class Handler:
    """Serves the memory file at `memory_path` to whoever connects to the socket at `path`, until `close`.

    record: note what the next microVM wants, whatever was noted before. seconds: how long what is wanted is noted,
    None for as long as the microVM lives. report: takes what is to be told. ConfigError when either cannot be had.
    """

    def __init__(
        self,
        memory_path: str,
        path: str,
        report: Callable[[str], None],
        *,
        record: bool = False,
        seconds: float | None = RECORDED_S,
    ) -> None:
        self._memory_path = memory_path
        self._report = report
        self._record = record
        self._seconds = -1.0 if seconds is None else seconds
        self._path = path
        self._pagers: list[Pager] = []
        with step("Cannot open the memory file", memory_path):
            self._fd = os.open(memory_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise ConfigError(f"the memory file is no regular file: {memory_path}")
            with step("Cannot listen", path):
                self._listener.bind(path)
                self._listener.listen(_BACKLOG)
        except BaseException:
            self._listener.close()
            os.close(self._fd)
            raise

    def serve(self) -> None:
        """Serve one microVM after the other, all at once, until an exception ends it."""
        while True:
            Thread("faults", partial(self._attend, self._accept()))

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
            # Whoever waits for a microVM on another thread does so no more.
            with contextlib.suppress(OSError):
                self._listener.shutdown(SHUT_RDWR)
            self._listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def handed_over(peer: socket) -> tuple[list[Mapping], int]:
    """What a microVM sends: where its memory is, and the userfaultfd. ConfigError when it is anything else."""
    text, ancillary, _, _ = peer.recvmsg(_MESSAGE_SIZE, CMSG_SPACE(4))
    fds = descriptors(ancillary)
    try:
        mappings = msgspec.json.decode(text, type=list[Mapping])
        if not fds or not mappings:
            raise ValueError("there is no descriptor, or no region")
        return mappings, fds[0]
    except (msgspec.DecodeError, ValueError) as error:
        for fd in fds:
            os.close(fd)
        raise ConfigError(f"what it handed over is no memory: {error}") from None
