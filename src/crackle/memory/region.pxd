from libc.stdint cimport uint8_t, uint64_t

cdef enum:
    PAGE_SHIFT = 12
    PAGE_SIZE = 1 << PAGE_SHIFT
    HUGE_PAGE_SIZE = 2 << 20

cdef struct region_t:
    uint64_t gpa
    uint64_t size
    uint8_t *hva
    uint64_t *dirty         # one bit a page, or NULL when writes are not tracked
    uint64_t page           # bytes of which the host has all or none
    bint shared             # the bytes are a file's, for whoever else has it

cdef class Region:
    cdef region_t r
    cdef readonly int fd
    cdef readonly uint64_t offset
    cdef bint owns_fd
    cdef int exports
    cdef void unmap(self) noexcept
    cdef int track(self, bint enable) except -1
    cdef int map_private(self, int fd, uint64_t offset, bint transparent) except -1
    cdef bytes take_dirty(self)
    cdef int load(self, uint64_t place, int fd, uint64_t offset, uint64_t size) except -1

# The pages of [offset, offset + size) have been written.
cdef void mark(region_t *r, uint64_t offset, uint64_t size) noexcept nogil

# A memfd of `size` bytes, sealed; ConfigError when the host has none.
cdef int make_memfd(uint64_t size, str backing) except -1

# Maps a region and returns it. `fd`: where its bytes are from `offset` on, or -1; owned: the region closes it.
cdef Region map_region(uint64_t gpa, uint64_t size, str backing, int fd, uint64_t offset, bint shared, bint owned)
