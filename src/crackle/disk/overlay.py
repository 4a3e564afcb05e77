"""An overlay file: what it holds of a disk, and over what.

| at | content |
|---|---|
| 0, 32 KiB | the header, twice: the newer one that is whole counts |
| 64 KiB | the map: a bit for each block of 4 KiB, least significant first, set where the block is in this file |
| a multiple of 2 MiB | the disk, sparse: each byte at its own offset from here |

A header is "CRKOVL" and two NULs, the version of the format, bytes and CRC-32 of what follows (32 bits each,
little-endian), and a `Header` as MessagePack. A block that is set in the map and a hole in the file reads as zeroes:
that is what is left of one that was discarded. A block that is not set is in the layer below, whatever is in its
place here.

A bit is set when the block's data are there, and goes to the disk after them (`virtio/block/layers`); the data of a
block that is not set mean nothing. So any mixture of old and new bits, as a crash may leave, is right for what was
flushed, and the map needs no checksum.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

# The C module itself, as in `snapshot`.
from _struct import Struct
from binascii import crc32

import msgspec

from crackle.errors import ConfigError, context, os_reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from crackle.disk.chain import Layer
    from crackle.virtio.block.backing import Backing

MAGIC = b"CRKOVL\0\0"
VERSION = 1
BLOCK = 4096
SECTOR = 512
MAX_DEPTH = 16
"""Overlays, one over the other, that a disk is made of at most: a read may have to ask each of them."""

_PREFIX = Struct("<8sIII")
_SLOTS = (0, 32 << 10)
_SLOT_SIZE = 8 << 10  # the longest path and the rest
MAP_AT = 64 << 10
_MAP_UNIT = 4096  # what the core writes of it at a time
_DATA_ALIGNMENT = 2 << 20  # so that large pages of the page cache lie as they do for the base

# What of a base is looked at to know it again.
_SAMPLES = 8


class Under(msgspec.Struct, frozen=True, kw_only=True):
    """What an overlay lies over: a file or block device that is a disk, or another overlay.

    path: absolute, or relative to the overlay's own directory. overlay: the id of another overlay, None for a plain
    disk. For that: mtime_ns when it was looked at, file (device, inode), and the CRC-32 of some blocks.
    """

    path: str
    overlay: str | None = None
    mtime_ns: int = 0
    file: tuple[int, int] = (0, 0)
    checksum: int = 0


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """id: of the contents, 32 hexadecimal digits; another one once they have been written to by somebody else than
    who made them or was told of them. size: bytes of the disk. number: of the header, the higher one counts.
    committing: its blocks are on their way into what is below, which is no longer what it was.
    """

    id: str
    size: int
    under: Under
    number: int = 0
    committing: bool = False

    @property
    def map_size(self) -> int:
        """Bytes of the map, in whole units."""
        blocks = -(-self.size // BLOCK)
        return -(-blocks // (8 * _MAP_UNIT)) * _MAP_UNIT

    @property
    def map_end(self) -> int:
        """Where in the file the map ends."""
        return MAP_AT + self.map_size

    @property
    def data_at(self) -> int:
        """Where in the file the disk begins."""
        return -(-self.map_end // _DATA_ALIGNMENT) * _DATA_ALIGNMENT

    @property
    def file_size(self) -> int:
        """Bytes of the file, nearly all of them holes at first."""
        return self.data_at + -(-self.size // BLOCK) * BLOCK

    def changed(self) -> Header:
        """The next header, for contents that are no longer those of this one."""
        return msgspec.structs.replace(self, id=new_id(), number=self.number + 1)

    def over(self, under: Under) -> Header:
        """The next header, for when that is what it lies over."""
        return msgspec.structs.replace(self, under=under, number=self.number + 1)


def new_id() -> str:
    """For contents that nobody has seen yet."""
    return os.urandom(16).hex()


def encode(header: Header) -> tuple[bytes, int]:
    """The bytes of a header, and where in the file they go: over the older one. ConfigError if there are too many."""
    body = msgspec.msgpack.encode(header)
    data = _PREFIX.pack(MAGIC, VERSION, len(body), crc32(body)) + body
    if len(data) > _SLOT_SIZE:
        raise ConfigError(f"the path of what is below the overlay is too long: {header.under.path}")
    return data, _SLOTS[header.number % 2]


def decode(data: bytes) -> Header | None:
    """The header in one of the two places; None when there is no whole one. ConfigError for one of a newer format."""
    if len(data) < _PREFIX.size or not data.startswith(MAGIC):
        return None
    _, version, length, checksum = _PREFIX.unpack_from(data)
    if version > VERSION:
        raise ConfigError(
            f"the overlay's format {version} is newer than this version of Crackle reads ({VERSION})"
        )
    body = data[_PREFIX.size : _PREFIX.size + length]
    if len(body) != length or crc32(body) != checksum:
        return None
    try:
        return msgspec.msgpack.decode(body, type=Header)
    except (msgspec.DecodeError, ValueError):
        return None


def read_header(fd: int, path: str) -> Header:
    """The header of an open overlay. ConfigError when it is none, or not whole."""
    try:
        found = [decode(os.pread(fd, _SLOT_SIZE, at)) for at in _SLOTS]
    except OSError as error:
        raise ConfigError(f"cannot read the overlay {path}: {os_reason(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{error}: {path}") from None
    whole = [header for header in found if header is not None]
    if not whole:
        raise ConfigError(
            f"{path} is no overlay, or its header is damaged: one begins with {MAGIC!r}. An overlay is made by "
            "naming a file that is not there"
        )
    header = max(whole, key=lambda one: one.number)
    size = os.fstat(fd).st_size
    if size < header.file_size:
        raise ConfigError(f"the overlay {path} is truncated: {size} bytes, where it has {header.file_size}")
    return header


def write_header(fd: int, header: Header, path: str) -> None:
    """Put `header` in place of the older one. ConfigError leaves the other one."""
    data, at = encode(header)
    try:
        if os.pwrite(fd, data, at) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise ConfigError(f"cannot write the header of the overlay {path}: {os_reason(error)}") from None


# -- what is below ---------------------------------------------------------------------------------------------------


def identify(fd: int, path: str, size: int) -> Under:
    """How the open plain disk of `size` bytes is known again. ConfigError when it cannot be read."""
    info = os.fstat(fd)
    try:
        checksum = _checksum(fd, size)
    except OSError as error:
        raise ConfigError(f"cannot read the base {path}: {os_reason(error)}") from None
    return Under(
        path=path, mtime_ns=_mtime(info), file=(info.st_dev, info.st_rdev or info.st_ino), checksum=checksum
    )


def _mtime(info: os.stat_result) -> int:
    # That of a block device is about its name.
    return 0 if stat.S_ISBLK(info.st_mode) else info.st_mtime_ns


def _checksum(fd: int, size: int) -> int:
    checksum = crc32(b"")
    for n in range(_SAMPLES):
        checksum = crc32(
            os.pread(fd, BLOCK, max(size - BLOCK, 0) * n // (_SAMPLES - 1) // BLOCK * BLOCK), checksum
        )
    return checksum


def check_base(fd: int, path: str, size: int, header: Header, overlay: str) -> None:
    """ConfigError unless the open plain disk is what `header`, the lowest overlay's, lies over, and still as it was."""
    under = header.under
    info = os.fstat(fd)
    same = (info.st_dev, info.st_rdev or info.st_ino) == under.file
    if size == header.size and (header.committing or (same and _mtime(info) == under.mtime_ns != 0)):
        return
    found = identify(fd, path, size)
    if size == header.size and found.checksum == under.checksum and found.mtime_ns == under.mtime_ns:
        return
    if not same and (size != header.size or found.checksum != under.checksum):
        raise ConfigError(
            f"the overlay {overlay} belongs to another base: it was made over {under.path}, a disk of {header.size} "
            f"bytes, and {path}, of {size}, is none like it"
        )
    why = f"it has {size} bytes, not {header.size}" if size != header.size else "it has been written to"
    raise ConfigError(
        f"the base {path} has changed since the overlay {overlay} was made over it: {why}. If it is a copy, or you "
        f"know that its contents are the same: crackle disk rebase --unchecked {overlay} {path}"
    )


# -- a new one -------------------------------------------------------------------------------------------------------


def make(path: str, *, base: str | None = None, over: str | None = None, durable: bool = False) -> Header:
    """A new overlay at `path`, with nothing in it, over the plain disk `base`, or over the overlay `over`. Its header.

    Takes some dozen microseconds. What it lies over is to be written to no more: who opens the new overlay is told, and
    refuses. durable: it is on the disk when this returns, which takes as long as the disk does. ConfigError, and there
    is nothing new, when `path` is there already, when what is below cannot be, or with MAX_DEPTH overlays below it.
    """
    from crackle.disk.chain import open_layers
    from crackle.virtio.block.backing import open_backing

    if over is not None:
        layers = open_layers(over, open_backing)
        try:
            header = over_layers(layers, path)
        finally:
            for layer in layers:
                layer.backing.close()
    else:
        assert base is not None, "one of the two is given"
        backing = open_backing(base, True)
        try:
            header = over_base(backing)
        finally:
            backing.close()
    os.close(create(path, header, durable=durable))
    return header


def over_base(backing: Backing) -> Header:
    """For an overlay over a plain disk that is open. ConfigError when there can be none."""
    size = backing.size // SECTOR * SECTOR
    if not size:
        raise ConfigError(f"{backing.path} has no sector that an overlay could lie over")
    return Header(id=new_id(), size=size, under=identify(backing.fd, os.path.realpath(backing.path), size))


def over_layers(layers: Sequence[Layer], path: str | None) -> Header:
    """For one at `path`, None for memory, over these. ConfigError when it were one too many."""
    if len(layers) >= MAX_DEPTH:
        raise ConfigError(too_deep(layers[0].path, len(layers)))
    header = layers[0].header
    return Header(
        id=new_id(), size=header.size, under=Under(path=seen_from(path, layers[0].path), overlay=header.id)
    )


def too_deep(path: str, depth: int) -> str:
    """What is said where there are too many."""
    return (
        f"{path} has {depth} overlays one over the other, and {MAX_DEPTH} are the most: make it fewer with crackle "
        "disk commit, or rebase"
    )


def seen_from(path: str | None, other: str) -> str:
    """How an overlay at `path` names another file: by its name alone in the same directory, so that both may move."""
    there = os.path.realpath(other)
    here = None if path is None else os.path.dirname(os.path.realpath(path))
    return os.path.basename(there) if os.path.dirname(there) == here else there


def create(path: str, header: Header, *, durable: bool = False) -> int:
    """The descriptor of a new, empty overlay file. It appears whole or not at all. ConfigError without one."""
    temporary = f"{path}.{header.id}"
    with context(f"cannot make the overlay {path}"):
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            lay_out(fd, header, path)
            if durable:
                os.fsync(fd)
            put_in_place(temporary, path)
            if durable:
                sync_directory(path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    return fd


def lay_out(fd: int, header: Header, path: str, *, reserve: bool = True) -> None:
    """Make an overlay of an empty file. reserve: give its map room now, which a full file system would not have
    later.
    """
    os.ftruncate(fd, header.file_size)
    if reserve:
        os.posix_fallocate(fd, MAP_AT, header.map_size)
    write_header(fd, header, path)


def put_in_place(temporary: str, path: str) -> None:
    """Give a file its name, unless that is another's. OSError leaves both."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without second names.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(temporary, path)
    else:
        os.unlink(temporary)


def sync_directory(path: str) -> None:
    """Have the name of a file on the disk."""
    fd = os.open(os.path.dirname(os.path.realpath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
