from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from crackle.includes.io cimport iovec
from crackle.memory.guest cimport GuestMemory

cdef enum operation:
    DO_NOTHING          # the request has its answer already
    DO_READ
    DO_WRITE
    DO_FLUSH
    DO_ALLOCATE         # fallocate(2): discard, write zeroes

# What a guest asked for, checked: no address or number in it is the guest's to change any more.
cdef struct request:
    operation what
    uint16_t head           # of its chain
    uint8_t answer          # VIRTIO_BLK_S_*, while `error` is 0
    bint invalid            # no request of this device's
    int error               # errno of what failed
    int mode                # of fallocate
    int fallback            # the mode to try where that one is not supported
    uint64_t *counted       # counter of such requests, NULL for none
    uint8_t *status         # the guest's byte for the answer, NULL where it gave none
    uint64_t length         # bytes to move; bytes written to the guest's buffers for DO_NOTHING
    uint64_t left           # of them
    uint64_t offset         # in the file, of what is left
    uint64_t started        # ns
    uint64_t number         # of writes submitted before it
    uint32_t waits_for      # writes that a flush is held back for
    int count               # buffers left ...
    iovec *iov              # ... and where they are
    iovec one

cdef class Engine:
    cdef GuestMemory memory
    cdef int fd
    cdef readonly int event_fd
    cdef request only
    cdef uint32_t writing       # writes in flight

    cdef void use(self, int fd) noexcept nogil
    cdef request *take(self) noexcept nogil
    cdef bint submit(self, request *r) noexcept nogil
    cdef bint kick(self) noexcept nogil
    cdef request *completed(self) noexcept nogil
    cdef void release(self, request *r) noexcept nogil
    cdef bint wait(self) noexcept nogil
    cdef bint ready(self) noexcept nogil
    cdef bint announce(self, bint on) noexcept nogil
    cdef bint advance(self, request *r, ssize_t result) noexcept nogil
    cdef void mark_written(self, void *host, uint64_t size) noexcept nogil
    cdef void shut_down(self) noexcept nogil
