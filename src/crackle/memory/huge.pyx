"""Small pages of guest memory made into huge ones, while the guest runs: what a fork copies is their tables.

A fork looks at each page of the process, and at a huge one (2 MiB) as at a small one. MADV_COLLAPSE (madvise(2), Linux 6.1)
moves the small ones of a range into a huge one, one range after the other, each for less than a millisecond. A range is left
as it is unless half of it is there, so that memory grows little, and while any of its pages is another process's too: that
would copy what a fork has shared.
"""

from libc.stdint cimport uint64_t, uintptr_t
from posix.unistd cimport close

from crackle.includes.io cimport pread
from crackle.memory.guest cimport GuestMemory
from crackle.memory.region cimport HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, Region
from crackle.runtime.mappings cimport open_pagemap
from crackle.runtime.threads cimport now_ns


cdef extern from * nogil:
    """
    #include <sys/mman.h>
    #ifndef MADV_COLLAPSE     /* <linux/mman.h>, as of 6.1 */
    #define MADV_COLLAPSE 25
    #endif
    """
    enum:
        MADV_COLLAPSE
    int madvise(void *address, size_t size, int advice)

cdef enum:
    PAGES = HUGE_PAGE_SIZE >> PAGE_SHIFT
    LEAST = PAGES // 2

# Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).
cdef uint64_t PM_PRESENT = <uint64_t> 1 << 63
cdef uint64_t PM_MMAP_EXCLUSIVE = <uint64_t> 1 << 56


cdef bint is_zero(const uint64_t *page) noexcept nogil:
    """What was only ever read is the kernel's page of zeros, which everybody has."""
    cdef int i
    for i in range(PAGE_SIZE >> 3):
        if page[i]:
            return False
    return True


cdef bint is_worth_it(int pagemap, uintptr_t address) noexcept nogil:
    """Whether the range that begins there has enough pages, all of them this process's alone."""
    cdef uint64_t entries[PAGES]
    cdef int i, present = 0
    if pread(pagemap, entries, sizeof(entries), <long> (address >> PAGE_SHIFT << 3)) != sizeof(entries):
        return False
    for i in range(PAGES):
        if entries[i] & PM_PRESENT:
            if entries[i] & PM_MMAP_EXCLUSIVE:
                present += 1
            elif not is_zero(<const uint64_t *> (address + (<uintptr_t> i << PAGE_SHIFT))):
                return False
    return present >= LEAST


def gather_pages(GuestMemory memory not None, double seconds):
    """Make huge pages of anonymous guest memory, as far as that helps and the time goes; how many ranges are huge now.

    Those that nothing was to be done for are not counted. 0 where the kernel cannot, or tells of no pages.
    """
    cdef Region region
    cdef uint64_t until = now_ns() + <uint64_t> (seconds * 1e9)
    cdef uintptr_t at, end
    cdef int done = 0, pagemap
    if memory.backing == "file":
        return 0
    pagemap = open_pagemap()
    if pagemap < 0:
        return 0
    for region in memory.regions:
        at = (<uintptr_t> region.r.hva + HUGE_PAGE_SIZE - 1) & ~<uintptr_t> (HUGE_PAGE_SIZE - 1)
        end = <uintptr_t> region.r.hva + region.r.size
        with nogil:
            while at + HUGE_PAGE_SIZE <= end and now_ns() < until:
                if is_worth_it(pagemap, at) and madvise(<void *> at, HUGE_PAGE_SIZE, MADV_COLLAPSE) == 0:
                    done += 1
                at += HUGE_PAGE_SIZE
    close(pagemap)
    return done
