"""Frames over a Unix stream socket: a length, so many bytes, and descriptors that go with them (unix(7), SCM_RIGHTS).

What two processes of this program's say to each other, one of which started the other. Both wait for each other's
frames, unless they look first whether there is something to read.
"""

from __future__ import annotations

import _socket
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Bytes of the frame, and how many descriptors are its own.
_HEAD = struct.Struct("=II")
_CHUNK = 65536
# <sys/socket.h>, struct ucred.
_CREDENTIALS = struct.Struct("=3i")

# Bytes of a frame, so that nobody has the other keep more.
FRAME_MAX = 64 << 20
_FDS_MAX = 64


def pair(kind: int = _socket.SOCK_STREAM) -> tuple[_socket.socket, _socket.socket]:
    """Two sockets that are connected, and closed when something is executed."""
    return _socket.socketpair(_socket.AF_UNIX, kind | _socket.SOCK_CLOEXEC)


def rights(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """The control message that hands `fds` over."""
    if not fds:
        return []
    return [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))]


def descriptors(control: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """Those that came with control messages; they are the caller's now."""
    return [
        fd
        for level, kind, data in control
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS)
        for (fd,) in struct.iter_unpack("=i", data[: len(data) & ~3])
    ]


class Channel:
    """One end. Owns its socket and what has come and nobody has taken, until `close`. One thread at a time.

    takes_descriptors: whether those that the other end sends are received; else the kernel closes them. knows_sender:
    whether the kernel is to say which process sends, by the number that it has here; then that is `sender`.
    """

    def __init__(
        self, socket: _socket.socket, *, takes_descriptors: bool = False, knows_sender: bool = False
    ) -> None:
        self._socket = socket
        self._space = _socket.CMSG_SPACE(_FDS_MAX * 4) if takes_descriptors else 0
        self.sender = 0
        if knows_sender:
            socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
            self._space += _socket.CMSG_SPACE(_CREDENTIALS.size)
        self._bytes = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        """Readable when `fill` has something to do; -1 when it is closed."""
        return self._socket.fileno()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """A frame, with copies of `fds`. OSError when nobody is there."""
        message = _HEAD.pack(len(data), len(fds)) + data
        sent = self._socket.sendmsg([message], rights(fds), _socket.MSG_NOSIGNAL)
        if sent < len(message):
            self._socket.sendall(memoryview(message)[sent:], _socket.MSG_NOSIGNAL)

    def fill(self) -> bool:
        """Wait until something has come, and keep it; False when nothing will any more."""
        try:
            data, control, _, _ = self._socket.recvmsg(_CHUNK, self._space, _socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return False
        self._bytes += data
        self._fds += descriptors(control)
        for level, kind, credentials in control:
            if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_CREDENTIALS):
                self.sender = _CREDENTIALS.unpack(credentials)[0]
        return bool(data)

    def take(self) -> tuple[bytes, list[int]] | None:
        """The next frame of those that have come, and its descriptors, which are the caller's now; None without one."""
        if len(self._bytes) < _HEAD.size:
            return None
        size, count = _HEAD.unpack_from(self._bytes)
        if size > FRAME_MAX:
            raise ValueError(f"a frame of {size} bytes, {FRAME_MAX} is the most")
        end = _HEAD.size + size
        if len(self._bytes) < end:
            return None
        data = bytes(self._bytes[_HEAD.size : end])
        del self._bytes[:end]
        fds, self._fds = self._fds[:count], self._fds[count:]
        return data, fds

    def receive(self) -> tuple[bytes, list[int]] | None:
        """Wait for a frame; None when the other end is gone before it is whole."""
        while (frame := self.take()) is None:
            if not self.fill():
                return None
        return frame

    def end_of_frames(self) -> None:
        """Say that no more will come from here. Idempotent."""
        try:
            self._socket.shutdown(_socket.SHUT_WR)
        except OSError:
            return

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())
