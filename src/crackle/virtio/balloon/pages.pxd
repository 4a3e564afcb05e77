from libc.stdint cimport uint8_t, uint32_t, uint64_t

from crackle.memory.guest cimport GuestMemory
from crackle.virtio.queue cimport chain

cdef enum:
    # Page frame numbers that are collected before they are given back: 32 MiB of memory, and the most that a chain may have.
    BATCH = 8192

cdef class Pages:
    cdef GuestMemory memory
    cdef uint32_t numbers[BATCH]
    cdef uint32_t spare[BATCH]
    cdef uint32_t count
    # Of huge pages, which the host gets back as a whole: a bit for each small page that is in the balloon; NULL without any.
    cdef uint64_t *inside
    cdef uint64_t inside_pages
    cdef readonly uint64_t freed_bytes, freed_runs, outside, refused

    cdef bint add(self, const chain *c) noexcept nogil
    cdef void give_back(self) noexcept nogil
    cdef void give_run(self, uint64_t gpa, uint64_t end) noexcept nogil
    cdef void give_huge(self, uint64_t gpa, uint64_t end) noexcept nogil
    cdef void take_out(self) noexcept nogil
    cdef void forget(self) noexcept nogil
