"""Which parts of a memory file a microVM wants first, in their order: a small file beside the memory file.

| bytes | content |
|---|---|
| 8 | "CRKLWSET" |
| 4 | version of the format, 1 |
| 4 | bytes of a window of the memory file |
| 8 | bytes of the memory file |
| 4 | how many windows follow |
| 4 | CRC-32 of the first pages of some of these, by which the memory file is known |
| 4 each | numbers of windows |
| 4 | CRC-32 of everything before |

Numbers are little-endian. It only ever makes things faster: one that does not fit is as good as none.
"""

from __future__ import annotations

import contextlib
import os
import stat
from _struct import Struct
from binascii import crc32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_HEADER = Struct("<8sIIQII")
_CHECKSUM = Struct("<I")
_MAGIC = b"CRKLWSET"
_VERSION = 1
_PAGE_SIZE = 4096
_SAMPLES = 16


def path_beside(memory_path: str) -> str:
    """Where the working set of a memory file is."""
    return f"{memory_path}.working-set"


def read(memory_path: str, memory_fd: int, window: int) -> list[int]:
    """The windows that are wanted first; none where nobody has noted them, or for another memory file."""
    size = os.fstat(memory_fd).st_size
    try:
        data = _content(path_beside(memory_path), _HEADER.size + 4 * -(-size // window) + _CHECKSUM.size)
    except OSError:
        return []
    if len(data) < _HEADER.size + _CHECKSUM.size:
        return []
    magic, version, of_window, of_size, count, samples = _HEADER.unpack_from(data)
    if (magic, version, of_window, of_size) != (_MAGIC, _VERSION, window, size):
        return []
    body = data[: -_CHECKSUM.size]
    if len(body) != _HEADER.size + 4 * count or _CHECKSUM.pack(crc32(body)) != data[-_CHECKSUM.size :]:
        return []
    windows = [number for (number,) in _CHECKSUM.iter_unpack(body[_HEADER.size :])]
    if any(number * window >= size for number in windows):
        return []
    return windows if _samples(windows, memory_fd, window) == samples else []


def write(memory_path: str, memory_fd: int, window: int, windows: Sequence[int]) -> None:
    """Note them; what is there is replaced whole. OSError when that cannot be."""
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        window,
        os.fstat(memory_fd).st_size,
        len(windows),
        _samples(windows, memory_fd, window),
    )
    body = header + b"".join(_CHECKSUM.pack(number) for number in windows)
    path = path_beside(memory_path)
    temporary = f"{path}.{os.urandom(8).hex()}"
    try:
        with open(temporary, "xb") as file:
            file.write(body + _CHECKSUM.pack(crc32(body)))
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _content(path: str, most: int) -> bytes:
    """A regular file's, of no more than `most` bytes, or nothing. OSError when it cannot be read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            return b""
        with open(fd, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(fd)


def _samples(windows: Sequence[int], memory_fd: int, window: int) -> int:
    checksum = 0
    for number in windows[:: max(1, len(windows) // _SAMPLES)]:
        checksum = crc32(os.pread(memory_fd, _PAGE_SIZE, number * window), checksum)
    return checksum
