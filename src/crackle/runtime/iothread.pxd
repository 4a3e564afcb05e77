from libc.stdint cimport uint32_t, uint64_t

from crackle.runtime.clock cimport MachineClock
from crackle.runtime.threads cimport Worker

ctypedef void (*event_handler)(void *context, uint32_t events) noexcept nogil

cdef struct event_source:
    int fd
    bint live
    int removed             # nobody is to call its handler any more
    event_handler handler
    void *context
    event_source *following     # among all
    event_source *next          # among the removed
    uint64_t ticket         # of its removal

cdef class IoThread(Worker):
    cdef int epoll_fd
    cdef int wake_fd
    cdef str kind
    cdef readonly MachineClock clock
    cdef uint64_t spin_ns       # what its devices may look out for more, before they ask to be notified
    cdef dict owners            # by address of the source
    cdef event_source *sources
    cdef event_source *removed  # taken out of the set, while the present batch may still hold them
    cdef event_source *gone     # which nobody looks at: their memory and owners go with the GIL
    cdef uint64_t removals      # so far,
    cdef uint64_t passed        # and of those, how many nobody looks at any more
    cdef int settling           # `settle` waits
    cdef uint64_t settled
    cdef readonly uint64_t wakeups
    cdef event_source *add(self, int fd, uint32_t events, event_handler handler, void *context, object owner) except NULL
    cdef int modify(self, event_source *source, uint32_t events) noexcept nogil
    cdef void remove(self, event_source *source) noexcept nogil
    cdef void take_out(self, event_source *source) noexcept nogil
    cdef void between_batches(self) noexcept nogil
    cdef void bury(self)
    cdef int look(self, int timeout) noexcept nogil
    cdef void loop(self) noexcept nogil
    cdef void wake(self) noexcept nogil
