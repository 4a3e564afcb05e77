from libc.stdint cimport uint32_t, uint64_t

from crackle.memory.guest cimport GuestMemory
from crackle.virtio.block.layers cimport MAX_FILES, stack
from crackle.virtio.block.request cimport request

# What became of a request that was submitted.
cdef enum:
    REQUEST_DONE = 0
    REQUEST_BEGUN = 1       # a piece of it is done: submit it again
    REQUEST_IN_FLIGHT = 2   # `completed` gives it back
    REQUEST_WAITS = 3       # for the writes in flight: submit it again when there are none

cdef class Engine:
    cdef GuestMemory memory
    cdef int[MAX_FILES] fds     # what the disk is made of: the file, or its layers
    cdef stack *layers          # NULL for a file alone
    cdef readonly int event_fd
    cdef request only
    cdef uint32_t writing       # writes in flight
    cdef bint winding_down      # what is begun is given back unfinished, rather than gone on with

    cdef int use(self, int fd, stack *layers) noexcept nogil
    cdef request *take(self) noexcept nogil
    cdef int submit(self, request *r) noexcept nogil
    cdef bint kick(self) noexcept nogil
    cdef request *completed(self) noexcept nogil
    cdef void release(self, request *r) noexcept nogil
    cdef int wait(self, uint64_t until) noexcept nogil
    cdef bint ready(self) noexcept nogil
    cdef bint announce(self, bint on) noexcept nogil
    cdef void cut_piece(self, request *r) noexcept nogil
    cdef bint advance(self, request *r, ssize_t result) noexcept nogil
    cdef int prepare_layers(self, request *r) noexcept nogil
    cdef uint64_t note_written(self, request *r, uint64_t n) noexcept nogil
    cdef void mark_written(self, void *host, uint64_t size) noexcept nogil
    cdef void shut_down(self) noexcept nogil
