"""What stands behind a drive: opening it, its size, its identity, its lock, and whether it can give blocks back."""

from libc.errno cimport EACCES, EAGAIN, EOPNOTSUPP, errno
from libc.stdint cimport uint64_t
from libc.string cimport memset

from crackle.includes.block cimport *

import os
import stat

from crackle.errors import ConfigError, os_reason

SECTOR = 512

_PROBLEM = "Virtio backend error: Error manipulating the backing file"


class Backing:
    """An open file or block device, and the overlays over it if there are some, which it owns until `close`.

    fd, size (bytes); identity: what GET_ID answers (5.2.6); discards: whether parts of it can be given back and zeroed
    without writing; granularity: bytes of its smallest part for which that helps. file: (device, inode), the same for
    all that are open on one file. lockable: whether two can be in each other's way there; locking: whether it takes part in
    what `vmm.files` locks. layers: of `disk.chain`, the one that is written first; then the file itself is only read.
    """

    __slots__ = (
        "discards",
        "fd",
        "file",
        "granularity",
        "identity",
        "layers",
        "lockable",
        "locking",
        "path",
        "read_only",
        "size",
    )

    def duplicate(self, *, bint alone=False):
        """Another on the same open file description, and so with the same lock, which goes with the last of them.

        alone: without the overlays.
        """
        twin = Backing()
        for name in self.__slots__:
            setattr(twin, name, getattr(self, name))
        twin.layers = []
        twin.fd = duplicate_fd(self.fd, self.path)
        try:
            for layer in () if alone else self.layers:
                twin.layers.append(layer.duplicate())
        except BaseException:
            twin.close()
            raise
        return twin

    @property
    def parts(self):
        """Itself, and the Backing of each overlay."""
        return [self, *(layer.backing for layer in self.layers)]

    @property
    def written(self):
        """What the guest's writes go to."""
        return self.layers[0].backing if self.layers else self

    def lock(self):
        """Keep other open file descriptions from writing to it, and from reading if it is for writing itself.

        False when that is so the other way round. Advisory: between monitors, and with programs that ask (fcntl(2),
        "Open file description locks"). Where the file system has no locks it is True too.
        """
        return set_lock(self.fd, F_RDLCK if self.read_only else F_WRLCK)

    def unlock(self):
        """The reverse. Idempotent. Closing alone is not: io_uring keeps a file that it had for a while."""
        set_lock(self.fd, F_UNLCK)

    def close(self):
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        for layer in self.layers:
            layer.backing.close()


cdef bint set_lock(int fd, short kind):
    cdef flock whole
    # From the first byte (SEEK_SET, 0) to the last (a length of 0); l_pid must be 0.
    memset(&whole, 0, sizeof(whole))
    whole.l_type = kind
    return fcntl(fd, F_OFD_SETLK, &whole) == 0 or errno not in (EAGAIN, EACCES)


cdef int duplicate_fd(int fd, str path) except -1:
    try:
        return os.dup(fd)
    except OSError as error:
        raise ConfigError(f"{_PROBLEM}: {os_reason(error)} {path}") from None


def open_backing(str path, bint read_only, str problem=_PROBLEM):
    """The Backing, without a lock. ConfigError, which begins with `problem`, when it cannot be a drive."""
    try:
        # Without waiting, or a named pipe would be waited for.
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{problem}: {os_reason(error)} {path}") from None
    except ValueError as error:
        raise ConfigError(f"{problem}: {os_reason(error)} {path!r}") from None
    return backing_of(fd, path, read_only, problem)


def backing_of(int fd, str path, bint read_only, str problem=_PROBLEM):
    """The Backing of what is open, which it takes. ConfigError, and it is closed, when it cannot be a drive."""
    backing = Backing()
    try:
        status = os.fstat(fd)
        if stat.S_ISFIFO(status.st_mode):
            raise ConfigError(f"{problem}: cannot use {path}: it is a named pipe")
        has_blocks = stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)
        # io_uring takes the flag for a wish to fail rather than to wait.
        os.set_blocking(fd, True)
        # What else can be opened, a directory or /dev/null, is an empty disk.
        backing.fd, backing.size = fd, os.lseek(fd, 0, os.SEEK_END) if has_blocks else 0
        backing.path, backing.read_only, backing.layers = path, read_only, []
        backing.lockable, backing.locking = has_blocks, False
        backing.file = status.st_dev, status.st_ino
        backing.identity = f"{status.st_dev}{status.st_rdev}{status.st_ino}".encode()[:VIRTIO_BLK_ID_BYTES]
        backing.granularity = status.st_blksize
        backing.discards = not read_only and can_discard(fd, stat.S_ISBLK(status.st_mode), backing.size)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"{problem}: {os_reason(error)} {path}") from None
    except BaseException:
        os.close(fd)
        raise
    return backing


def share_blocks(int from_fd, int to_fd, uint64_t own):
    """Make one file of another without copying anything, but the first `own` bytes; False where the file system cannot.

    OSError when there is no room for those.
    """
    if clone_file(to_fd, FICLONE, from_fd) < 0:
        return False
    # The map of an overlay is written through a mapping, which a full file system must not keep from being copied.
    if fallocate(to_fd, FALLOC_FL_UNSHARE_RANGE, 0, <long> own) < 0 and errno != EOPNOTSUPP:
        raise OSError(errno, os.strerror(errno))
    return True


def punch(int fd, uint64_t offset, uint64_t length):
    """Give a part of a file back, which reads as zeroes then; False where the file system cannot."""
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long> offset, <long> length) == 0


cdef bint can_discard(int fd, bint device, uint64_t size):
    """Tried where it does no harm: on what lies beyond the end of a file; out of line, on a block device."""
    cdef uint64_t crooked[2]
    if device:
        crooked[0] = crooked[1] = 1
        return ioctl(fd, BLKDISCARD, crooked) == 0 or errno != EOPNOTSUPP
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long> size, SECTOR) == 0
