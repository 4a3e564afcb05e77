from libc.stdint cimport uint32_t, uint64_t

ctypedef void (*event_handler)(void *context, uint32_t events) noexcept nogil

cdef struct event_source:
    int fd
    bint live
    event_handler handler
    void *context

cdef class IoThread:
    cdef int epoll_fd
    cdef int wake_fd
    cdef bytes name
    cdef void *sync
    cdef int ask
    cdef int state
    cdef bint joined
    cdef list owners
    cdef event_source **sources
    cdef int count
    cdef readonly uint64_t wakeups
    cdef event_source *add(self, int fd, uint32_t events, event_handler handler, void *context, object owner) except NULL
    cdef int modify(self, event_source *source, uint32_t events) noexcept nogil
    cdef int look(self, int timeout) noexcept nogil
    cdef void loop(self) noexcept nogil
    cdef bint is_current(self) noexcept nogil
    cdef int check_waiter(self) except -1
    cdef wake(self, int ask)
