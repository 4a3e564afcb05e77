"""How virtio-block's requests reach the file: what engines share, and the Sync engine, one system call a piece.

A device takes a `request` of an engine, fills it in and submits it. It may be done at once; if not, it is to be submitted
again, or `completed` gives it back later. A large request goes in pieces, so that neither a turn of the I/O thread nor what
is in flight has more bytes than a disk moves in a moment. Everything but `__init__` runs with the device's lock held. An
engine does not own the file.
"""

from libc.errno cimport EINTR, EIO, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint64_t

from crackle.includes.block cimport *
from crackle.includes.io cimport pread, preadv, pwrite, pwritev
from crackle.memory.guest cimport GuestMemory
from crackle.virtio.block.request cimport DO_ALLOCATE, DO_FLUSH, DO_READ, DO_WRITE


cdef enum:
    # Bytes that one system call moves, and bytes that one gives back or zeroes, from a multiple of it on.
    PIECE = 1 << 20
    ALLOCATE_PIECE = 64 << 20


cdef class Engine:
    """The Sync engine, and the interface of all."""

    def __cinit__(self, GuestMemory memory not None, *args):
        self.memory = memory
        self.fd = self.event_fd = -1

    cdef int use(self, int fd) noexcept nogil:
        """Work on this file from now on; nothing is in flight. 0, or the errno for which that cannot be."""
        self.fd = fd
        return 0

    cdef request *take(self) noexcept nogil:
        """A request to fill in, the same one until it is submitted; NULL when as much as may be is in flight."""
        return &self.only

    cdef int submit(self, request *r) noexcept nogil:
        """Carry out a piece of it, or put that among what `kick` hands over: REQUEST_DONE, ..."""
        cdef ssize_t n
        self.cut_piece(r)
        if r.what == DO_READ:
            if r.piece_count == 1:
                n = pread(self.fd, r.iov.iov_base, r.iov.iov_len, <long> r.offset)
            else:
                n = preadv(self.fd, r.iov, r.piece_count, <long> r.offset)
        elif r.what == DO_WRITE:
            if r.piece_count == 1:
                n = pwrite(self.fd, r.iov.iov_base, r.iov.iov_len, <long> r.offset)
            else:
                n = pwritev(self.fd, r.iov, r.piece_count, <long> r.offset)
        elif r.what == DO_FLUSH:
            n = fdatasync(self.fd)
        else:
            n = fallocate(self.fd, r.mode, <long> r.offset, <long> r.piece)
        return REQUEST_DONE if self.advance(r, -errno if n < 0 else n) else REQUEST_BEGUN

    cdef bint kick(self) noexcept nogil:
        """Hand over what was submitted; whether there was anything."""
        return False

    cdef request *completed(self) noexcept nogil:
        """A request that is done, or NULL; the caller releases it."""
        return NULL

    cdef void release(self, request *r) noexcept nogil:
        pass

    cdef int wait(self, uint64_t until) noexcept nogil:
        """Wait until something is done: 1. 0 when nothing is in flight, -1 when `until`, of `now_ns`, came first."""
        return 0

    cdef bint ready(self) noexcept nogil:
        """Whether `completed` would give something, as far as can be told without a system call."""
        return False

    cdef bint announce(self, bint on) noexcept nogil:
        """Write `event_fd` when something is done, from now on or no more; whether something is done already."""
        return False

    cdef void cut_piece(self, request *r) noexcept nogil:
        """Decide what the next system call for `r` does; `advance` puts its buffers together again."""
        cdef uint64_t total = 0
        r.piece, r.piece_count, r.cut = r.left, r.count, 0
        if r.what == DO_ALLOCATE:
            r.piece = min(r.left, ALLOCATE_PIECE - r.offset % ALLOCATE_PIECE)
        elif r.left > PIECE and (r.what == DO_READ or r.what == DO_WRITE):
            r.piece, r.piece_count = PIECE, 0
            while total < PIECE:
                total += r.iov[r.piece_count].iov_len
                r.piece_count += 1
            r.cut = total - PIECE
            r.iov[r.piece_count - 1].iov_len -= r.cut

    cdef bint advance(self, request *r, ssize_t result) noexcept nogil:
        """A system call for `r` gave `result`, bytes or -errno: whether that was the end of it."""
        cdef uint64_t n
        if r.cut:
            r.iov[r.piece_count - 1].iov_len += r.cut
            r.cut = 0
        if result == -EINTR:
            return False
        if result == -EOPNOTSUPP and r.mode != r.fallback:
            r.mode = r.fallback
            return False
        if r.what == DO_ALLOCATE and result == 0:
            r.left -= r.piece
            r.offset += r.piece
            return r.left == 0
        if r.what != DO_READ and r.what != DO_WRITE:
            r.error = <int> -result
            return True
        # 0 is the end of a file that was cut.
        r.error = EIO if result == 0 else <int> -result if result < 0 else 0
        n = r.left if r.error else min(<uint64_t> result, r.left)
        if r.what == DO_WRITE or not self.memory.tracking:
            if r.error or n == r.left:
                return True
        r.left -= n
        r.offset += n
        while r.count and n >= r.iov.iov_len:
            self.mark_written(r.iov.iov_base, r.iov.iov_len if r.what == DO_READ else 0)
            n -= r.iov.iov_len
            r.iov += 1
            r.count -= 1
        if n:
            self.mark_written(r.iov.iov_base, n if r.what == DO_READ else 0)
            r.iov.iov_base = <uint8_t *> r.iov.iov_base + n
            r.iov.iov_len -= n
        return r.error != 0 or r.left == 0

    cdef void mark_written(self, void *host, uint64_t size) noexcept nogil:
        self.memory.mark_dirty_at(<uint8_t *> host, size)

    cdef void shut_down(self) noexcept nogil:
        """Give back what the engine holds; nothing is in flight. Idempotent."""
