"""Descriptors that other processes may share, such as standard input and output, used so that nobody waits in here.

Their mode (O_NONBLOCK) belongs to the open file description, and so to everybody who has it: it is not touched. Instead
`borrow` opens a description of our own on the same pipe or terminal, and says how to use what cannot be opened again.
`stream.pxd` reads and writes them in the core, and `put` here.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# How a descriptor is used: reading and writing do not wait; a socket, which is asked each time not to wait; one whose
# mode is others', where the kernel is asked not to wait if it can be, and poll(2) if not.
OWN: Final = 0
SOCKET: Final = 1
SHARED: Final = 2

# <linux/stat.h>; the numbers of /dev/ptmx are in Documentation/admin-guide/devices.txt.
_S_IFMT, _S_IFIFO, _S_IFCHR, _S_IFSOCK = 0o170000, 0o010000, 0o020000, 0o140000
_PTMX = (5, 2)

# What a pipe that polls writable takes at once (pipe(7), PIPE_BUF).
_PIPE_BUF = 4096


def borrow(fd: int, flags: int) -> tuple[int, int]:
    """A descriptor of the caller's own for what `fd` is open on, and OWN, SOCKET or SHARED. Raises OSError.

    flags: os.O_RDONLY or os.O_WRONLY.
    """
    status = os.fstat(fd)
    kind = status.st_mode & _S_IFMT
    if kind == _S_IFSOCK:
        return os.dup(fd), SOCKET
    if kind not in (_S_IFIFO, _S_IFCHR):
        # A file is as fast as its disk whatever its mode is, and the place in it is shared on purpose.
        return os.dup(fd), OWN
    own = _open_again(fd, flags, status)
    return (os.dup(fd), SHARED) if own is None else (own, OWN)


def _open_again(fd: int, flags: int, status: os.stat_result) -> int | None:
    """A description of our own, or None: no /proc, no permission, or a device of which each opening is another one."""
    if status.st_mode & _S_IFMT == _S_IFCHR and (
        not os.isatty(fd) or (os.major(status.st_rdev), os.minor(status.st_rdev)) == _PTMX
    ):
        return None
    try:
        own = os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.path.samestat(os.fstat(own), status):
        return own
    os.close(own)
    return None


def take(fd: int, how: int, size: int) -> bytes:
    """Read from a pipe or terminal as `borrow` said. Raises OSError: BlockingIOError where nothing is there to read."""
    if how != OWN:
        import select

        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(0):
            raise BlockingIOError
    return os.read(fd, size)


def put(fd: int, how: int, data: bytes | memoryview) -> int:
    """Write to a descriptor as `borrow` said; how many bytes it took without waiting. Raises OSError."""
    try:
        if how == OWN:
            return os.write(fd, data)
        if how == SOCKET:
            return _send(fd, data)
        try:
            return os.pwritev(fd, [data], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return _poll_and_write(fd, data)
    except BlockingIOError:
        return 0


def _send(fd: int, data: bytes | memoryview) -> int:
    import _socket

    borrowed = _socket.socket(fileno=fd)
    try:
        return borrowed.send(data, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
    finally:
        borrowed.detach()


def _poll_and_write(fd: int, data: bytes | memoryview) -> int:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    taken = 0
    while taken < len(data):
        ready = poll.poll(0)
        if not ready or not ready[0][1] & select.POLLOUT:
            break
        taken += os.write(fd, data[taken : taken + _PIPE_BUF])
    return taken


def open_standard_streams() -> None:
    """Something harmless for each of descriptors 0, 1 and 2 that is closed. Never raises.

    Its number would be given to something else, which the guest's console, or a message, then reads or writes.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            _fill(fd)


def leave_standard_streams() -> None:
    """Have /dev/null instead of what they are, or where there is none what `open_standard_streams` finds. OSError."""
    try:
        ends = [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)] * 3
    except FileNotFoundError:
        nothing, first = os.pipe()
        last, refusing = os.pipe()
        os.close(first)
        os.close(last)
        ends = [nothing, refusing, refusing]
    for fd, end in enumerate(ends):
        os.dup2(end, fd)
    for end in {*ends} - {0, 1, 2}:
        os.close(end)


def _fill(fd: int) -> None:
    """/dev/null, or where there is none a pipe without another end: nothing to read, and what is written is refused."""
    try:
        try:
            got = os.open("/dev/null", os.O_RDWR)
        except OSError:
            got, other = os.pipe()
            if fd:
                got, other = other, got
            os.close(other)
        if got != fd:
            os.dup2(got, fd, inheritable=False)
            os.close(got)
    except OSError:
        # Not even a descriptor: then nothing else gets this number either.
        return
