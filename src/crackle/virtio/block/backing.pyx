"""What stands behind a drive: opening it, its size, its identity, and whether it can give blocks back."""

from libc.errno cimport EOPNOTSUPP, errno
from libc.stdint cimport uint64_t

from crackle.includes.block cimport *

import os
import stat

from crackle.errors import ConfigError, os_reason

SECTOR = 512


class Backing:
    """An open file or block device, the caller's to close.

    fd, size (bytes); identity: what GET_ID answers (5.2.6); discards: whether parts of it can be given back and zeroed
    without writing; granularity: bytes of its smallest part for which that helps.
    """

    __slots__ = ("discards", "fd", "granularity", "identity", "size")


def open_backing(str path, bint read_only):
    """ConfigError when it cannot be a drive."""
    backing = Backing()
    try:
        # Without waiting, or a named pipe would be waited for.
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot open the drive's file {path}: {os_reason(error)}") from None
    except ValueError as error:
        raise ConfigError(f"cannot open the drive's file {path!r}: {error}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise ConfigError(f"cannot use {path} as a drive: it is neither a regular file nor a block device")
        # io_uring takes the flag for a wish to fail rather than to wait.
        os.set_blocking(fd, True)
        backing.fd, backing.size = fd, os.lseek(fd, 0, os.SEEK_END)
        if backing.size < SECTOR:
            raise ConfigError(
                f"cannot use {path} as a drive: it has {backing.size} bytes, less than a sector of {SECTOR}"
            )
        backing.identity = f"{status.st_dev}{status.st_rdev}{status.st_ino}".encode()[:VIRTIO_BLK_ID_BYTES]
        backing.granularity = status.st_blksize
        backing.discards = not read_only and can_discard(fd, stat.S_ISBLK(status.st_mode), backing.size)
    except BaseException:
        os.close(fd)
        raise
    return backing


cdef bint can_discard(int fd, bint device, uint64_t size):
    """Tried where it does no harm: on what lies beyond the end of a file; out of line, on a block device."""
    cdef uint64_t crooked[2]
    if device:
        crooked[0] = crooked[1] = 1
        return ioctl(fd, BLKDISCARD, crooked) == 0 or errno != EOPNOTSUPP
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long> size, SECTOR) == 0
