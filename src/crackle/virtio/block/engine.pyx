"""How virtio-block's requests reach the file: what engines share, and the Sync engine, one system call a request.

A device takes a `request` of an engine, fills it in and submits it. It may be done at once; if not, `completed` gives it
back later. Everything but `__init__` runs with the device's lock held. An engine does not own the file.
"""

from libc.errno cimport EINTR, EIO, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint64_t

from crackle.includes.block cimport *
from crackle.includes.io cimport pread, preadv, pwrite, pwritev
from crackle.memory.guest cimport GuestMemory


cdef class Engine:
    """The Sync engine, and the interface of all."""

    def __cinit__(self, GuestMemory memory not None, *args):
        self.memory = memory
        self.fd = self.event_fd = -1

    cdef void use(self, int fd) noexcept nogil:
        """Work on this file from now on. Nothing is in flight."""
        self.fd = fd

    cdef request *take(self) noexcept nogil:
        """A request to fill in, the same one until it is submitted; NULL when all are in flight."""
        return &self.only

    cdef bint submit(self, request *r) noexcept nogil:
        """Carry it out, or put it among those that `kick` hands over; whether it is done."""
        cdef ssize_t n
        while True:
            if r.what == DO_READ:
                if r.count == 1:
                    n = pread(self.fd, r.iov.iov_base, r.iov.iov_len, <long> r.offset)
                else:
                    n = preadv(self.fd, r.iov, r.count, <long> r.offset)
            elif r.what == DO_WRITE:
                if r.count == 1:
                    n = pwrite(self.fd, r.iov.iov_base, r.iov.iov_len, <long> r.offset)
                else:
                    n = pwritev(self.fd, r.iov, r.count, <long> r.offset)
            elif r.what == DO_FLUSH:
                n = fdatasync(self.fd)
            else:
                n = fallocate(self.fd, r.mode, <long> r.offset, <long> r.length)
            if self.advance(r, -errno if n < 0 else n):
                return True

    cdef bint kick(self) noexcept nogil:
        """Hand over what was submitted; whether there was anything."""
        return False

    cdef request *completed(self) noexcept nogil:
        """A request that is done, or NULL; the caller releases it."""
        return NULL

    cdef void release(self, request *r) noexcept nogil:
        pass

    cdef bint wait(self) noexcept nogil:
        """Wait until something is done; False when nothing is in flight."""
        return False

    cdef bint ready(self) noexcept nogil:
        """Whether `completed` would give something, as far as can be told without a system call."""
        return False

    cdef bint announce(self, bint on) noexcept nogil:
        """Write `event_fd` when something is done, from now on or no more; whether something is done already."""
        return False

    cdef bint advance(self, request *r, ssize_t result) noexcept nogil:
        """A system call for `r` gave `result`, bytes or -errno: whether that was the end of it."""
        cdef uint64_t n
        if result == -EINTR:
            return False
        if result == -EOPNOTSUPP and r.mode != r.fallback:
            r.mode = r.fallback
            return False
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
