from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    MAX_REGIONS = 16
    PAGE_SHIFT = 12

cdef struct region_t:
    uint64_t gpa
    uint64_t size
    uint8_t *hva
    uint64_t *dirty         # one bit a page, or NULL when writes are not tracked

cdef class Region:
    cdef region_t r
    cdef readonly int fd
    cdef readonly uint64_t offset
    cdef int exports
    cdef void unmap(self) noexcept

cdef class GuestMemory:
    cdef region_t table[MAX_REGIONS]
    cdef int count
    cdef readonly tuple regions
    cdef readonly uint64_t size
    cdef int memfd
    cdef readonly bint tracking
    cdef uint8_t *_checked(self, gpa, size) except NULL
    # Host address of [gpa, gpa + size), or NULL unless the whole range is inside one region.
    cdef uint8_t *span(self, uint64_t gpa, uint64_t size) noexcept nogil
    # Notes that the VMM wrote there: KVM's own dirty log sees only what vCPUs write.
    cdef void mark_dirty(self, uint64_t gpa, uint64_t size) noexcept nogil
    # The same for [hva, hva + size), a range that span() gave.
    cdef void mark_dirty_at(self, const uint8_t *hva, uint64_t size) noexcept nogil
