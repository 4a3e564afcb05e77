"""How virtio-block's requests reach the file: what engines share, and the Sync engine, one system call a piece.

A device takes a `request` of an engine, fills it in and submits it. It may be done at once; if not, it is to be submitted
again, or `completed` gives it back later. A large request goes in pieces, so that neither a turn of the I/O thread nor what
is in flight has more bytes than a disk moves in a moment; where a disk is made of layers, a piece is in one of them.
Everything but `__init__` runs with the device's lock held. An engine does not own the files.
"""

from libc.errno cimport EINTR, EIO, ENOSPC, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint64_t

from crackle.includes.block cimport *
from crackle.includes.io cimport pread, preadv, pwrite, pwritev
from crackle.memory.guest cimport GuestMemory
from crackle.virtio.block.layers cimport BLOCK, BLOCK_SHIFT, find_run, is_here, prepare, stack, sync, take_over
from crackle.virtio.block.request cimport DO_ALLOCATE, DO_FLUSH, DO_READ, DO_WRITE


cdef enum:
    # Bytes that one system call moves, and bytes that one gives back or zeroes, from a multiple of it on.
    PIECE = 1 << 20
    ALLOCATE_PIECE = 64 << 20


cdef class Engine:
    """The Sync engine, and the interface of all."""

    def __cinit__(self, GuestMemory memory not None, *args):
        self.memory = memory
        self.fds[0] = self.event_fd = -1

    cdef int use(self, int fd, stack *layers) noexcept nogil:
        """Work on this file, or on these layers, from now on; nothing is in flight. 0, or the errno why that cannot be."""
        cdef int i
        self.layers, self.fds[0] = layers, fd
        if layers != NULL:
            for i in range(layers.count):
                self.fds[i] = layers.files[i].fd
        return 0

    cdef request *take(self) noexcept nogil:
        """A request to fill in, the same one until it is submitted; NULL when as much as may be is in flight."""
        return &self.only

    cdef int submit(self, request *r) noexcept nogil:
        """Carry out a piece of it, or put that among what `kick` hands over: REQUEST_DONE, ..."""
        cdef ssize_t n
        if self.layers != NULL and self.prepare_layers(r):
            return REQUEST_DONE
        self.cut_piece(r)
        if r.what == DO_READ:
            if r.piece_count == 1:
                n = pread(self.fds[r.file], r.iov.iov_base, r.iov.iov_len, <long> r.at)
            else:
                n = preadv(self.fds[r.file], r.iov, r.piece_count, <long> r.at)
        elif r.what == DO_WRITE:
            if r.piece_count == 1:
                n = pwrite(self.fds[0], r.iov.iov_base, r.iov.iov_len, <long> r.at)
            else:
                n = pwritev(self.fds[0], r.iov, r.piece_count, <long> r.at)
        elif r.what == DO_FLUSH:
            if self.layers != NULL:
                r.error = sync(self.layers)
                return REQUEST_DONE
            n = fdatasync(self.fds[0])
        else:
            n = fallocate(self.fds[0], r.mode, <long> r.at, <long> r.piece)
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
        cdef uint64_t total = 0, most = PIECE
        r.piece, r.piece_count, r.cut, r.file, r.at = r.left, r.count, 0, 0, r.offset
        if self.layers != NULL:
            if r.what == DO_READ:
                most = find_run(self.layers, r.offset, min(r.left, <uint64_t> PIECE), &r.file)
            else:
                # Whole blocks, but at the ends, which are made whole.
                most -= r.offset & (BLOCK - 1)
            r.at += self.layers.files[r.file].start
        if r.what == DO_ALLOCATE:
            r.piece = min(r.left, ALLOCATE_PIECE - r.offset % ALLOCATE_PIECE)
        elif r.left > most and (r.what == DO_READ or r.what == DO_WRITE):
            r.piece, r.piece_count = most, 0
            while total < most:
                total += r.iov[r.piece_count].iov_len
                r.piece_count += 1
            r.cut = total - most
            r.iov[r.piece_count - 1].iov_len -= r.cut

    cdef int prepare_layers(self, request *r) noexcept nogil:
        """What has to be in the overlay before `r` writes to it: 0, MUST_WAIT, or its error."""
        cdef int result
        if r.left != r.length or r.what == DO_READ or r.what == DO_FLUSH:
            return 0
        result = prepare(self.layers, r.offset, r.length, r.what == DO_WRITE or r.zeroes, self.writing == 0, &r.claim)
        if result > 0:
            r.error = result
        return result

    cdef uint64_t note_written(self, request *r, uint64_t n) noexcept nogil:
        """`n` bytes of `r` are in the overlay: have them read from there. How many of them count."""
        cdef uint64_t end = r.offset + n
        if n < r.left and end & (BLOCK - 1) and not is_here(self.layers, end >> BLOCK_SHIFT):
            # Half a block: the rest would be read from there too.
            end &= ~<uint64_t> (BLOCK - 1)
            if end <= r.offset:
                r.error = ENOSPC
                return r.left
            n = end - r.offset
        take_over(self.layers, r.offset, n)
        return n

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
            if self.layers != NULL:
                take_over(self.layers, r.offset, r.piece)
            r.left -= r.piece
            r.offset += r.piece
            return r.left == 0
        if r.what != DO_READ and r.what != DO_WRITE:
            r.error = <int> -result
            return True
        # 0 is the end of a file that was cut.
        r.error = EIO if result == 0 else <int> -result if result < 0 else 0
        n = r.left if r.error else min(<uint64_t> result, r.left)
        if self.layers != NULL and r.what == DO_WRITE and not r.error:
            n = self.note_written(r, n)
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
