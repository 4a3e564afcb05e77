from libc.stdint cimport uint8_t, uint64_t

from crackle.memory.region cimport Region, region_t

cdef enum:
    MAX_REGIONS = 16

    # Where pages come from that nobody has touched: the kernel; a source; a source that gives none any more.
    PAGES_THERE = 0
    PAGES_COME = 1
    PAGES_LOST = 2

# What is inside guest memory at one time, ascending. A table that has been published never changes.
cdef struct region_table:
    int count
    region_table *older     # until nobody looks at it any more
    region_t regions[MAX_REGIONS]

cdef class GuestMemory:
    cdef region_table *table
    cdef readonly tuple regions
    cdef readonly uint64_t size
    cdef readonly str backing
    cdef int memfd
    cdef readonly bint tracking
    cdef list listeners
    cdef list given_up
    cdef readonly object source
    cdef int pages
    cdef list _cover(self, gpa, size)
    cdef list _live_listeners(self)
    cdef object _publish(self, regions)
    cdef object _take_away(self, Region region, list told)
    cdef void _forget_older(self) noexcept
    # Host address of [gpa, gpa + size), or NULL unless the whole range is inside one region.
    cdef uint8_t *span(self, uint64_t gpa, uint64_t size) noexcept nogil
    # The region that `gpa` is in, or NULL; for as long as its listener has not answered.
    cdef const region_t *find(self, uint64_t gpa) noexcept nogil
    # How many of the `size` bytes at `gpa` lie together in one region, and where: `host` is set unless that is 0.
    cdef uint64_t piece(self, uint64_t gpa, uint64_t size, uint8_t **host) noexcept nogil
    # Waits for the pages of [host, host + size), a range that span() or piece() gave, where `pages` is not PAGES_THERE.
    cdef void fetch(self, const uint8_t *host, uint64_t size) noexcept nogil
    # Whether `release` was called: what has been read since may be zeros, whatever it was.
    cdef bint has_lost(self) noexcept nogil
    # Notes that the VMM wrote there: KVM's own dirty log sees only what vCPUs write.
    cdef void mark_dirty(self, uint64_t gpa, uint64_t size) noexcept nogil
    # The same for [hva, hva + size), a range that span() or piece() gave.
    cdef void mark_dirty_at(self, const uint8_t *hva, uint64_t size) noexcept nogil
