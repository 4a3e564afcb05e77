"""A disk of several files: overlays, of which the first takes the writes, and a base that is never written.

`disk/overlay.py` has the format. The map of each overlay is a mapping of its file, so that opening one reads nothing and all
that share a layer share its map: a read asks the layers one after the other, a bit each, for as many blocks as are in the
same one. A write goes to the first in one piece. A part of a block that is not there yet takes the rest of the block
along first, which changes nothing that anybody sees; the bits of the others are set once the data are there.

Without flush (`ordered` false) the map is the page cache's, as the data are: they outlive the process, and are the host's to
write. With flush the map is the process's own copy, and a flush writes those pages of it that have changed once the data
are on the disk, as they were when it began.

Everything but the class runs with the device's lock held. `Layers` owns the descriptors and mappings.
"""

from libc.errno cimport EINTR, EIO, ENOMEM, ENOSPC, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset, strerror
from posix.mman cimport MAP_FAILED, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.stat cimport fstat, struct_stat
from posix.unistd cimport close

from crackle.includes.block cimport fdatasync
from crackle.includes.io cimport pread, pwrite

from msgspec import structs

from crackle.errors import ConfigError


cdef extern from * nogil:
    int trailing_zeroes "__builtin_ctzll" (uint64_t value)
    int count_ones "__builtin_popcountll" (uint64_t value)

cdef extern from "<sys/mman.h>" nogil:
    enum:
        MADV_RANDOM
    int madvise(void *address, size_t size, int advice)

cdef enum:
    PAGE_SHIFT = 12
    PAGE = 1 << PAGE_SHIFT
    # st_blocks is in units of it, whatever the file system's are (stat(2)).
    STAT_UNIT = 512


# -- which file has what ---------------------------------------------------------------------------------------------

cdef inline bint bit(uint64_t *map, uint64_t block) noexcept nogil:
    return map[block >> 6] >> (block & 63) & 1


cdef bint is_here(stack *s, uint64_t block) noexcept nogil:
    return bit(s.files[0].map, block)


cdef uint64_t alike(uint64_t *map, uint64_t first, uint64_t most, bint here) noexcept nogil:
    """How many of `most` bits from `first` on are as `here` says."""
    cdef uint64_t word, found = 0, at = first
    while found < most:
        word = map[at >> 6]
        if here:
            word = ~word
        word >>= at & 63
        if word:
            return min(most, found + trailing_zeroes(word))
        found += 64 - (at & 63)
        at = first + found
    return most


cdef uint64_t find_run(stack *s, uint64_t offset, uint64_t most, int *index) noexcept nogil:
    cdef uint64_t first = offset >> BLOCK_SHIFT
    cdef uint64_t count = ((offset + most + BLOCK - 1) >> BLOCK_SHIFT) - first
    cdef int i = 0
    cdef bint here = False
    while i < s.count - 1 and not here:
        here = bit(s.files[i].map, first)
        count = alike(s.files[i].map, first, count, here)
        i += not here
    index[0] = i
    return min(most, ((first + count) << BLOCK_SHIFT) - offset)


cdef uint64_t missing(uint64_t *map, uint64_t offset, uint64_t length) noexcept nogil:
    """Bytes of the blocks in this range that a file has not."""
    cdef uint64_t at = offset >> BLOCK_SHIFT, end = (offset + length + BLOCK - 1) >> BLOCK_SHIFT
    cdef uint64_t found = 0, word, n
    while at < end:
        n = min(64 - (at & 63), end - at)
        word = ~map[at >> 6] >> (at & 63)
        if n < 64:
            word &= (<uint64_t> 1 << n) - 1
        found += count_ones(word)
        at += n
    return found << BLOCK_SHIFT


# -- writing ---------------------------------------------------------------------------------------------------------

cdef void take_over(stack *s, uint64_t offset, uint64_t length) noexcept nogil:
    cdef uint64_t at = offset >> BLOCK_SHIFT, end = (offset + length + BLOCK - 1) >> BLOCK_SHIFT
    cdef uint64_t mask, n, taken = 0
    cdef uint64_t *word
    while at < end:
        n = min(64 - (at & 63), end - at)
        mask = (~<uint64_t> 0 if n == 64 else (<uint64_t> 1 << n) - 1) << (at & 63)
        word = &s.files[0].map[at >> 6]
        mask &= ~word[0]
        if mask:
            word[0] |= mask
            taken += count_ones(mask)
            if s.unwritten != NULL:
                s.unwritten[at >> 21] |= <uint64_t> 1 << ((at >> 15) & 63)
        at += n
    s.allowance -= min(s.allowance, taken << BLOCK_SHIFT)


cdef int prepare(stack *s, uint64_t offset, uint64_t length, bint takes_room, bint alone, uint64_t *claim) noexcept nogil:
    cdef uint64_t end = offset + length
    cdef bint head = offset & (BLOCK - 1) and not is_here(s, offset >> BLOCK_SHIFT)
    cdef bint tail = end & (BLOCK - 1) and end != s.size and not is_here(s, end >> BLOCK_SHIFT)
    cdef int error
    if (head or tail) and not alone:
        # A write in flight may be for the rest of the block.
        return MUST_WAIT
    if s.renewal != NULL:
        error = move(True, s.files[0].fd, s.renewal, s.renewal_size, s.renewal_at)
        if error:
            return error
        free(s.renewal)
        s.renewal = NULL
    if s.limit:
        error = claim_room(s, missing(s.files[0].map, offset, length) if takes_room else (head + tail) * BLOCK, alone, claim)
        if error:
            return error
    error = complete(s, offset >> BLOCK_SHIFT) if head else 0
    # The two ends may be in one block.
    if not error and tail and not is_here(s, end >> BLOCK_SHIFT):
        error = complete(s, end >> BLOCK_SHIFT)
    return error


cdef int claim_room(stack *s, uint64_t wanted, bint alone, uint64_t *claim) noexcept nogil:
    """Whether so many bytes more are within the limit. How many the file takes is asked only when they might not be."""
    cdef struct_stat status
    cdef uint64_t taken
    if wanted + s.claimed > s.allowance:
        if not alone:
            return MUST_WAIT
        if fstat(s.files[0].fd, &status):
            return errno
        taken = <uint64_t> status.st_blocks * STAT_UNIT
        s.allowance = s.limit - min(s.limit, taken)
        if wanted > s.allowance:
            return ENOSPC
    claim[0] = wanted
    return 0


cdef int complete(stack *s, uint64_t block) noexcept nogil:
    """Have a block in the first file as it is below."""
    cdef uint64_t offset = block << BLOCK_SHIFT, size = min(<uint64_t> BLOCK, s.size - offset)
    cdef int index, error
    find_run(s, offset, size, &index)
    memset(s.block, 0, BLOCK)
    error = move(False, s.files[index].fd, s.block, size, s.files[index].start + offset)
    if not error:
        error = move(True, s.files[0].fd, s.block, BLOCK, s.files[0].start + offset)
    if not error:
        take_over(s, offset, size)
    return error


cdef int move(bint writes, int fd, uint8_t *data, uint64_t size, uint64_t at) noexcept nogil:
    """Write all of it to a file, or read it from there; 0 or an errno."""
    cdef ssize_t n
    while size:
        n = pwrite(fd, data, size, <long> at) if writes else pread(fd, data, size, <long> at)
        if n < 0 and errno == EINTR:
            continue
        if n <= 0:
            # 0 is the end of a file that was cut.
            return errno if n else EIO
        data, size, at = data + n, size - n, at + n
    return 0


# -- flushing --------------------------------------------------------------------------------------------------------

cdef int stage(stack *s) noexcept nogil:
    cdef uint64_t words = (s.files[0].map_size >> PAGE_SHIFT) + 63 >> 6, i, rest, page
    cdef uint32_t count = 0
    if s.unwritten == NULL:
        return 0
    s.flushing = True
    for i in range(words):
        count += count_ones(s.unwritten[i])
    if count == 0:
        return 0
    s.staged = <uint8_t *> malloc(<size_t> count << PAGE_SHIFT)
    s.staged_pages = <uint32_t *> malloc(count * sizeof(uint32_t))
    if s.staged == NULL or s.staged_pages == NULL:
        end_flush(s, True)
        return ENOMEM
    for i in range(words):
        rest, s.unwritten[i] = s.unwritten[i], 0
        while rest:
            page = (i << 6) + trailing_zeroes(rest)
            rest &= rest - 1
            memcpy(&s.staged[<size_t> s.staged_count << PAGE_SHIFT], <uint8_t *> s.files[0].map + (page << PAGE_SHIFT), PAGE)
            s.staged_pages[s.staged_count] = <uint32_t> page
            s.staged_count += 1
    return 0


cdef int write_staged(stack *s) noexcept nogil:
    cdef uint32_t first = 0, count
    cdef int error
    while first < s.staged_count:
        count = 1
        while first + count < s.staged_count and s.staged_pages[first + count] == s.staged_pages[first] + count:
            count += 1
        error = move(
            True, s.files[0].fd, &s.staged[<size_t> first << PAGE_SHIFT], <uint64_t> count << PAGE_SHIFT,
            s.map_at + (<uint64_t> s.staged_pages[first] << PAGE_SHIFT),
        )
        if error:
            return error
        first += count
    return 0


cdef void end_flush(stack *s, bint well) noexcept nogil:
    """Forget what was staged; where it did not go `well`, to write it again."""
    cdef uint32_t i
    if not well:
        for i in range(s.staged_count):
            s.unwritten[s.staged_pages[i] >> 6] |= <uint64_t> 1 << (s.staged_pages[i] & 63)
    free(s.staged)
    free(s.staged_pages)
    s.staged, s.staged_pages, s.staged_count, s.flushing = NULL, NULL, 0, False


cdef int sync(stack *s) noexcept nogil:
    cdef int error = stage(s)
    if not error and fdatasync(s.files[0].fd):
        error = errno
    if s.staged_count:
        if not error:
            error = write_staged(s)
        if not error and fdatasync(s.files[0].fd):
            error = errno
    end_flush(s, not error)
    return error


cdef class Layers:
    """The files that a disk is made of, for the core.

    backing: with at least one overlay, whose descriptors it takes, but for the base's, which stays the backing's. writable:
    the first may be written to. ordered: its map goes to the disk with each flush, after the data; else as the host likes.
    ConfigError when a file cannot be mapped.
    """

    def __init__(self, backing, *, bint writable, bint ordered=False):
        cdef stack *s = &self.own
        cdef int protection, i
        if s.count:
            raise ValueError("these layers are set up already")
        self.parts = backing.layers
        s.size, s.ordered = backing.size // STAT_UNIT * STAT_UNIT, writable and ordered
        for i, part in enumerate(self.parts):
            fd, at, map_size, start = part.place
            protection = PROT_READ | PROT_WRITE if writable and i == 0 else PROT_READ
            s.files[i].fd, s.files[i].start, s.files[i].map_size = fd, start, map_size
            s.files[i].map = map_file(part.path, fd, at, map_size, protection, i == 0 and s.ordered)
            s.count += 1
            if i == 0:
                s.map_at, s.limit = at, part.limit
        s.files[s.count].fd = backing.fd
        s.count += 1
        s.block = <uint8_t *> malloc(BLOCK)
        if s.ordered:
            s.unwritten = <uint64_t *> calloc((s.files[0].map_size >> PAGE_SHIFT) + 63 >> 6, sizeof(uint64_t))
        if s.block == NULL or s.ordered and s.unwritten == NULL:
            raise MemoryError
        if writable and not self.parts[0].fresh:
            self.renew()
        self.owning = True

    def __dealloc__(self):
        # What Python has of it may be gone already.
        self.release()

    def renew(self):
        """Somebody knows these contents: have their header changed before they are."""
        cdef stack *s = &self.own
        cdef bytes header
        from crackle.disk.overlay import encode, read_header

        header, at = encode(read_header(self.parts[0].backing.fd, self.parts[0].path).changed())
        cdef uint8_t *copy = <uint8_t *> malloc(len(header))
        if copy == NULL:
            raise MemoryError
        memcpy(copy, <const char *> header, len(header))
        free(s.renewal)
        s.renewal, s.renewal_size, s.renewal_at = copy, <uint32_t> len(header), at

    def told(self):
        """The id of what the first file holds now, for somebody to know it again; nothing is in flight."""
        from crackle.disk.overlay import read_header

        cdef str contents = read_header(self.parts[0].backing.fd, self.parts[0].path).id
        self.renew()
        return contents

    def shows(self, contents):
        """Whether the disk is what the overlay with this id is, or the base if that is None: it, or nothing new over it."""
        cdef int i
        for i, part in enumerate(self.parts):
            if part.header.id == contents:
                return True
            if self.held_by(i):
                return False
        return contents is None

    def confirm(self, base):
        """What is below is written to no more: let the first, which is new, name it as it is at last. ConfigError."""
        from crackle.disk.overlay import identify, read_header, write_header

        top = self.parts[0]
        under = top.header.under
        if len(self.parts) > 1:
            under = structs.replace(under, overlay=read_header(self.parts[1].backing.fd, self.parts[1].path).id)
        else:
            under = identify(base.fd, under.path, self.own.size)
        if under != top.header.under:
            top.header = top.header.over(under)
            write_header(top.backing.fd, top.header, top.path)

    def held_by(self, int index):
        """Bytes of the blocks that a file, 0 for the first, has itself."""
        cdef uint64_t blocks = (self.own.size + BLOCK - 1) >> BLOCK_SHIFT
        return (blocks << BLOCK_SHIFT) - missing(self.own.files[index].map, 0, self.own.size)

    def below(self):
        """Path and id of the overlay under the first; None twice where that is the base."""
        return (self.parts[1].path, self.parts[1].header.id) if len(self.parts) > 1 else (None, None)

    def find(self, uint64_t offset, uint64_t most):
        """Which file, from 0 for the first, has the disk's bytes from `offset` on, and how many of `most`."""
        cdef int index
        cdef uint64_t length = find_run(&self.own, offset, most, &index)
        return index, length

    def place(self, int index, uint64_t offset):
        """Descriptor of that file, and where in it the disk's byte `offset` is."""
        return self.own.files[index].fd, self.own.files[index].start + offset

    def take(self, uint64_t offset, uint64_t length):
        """The first file has these bytes, whole blocks, from now on."""
        with nogil:
            take_over(&self.own, offset, length)

    def sync(self):
        """Have everything on the disk, in order. OSError."""
        cdef int error
        with nogil:
            error = sync(&self.own)
        if error:
            raise OSError(error, strerror(error).decode())

    def settle(self):
        """As `sync`, as far as that goes: for what is not promised to anybody."""
        with nogil:
            sync(&self.own)

    def close(self):
        """Give mappings and descriptors back. Idempotent."""
        parts, self.parts = self.parts or [], []
        if self.owning:
            for part in parts:
                part.backing.fd = -1
        self.release()

    cdef void release(self) noexcept:
        """What is C's, whatever is left of the rest. Idempotent."""
        cdef stack *s = &self.own
        cdef int i
        for i in range(s.count):
            if s.files[i].map != NULL:
                munmap(s.files[i].map, s.files[i].map_size)
                if self.owning:
                    close(s.files[i].fd)
        free(s.unwritten)
        free(s.staged)
        free(s.staged_pages)
        free(s.renewal)
        free(s.block)
        s.unwritten, s.staged, s.staged_pages, s.renewal, s.block = NULL, NULL, NULL, NULL, NULL
        s.count, self.owning = 0, False


cdef uint64_t *map_file(str path, int fd, uint64_t at, uint64_t size, int protection, bint private) except NULL:
    cdef void *mapped = mmap(NULL, size, protection, MAP_PRIVATE if private else MAP_SHARED, fd, <long> at)
    if mapped == MAP_FAILED:
        raise ConfigError(f"cannot map the overlay {path}: {strerror(errno).decode()}")
    # A page of it is for 128 MiB of the disk: reading ahead would be for the holes behind the map.
    madvise(mapped, size, MADV_RANDOM)
    return <uint64_t *> mapped
