from libc.stdint cimport uint64_t

cdef class MachineClock:
    cdef uint64_t word      # what it has lost, ns; or, while it stands still, what it shows, and STANDS
    cdef uint64_t now(self) noexcept nogil
    cdef bint stands(self) noexcept nogil
