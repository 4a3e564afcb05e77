from libc.stdint cimport uint8_t, uint32_t, uint64_t

from crackle.includes.io cimport iovec
from crackle.virtio.vsock.table cimport connection

cdef class CreditPool:
    cdef uint64_t granted       # beyond what each connection has anyway
    cdef uint32_t sharers       # that have been granted any
    cdef uint8_t *spare_ring

    cdef uint32_t share(self, uint32_t room) noexcept nogil
    cdef void open(self, connection *c) noexcept nogil
    cdef void close(self, connection *c) noexcept nogil
    cdef void resize(self, connection *c) noexcept nogil
    cdef void set_room(self, connection *c, uint32_t room) noexcept nogil
    cdef bint may_hold(self, connection *c, uint32_t size) noexcept nogil
    cdef bint hold(self, connection *c, const iovec *iov, int count, size_t skip) noexcept nogil
    cdef bint enlarge(self, connection *c) noexcept nogil
    cdef int held_parts(self, connection *c, iovec *parts) noexcept nogil
    cdef void let_go(self, connection *c, uint32_t size) noexcept nogil
    cdef void drop_ring(self, connection *c) noexcept nogil
