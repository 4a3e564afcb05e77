from libc.stdint cimport uint32_t, uint64_t

from crackle.virtio.vsock.credit cimport CreditPool
from crackle.virtio.vsock.table cimport Table, connection

cdef class Streams:
    cdef Table table
    cdef readonly CreditPool pool
    cdef uint32_t greetings         # connections in that state
    cdef readonly uint64_t added, killed, removed

    cdef uint32_t credit(self, connection *c) noexcept nogil
    cdef bint sendable(self, connection *c) noexcept nogil
    cdef void ready(self, connection *c) noexcept nogil
    cdef void begin(self, connection *c, uint32_t host_port, uint32_t guest_port) noexcept nogil
    cdef void passed_on(self, connection *c, uint32_t size) noexcept nogil
    cdef void tell(self, connection *c, uint32_t flags) noexcept nogil
    cdef void hang_up(self, connection *c) noexcept nogil
    cdef void finish(self, connection *c) noexcept nogil
    cdef void kill(self, connection *c) noexcept nogil
    cdef void forget(self, connection *c) noexcept nogil
    cdef void release(self, connection *c) noexcept nogil
    cdef void release_all(self) noexcept nogil
    cdef void disown(self) noexcept nogil
