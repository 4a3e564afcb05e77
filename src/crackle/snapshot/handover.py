"""Guest memory whose pages another process gives: the hand-over to a page-fault handler, and what becomes of it.

The protocol is Firecracker's (docs/snapshotting/handling-page-faults-on-snapshot-resume.md there): the handler listens
on a Unix socket, and gets one message, a JSON array of the regions, with the userfaultfd beside it (SCM_RIGHTS).
Nothing else is ever sent. Both sides keep the connection open while they live, so that its end tells of the other's.
"""

from __future__ import annotations

import contextlib
import errno
import os
from _socket import (
    AF_UNIX,
    MSG_NOSIGNAL,
    SO_SNDTIMEO,
    SOCK_CLOEXEC,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)
from _struct import pack
from _thread import allocate_lock

import msgspec

from crackle.errors import ConfigError, os_reason
from crackle.memory.userfault import Touch, Watch, hear_out, open_userfault, register_range, unregister_range
from crackle.runtime.channel import rights
from crackle.runtime.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crackle.memory import GuestMemory

# Seconds that a handler may take: for the connection, for all that a load needs, and for the next page of a snapshot.
CONNECT_TIMEOUT = 5
LOAD_TIMEOUT = 10.0
PAGE_TIMEOUT = 10.0

_PAGE_SIZE = 4096
_HUGE_PAGE_SIZE = 2 << 20

_CLOSED = (
    "The page-fault handler at {path} has closed its connection. If it has ended, the microVM stands still at the "
    "next page of memory that has not come yet."
)


class Mapping(msgspec.Struct):
    """Where a region of guest memory is in this process, and in the memory file; all numbers are bytes.

    page_size_kib: as page_size, not KiB; Firecracker keeps it under this name for old handlers.
    """

    base_host_virt_addr: int
    size: int
    offset: int
    page_size: int
    page_size_kib: int


def mappings(memory: GuestMemory) -> list[Mapping]:
    """The regions of `memory`, in the order of the memory file."""
    page_size = _HUGE_PAGE_SIZE if memory.backing.startswith("hugepages") else _PAGE_SIZE
    result: list[Mapping] = []
    offset = 0
    for region in memory.regions:
        result.append(Mapping(region.hva, region.size, offset, page_size, page_size))
        offset += region.size
    return result


class Handover:
    """The pages of `memory`, of which none is there yet, given to the handler at `path`; `close` takes them back.

    report: is told, once, when the handler's connection has ended. landmarks: offsets in the memory file of pages by
    which it is known. ConfigError when there is no handler, or this process gets no userfaultfd.
    """

    def __init__(
        self,
        memory: GuestMemory,
        path: str,
        report: Callable[[str], None],
        landmarks: tuple[int, ...] = (),
    ) -> None:
        self.landmarks = landmarks
        self._memory = memory
        self._path = path
        self._report = report
        self._pid = os.getpid()
        self._ranges = [(region.hva, region.size) for region in memory.regions]
        self._fetched = allocate_lock()
        self._watch: Watch | None = None
        self._watching: Thread | None = None
        self._fetching: Thread | None = None
        self._wake = -1
        self._socket: socket | None = None
        self._fd = _userfault()
        try:
            for address, size in self._ranges:
                register_range(self._fd, address, size)
            self._socket = _connected(path)
            _send(self._socket, path, msgspec.json.encode(mappings(memory)), self._fd)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._watch = Watch(memory, self._fd, self._socket.fileno(), self._wake, LOAD_TIMEOUT)
            self._watching = Thread("faults", self._observe)
            self._watch.begin()
        except OSError as error:
            self.close()
            raise ConfigError(
                f"Failed to register memory address range with the userfaultfd object: {os_reason(error)}"
            ) from None
        except BaseException:
            self.close()
            raise

    def _observe(self) -> None:
        """On a thread of its own."""
        assert self._watch is not None
        if self._watch.run():
            self._tell()

    def _tell(self) -> None:
        self._report(_CLOSED.format(path=self._path))

    # -- a load ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Handover:
        """Within the block a page that does not come within LOAD_TIMEOUT is zeros, and the block raises ConfigError."""
        # Nothing else may need one before the guest runs.
        self._memory.read(self._memory.regions[0].gpa, 1)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        assert self._watch is not None
        in_time = self._watch.unlimit()
        if not in_time and (error is None or isinstance(error, Exception)):
            why = f"it gave no page within {LOAD_TIMEOUT:g} s"
            if self._watch.closed:
                why = "it has closed its connection"
            if self._watch.untaken:
                why += " without taking what it was sent"
            # What went wrong meanwhile went wrong because of it.
            raise ConfigError(
                f"Failed to load guest memory: The page-fault handler failed: {why}: {self._path}"
            ) from None
        if self._watch.closed:
            self._tell()

    # -- a snapshot --------------------------------------------------------------------------------------------------

    def fetch(self, places: Iterable[tuple[int, int, int]]) -> None:
        """Have pages come: each of `places` is a region's index, a page of it, and how many from there on.

        ConfigError when none comes for PAGE_TIMEOUT.
        """
        if not self._fetched.acquire(blocking=False):
            raise ConfigError(f"the page-fault handler still owes pages that it was asked for: {self._path}")
        touch = Touch(self._memory)

        def run() -> None:
            try:
                for place in places:
                    touch.run(*place)
            finally:
                self._fetched.release()

        try:
            self._fetching = Thread("faults", run)
        except BaseException:
            self._fetched.release()
            raise
        before = -1
        while not self._fetched.acquire(timeout=PAGE_TIMEOUT):
            if touch.progress == before:
                raise ConfigError(
                    f"the page-fault handler gave no page within {PAGE_TIMEOUT:g} s: {self._path}"
                )
            before = touch.progress
        self._fetched.release()

    # -- the end -----------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Let zeros come for all that is missing, and for who waits; and who gives pages back need not wait either."""
        self._unregister()
        hear_out(self._fd)

    def _unregister(self) -> None:
        for address, size in self._ranges:
            with contextlib.suppress(OSError):
                unregister_range(self._fd, address, size)

    def close(self) -> None:
        """Take the pages back: who still waits for one finds zeros. Idempotent.

        In a forked child only the copies of the descriptors are closed.
        """
        if self._fd < 0:
            return
        if self._pid == os.getpid():
            self._unregister()
            if self._watch is not None:
                self._watch.end()
            for thread in (self._watching, self._fetching):
                if thread is not None:
                    thread.join()
        for fd in (self._fd, self._wake):
            if fd >= 0:
                os.close(fd)
        self._fd = self._wake = -1
        if self._socket is not None:
            self._socket.close()


def _userfault() -> int:
    try:
        return open_userfault()
    except OSError as error:
        advice = ""
        if error.errno in (errno.EPERM, errno.EACCES):
            advice = "; let this process open /dev/userfaultfd, or set vm.unprivileged_userfaultfd to 1"
        raise ConfigError(f"Failed to UFFD object: {os_reason(error)}{advice}") from None


def _connected(path: str) -> socket:
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        # A handler that accepts nobody, too, keeps who connects waiting.
        connection.setsockopt(SOL_SOCKET, SO_SNDTIMEO, pack("@ll", CONNECT_TIMEOUT, 0))
        connection.connect(path)
    except (OSError, ValueError) as error:
        connection.close()
        reason = os_reason(error)
        if isinstance(error, BlockingIOError):
            reason = f"it accepts nobody for {CONNECT_TIMEOUT} s"
        raise ConfigError(f"Failed to connect to UDS Unix stream: {reason}: {path}") from None
    return connection


def _send(connection: socket, path: str, message: bytes, fd: int) -> None:
    try:
        sent = connection.sendmsg([message], rights([fd]), MSG_NOSIGNAL)
        if sent < len(message):
            connection.sendall(message[sent:])
    except OSError as error:
        raise ConfigError(f"Failed to sends file descriptor: {os_reason(error)}: {path}") from None
