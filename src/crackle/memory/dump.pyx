"""Guest memory to a memory file: the regions one after the other, raw and sparse, as Firecracker's are.

A page that nobody has touched, or that is all zeros, stays a hole. What a restored guest has not changed is copied from the
memory file that it came from, within the kernel; what it has goes from its memory, in runs as long as they come. All of it
runs without the GIL. /proc/self/pagemap says which pages are there (Documentation/admin-guide/mm/pagemap.rst); where there
is none, each page is looked at.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, ENXIO, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from posix.unistd cimport close, lseek

from crackle.includes.io cimport pread, pwrite
from crackle.memory.guest cimport GuestMemory
from crackle.memory.region cimport PAGE_SHIFT, PAGE_SIZE, Region
from crackle.runtime.mappings cimport open_pagemap

import os


cdef extern from "<unistd.h>" nogil:
    enum:
        SEEK_DATA
        SEEK_HOLE
    ssize_t copy_file_range(int from_fd, long *from_offset, int to_fd, long *to_offset, size_t size, unsigned int flags)

cdef enum:
    # Pages looked at together: 32 MiB of guest memory
    CHUNK = 8192
    # Bytes that the kernel is asked to write at once
    MOST = 64 << 20

    # Places that are remembered, at most
    SAMPLES = 32

    # Where the contents of a page are, when it has some
    NOWHERE = 0
    MEMORY = 1
    FILE = 2

# Bits of an entry of pagemap.
cdef uint64_t PM_PRESENT = <uint64_t> 1 << 63
cdef uint64_t PM_SWAP = <uint64_t> 1 << 62
cdef uint64_t PM_FILE = <uint64_t> 1 << 61


cdef struct source:
    uint8_t *hva
    uint64_t pages
    int file                # the memory file that the region came from, or -1
    uint64_t offset         # where in it
    int pagemap             # or -1
    uint64_t begin, end     # the last extent with data looked up in `file`
    uint8_t where[CHUNK]
    uint64_t entries[CHUNK]


cdef struct samples:
    uint64_t offsets[SAMPLES]
    int count
    uint64_t step, seen


cdef int refuse(int error) except -1 with gil:
    raise OSError(error, os.strerror(error))


cdef bint is_zero(const uint8_t *page) noexcept nogil:
    cdef const uint64_t *words = <const uint64_t *> page
    cdef int i
    cdef uint64_t any
    for i in range(0, PAGE_SIZE >> 3, 8):
        any = words[i] | words[i + 1] | words[i + 2] | words[i + 3]
        any |= words[i + 4] | words[i + 5] | words[i + 6] | words[i + 7]
        if any:
            return False
    return True


cdef bint in_file(source *s, uint64_t page) noexcept nogil:
    """Whether the memory file has data there; pages are asked for in ascending order."""
    cdef uint64_t at = s.offset + (page << PAGE_SHIFT)
    cdef long found
    if at >= s.end:
        found = lseek(s.file, <long> at, SEEK_DATA)
        if found < 0:
            # Nothing but a hole from here on; a file system that cannot tell has no holes.
            s.begin = <uint64_t> -1 if errno == ENXIO else at
            s.end = <uint64_t> -1
        else:
            s.begin = <uint64_t> found >> PAGE_SHIFT << PAGE_SHIFT
            found = lseek(s.file, found, SEEK_HOLE)
            s.end = <uint64_t> -1 if found < 0 else <uint64_t> found + PAGE_SIZE - 1 >> PAGE_SHIFT << PAGE_SHIFT
    return at >= s.begin


cdef int read_pagemap(source *s, uint64_t first, uint64_t count) noexcept nogil:
    cdef ssize_t n
    cdef size_t done = 0, size = count * 8
    cdef uint64_t at = ((<uint64_t> s.hva >> PAGE_SHIFT) + first) << 3
    while s.pagemap >= 0 and done < size:
        n = pread(s.pagemap, <uint8_t *> s.entries + done, size - done, <long> (at + done))
        if n < 0 and errno == EINTR:
            continue
        if n <= 0:
            return -1
        done += n
    return 0


cdef bint is_own(source *s, uint64_t i) noexcept nogil:
    """Whether the `i`-th of the pages last read is the guest's own, and not as it is in the memory file."""
    cdef uint64_t entry = s.entries[i]
    return s.pagemap < 0 or entry & (PM_PRESENT | PM_SWAP) != 0 and not (s.file >= 0 and entry & PM_FILE)


cdef int look(source *s, uint64_t first, uint64_t count) noexcept nogil:
    """Fill `where` for `count` pages from `first` on: those whose contents may not be zeros. -1 with errno."""
    cdef uint64_t i
    if read_pagemap(s, first, count) < 0:
        return -1
    for i in range(count):
        if is_own(s, i):
            s.where[i] = NOWHERE if is_zero(s.hva + (first + i << PAGE_SHIFT)) else MEMORY
        else:
            s.where[i] = FILE if s.file >= 0 and in_file(s, first + i) else NOWHERE
    return 0


cdef int write_all(int fd, const uint8_t *data, uint64_t size, uint64_t offset) noexcept nogil:
    cdef ssize_t n
    while size:
        n = pwrite(fd, data, min(size, <uint64_t> MOST), <long> offset)
        if n < 0 and errno == EINTR:
            continue
        if n < 0:
            return -1
        data, size, offset = data + n, size - <uint64_t> n, offset + <uint64_t> n
    return 0


cdef int copy_all(source *s, int fd, uint64_t page, uint64_t count, uint64_t offset) noexcept nogil:
    """Pages that are as in the memory file: from file to file, without reading them in where the kernel can do so."""
    cdef long from_at = <long> (s.offset + (page << PAGE_SHIFT)), to_at = <long> offset
    cdef uint64_t left = count << PAGE_SHIFT
    cdef ssize_t n
    while left:
        n = copy_file_range(s.file, &from_at, fd, &to_at, left, 0)
        if n < 0 and errno == EINTR:
            continue
        if n <= 0:
            break
        left -= <uint64_t> n
    return write_all(fd, s.hva + (page + count << PAGE_SHIFT) - left, left, <uint64_t> to_at)


cdef void take_sample(samples *s, uint64_t offset) noexcept nogil:
    """Note every `step`-th of the pages seen; when there is no room for more, every other one goes."""
    cdef int i
    if s.seen % s.step == 0:
        if s.count == SAMPLES:
            for i in range(SAMPLES >> 1):
                s.offsets[i] = s.offsets[2 * i]
            s.count >>= 1
            s.step <<= 1
        if s.seen % s.step == 0:
            s.offsets[s.count] = offset
            s.count += 1
    s.seen += 1


cdef int scan(source *s, int fd, uint64_t base, samples *found) noexcept nogil:
    """Write a region's contents to `fd` from `base` on, unless it is -1; -1 with errno."""
    cdef uint64_t first = 0, count, i, j, k, at
    while first < s.pages:
        count = min(<uint64_t> CHUNK, s.pages - first)
        if look(s, first, count) < 0:
            return -1
        i = 0
        while i < count:
            j = i + 1
            while j < count and s.where[j] == s.where[i]:
                j += 1
            at = base + (first + i << PAGE_SHIFT)
            if s.where[i] != NOWHERE:
                for k in range(j - i):
                    take_sample(found, at + (k << PAGE_SHIFT))
            if fd >= 0 and s.where[i] == MEMORY:
                if write_all(fd, s.hva + (first + i << PAGE_SHIFT), j - i << PAGE_SHIFT, at):
                    return -1
            elif fd >= 0 and s.where[i] == FILE:
                if copy_all(s, fd, first + i, j - i, at):
                    return -1
            i = j
        first += count
    return 0


cdef int write_marked(source *s, int fd, uint64_t base, const uint64_t *marks, uint64_t *written) noexcept nogil:
    cdef uint64_t i = 0, j
    while i < s.pages:
        if not marks[i >> 6] >> (i & 63) & 1:
            i += 1
            continue
        j = i + 1
        while j < s.pages and marks[j >> 6] >> (j & 63) & 1:
            j += 1
        if write_all(fd, s.hva + (i << PAGE_SHIFT), j - i << PAGE_SHIFT, base + (i << PAGE_SHIFT)):
            return -1
        written[0] += j - i
        i = j
    return 0


cdef class Scan:
    """What of `memory` has contents. The machine is paused, and nobody changes the regions meanwhile.

    `samples`: where some dozens of the pages that have are in the memory file, evenly spread. `pages`: how many there are.
    """

    cdef readonly list samples
    cdef readonly uint64_t pages

    def __init__(self, GuestMemory memory not None, int fd=-1):
        """fd: a new, empty file of the memory's size, which gets the contents. OSError when it does not take them."""
        cdef source *s = new_source()
        cdef samples found
        cdef Region region
        cdef uint64_t base = 0
        cdef int i
        memset(&found, 0, sizeof(found))
        found.step = 1
        try:
            for region in memory.regions:
                use_region(s, region, memory.backing == "file")
                with nogil:
                    if scan(s, fd, base, &found):
                        refuse(errno)
                base += region.r.size
        finally:
            free_source(s)
        self.samples = [found.offsets[i] for i in range(found.count)]
        self.pages = found.seen


def write_pages(GuestMemory memory not None, int fd, marks):
    """Write the pages that the bitmaps `marks`, one for each region, name to their places in a memory file; how many.

    Pages of zeros too: they have been something else before. OSError when the file does not take them.
    """
    cdef source *s = new_source()
    cdef Region region
    cdef bytes bitmap
    cdef const uint64_t *bits
    cdef uint64_t base = 0, written = 0
    try:
        for region, bitmap in zip(memory.regions, marks, strict=True):
            if <uint64_t> len(bitmap) << 3 < region.r.size >> PAGE_SHIFT:
                raise ValueError(f"{len(bitmap)} bytes are too few for the pages of {region!r}")
            use_region(s, region, False)
            bits = <const uint64_t *> PyBytes_AS_STRING(bitmap)
            with nogil:
                if write_marked(s, fd, base, bits, &written):
                    refuse(errno)
            base += region.r.size
    finally:
        free_source(s)
    return written


def resident_pages(GuestMemory memory not None):
    """For each region, the bitmap of the pages that are the guest's own: touched since the start, or changed since a restore.

    The layout is that of KVM_GET_DIRTY_LOG. Where the host does not say, all are.
    """
    cdef source *s = new_source()
    cdef Region region
    cdef uint64_t first, count, i
    cdef uint64_t *bits
    result = []
    try:
        for region in memory.regions:
            use_region(s, region, memory.backing == "file")
            bitmap = PyBytes_FromStringAndSize(NULL, (s.pages + 63) >> 6 << 3)
            bits = <uint64_t *> PyBytes_AS_STRING(bitmap)
            memset(bits, 0, len(bitmap))
            for first in range(0, s.pages, CHUNK):
                count = min(<uint64_t> CHUNK, s.pages - first)
                with nogil:
                    if read_pagemap(s, first, count):
                        refuse(errno)
                    for i in range(count):
                        if is_own(s, i):
                            bits[first + i >> 6] |= <uint64_t> 1 << (i & 63)
            result.append(bitmap)
    finally:
        free_source(s)
    return result


def copy_data(int from_fd, int to_fd, uint64_t size):
    """Copy what is no hole of the first `size` bytes from one file to another, in the kernel where it can; OSError."""
    cdef long at = 0, end, there
    cdef ssize_t n
    cdef bytes block
    while True:
        at = lseek(from_fd, at, SEEK_DATA)
        if at < 0 and errno == ENXIO or at >= <long> size:
            return
        if at < 0:
            refuse(errno)
        end = min(lseek(from_fd, at, SEEK_HOLE), <long> size)
        while at < end:
            there = at
            with nogil:
                n = copy_file_range(from_fd, &at, to_fd, &there, <size_t> (end - at), 0)
            if n < 0 and errno == EINTR:
                continue
            if n <= 0:
                block = os.pread(from_fd, min(end - at, 1 << 20), at)
                if not block:
                    return
                if write_all(to_fd, <const uint8_t *> PyBytes_AS_STRING(block), len(block), <uint64_t> at):
                    refuse(errno)
                at += len(block)


cdef source *new_source() except NULL:
    cdef source *s = <source *> malloc(sizeof(source))
    if s == NULL:
        raise MemoryError
    s.pagemap = open_pagemap()
    return s


cdef void free_source(source *s) noexcept:
    if s.pagemap >= 0:
        close(s.pagemap)
    free(s)


cdef void use_region(source *s, Region region, bint from_file) noexcept:
    s.hva, s.pages = region.r.hva, region.r.size >> PAGE_SHIFT
    s.file, s.offset = region.fd if from_file else -1, region.offset
    s.begin = s.end = 0
