"""Page frame numbers as a balloon's driver gives them, and how the host gets those pages in as few calls as may be.

A driver names one page at a time, up or down or in any order, each once or more often. They are collected, over several
chains, sorted, and given back in runs. What they say is the guest's: a page that is in no memory is counted and no more.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from crackle.includes.balloon cimport VIRTIO_BALLOON_PFN_SHIFT
from crackle.memory.discard cimport discard_in
from crackle.memory.guest cimport GuestMemory
from crackle.memory.region cimport HUGE_PAGE_SIZE, PAGE_SHIFT, PAGE_SIZE, Region, region_t
from crackle.virtio.queue cimport chain, copy_buffers

cdef enum:
    SIZE = sizeof(uint32_t)
    # Words of `inside` that a huge page has.
    WORDS = HUGE_PAGE_SIZE >> (PAGE_SHIFT + 6)

cdef uint64_t ALL = <uint64_t> -1


cdef bint in_order(const uint32_t *numbers, uint32_t count) noexcept nogil:
    cdef uint32_t i
    for i in range(1, count):
        if numbers[i] < numbers[i - 1]:
            return False
    return True


cdef void sort(uint32_t *numbers, uint32_t *spare, uint32_t count) noexcept nogil:
    """Ascending, by one byte after the other from the least (a radix sort), which takes as long whatever they are."""
    cdef uint32_t places[256]
    cdef uint32_t *source = numbers
    cdef uint32_t *target = spare
    cdef uint32_t i, place, many
    cdef int shift
    for shift in range(0, 32, 8):
        memset(places, 0, sizeof(places))
        for i in range(count):
            places[source[i] >> shift & 255] += 1
        if places[source[0] >> shift & 255] == count:
            continue
        place = 0
        for i in range(256):
            many, places[i] = places[i], place
            place += many
        for i in range(count):
            target[places[source[i] >> shift & 255]] = source[i]
            places[source[i] >> shift & 255] += 1
        source, target = target, source
    if source != numbers:
        memcpy(numbers, source, count * SIZE)


cdef class Pages:
    """What is collected, of `memory`.

    freed_bytes, freed_runs: given back so far, with so many calls. outside: pages that were in no memory. refused: calls
    that the host refused.
    """

    def __init__(self, GuestMemory memory not None):
        cdef Region region
        cdef bint huge = False
        if self.memory is not None:
            raise ValueError("these pages are of a memory already")
        self.memory = memory
        for region in memory.regions:
            huge |= region.r.page != PAGE_SIZE
            self.inside_pages = (region.r.gpa + region.r.size) >> PAGE_SHIFT
        if huge:
            self.inside = <uint64_t *> calloc((self.inside_pages + 63) >> 6, sizeof(uint64_t))
            if self.inside == NULL:
                raise MemoryError

    def __dealloc__(self):
        free(self.inside)

    cdef bint add(self, const chain *c) noexcept nogil:
        """Copy the numbers of a chain, of BATCH at most; False, and nothing is copied, when there is no room."""
        cdef uint32_t many = <uint32_t> (c.readable_bytes // SIZE)
        if many > BATCH - self.count:
            return False
        copy_buffers(c.iov, c.readable, 0, &self.numbers[self.count], many * SIZE, False)
        self.count += many
        return True

    cdef void give_back(self) noexcept nogil:
        """Let the host have what is collected."""
        cdef uint64_t first, end
        cdef uint32_t i = 0
        if not in_order(self.numbers, self.count):
            sort(self.numbers, self.spare, self.count)
        while i < self.count:
            first, end = self.numbers[i], <uint64_t> self.numbers[i] + 1
            i += 1
            # The same once more, or the next.
            while i < self.count and self.numbers[i] <= end:
                end = <uint64_t> self.numbers[i] + 1
                i += 1
            self.give_run(first << VIRTIO_BALLOON_PFN_SHIFT, end << VIRTIO_BALLOON_PFN_SHIFT)
        self.count = 0

    cdef void give_run(self, uint64_t gpa, uint64_t end) noexcept nogil:
        cdef const region_t *r
        cdef uint64_t part
        while gpa < end:
            r = self.memory.find(gpa)
            if r == NULL:
                self.outside += 1
                gpa += PAGE_SIZE
                continue
            part = min(end - gpa, r.size - (gpa - r.gpa))
            if r.page != PAGE_SIZE:
                self.give_huge(gpa, gpa + part)
            elif discard_in(r, gpa, part, &self.freed_bytes):
                self.freed_runs += 1
            else:
                self.refused += 1
            gpa += part

    cdef void give_huge(self, uint64_t gpa, uint64_t end) noexcept nogil:
        """Of huge pages, those of which all is in the balloon."""
        cdef const region_t *r
        cdef uint64_t page, word
        cdef int i
        end = min(end, self.inside_pages << PAGE_SHIFT)
        for page in range(gpa >> PAGE_SHIFT, end >> PAGE_SHIFT):
            self.inside[page >> 6] |= <uint64_t> 1 << (page & 63)
        gpa &= ~<uint64_t> (HUGE_PAGE_SIZE - 1)
        while gpa < end:
            word, i = gpa >> (PAGE_SHIFT + 6), 0
            while i < WORDS and self.inside[word + i] == ALL:
                i += 1
            r = self.memory.find(gpa)
            if i == WORDS and r != NULL:
                if discard_in(r, gpa, HUGE_PAGE_SIZE, &self.freed_bytes):
                    self.freed_runs += 1
                else:
                    self.refused += 1
            gpa += HUGE_PAGE_SIZE

    cdef void take_out(self) noexcept nogil:
        """What is collected is the guest's again."""
        cdef uint64_t page
        cdef uint32_t i
        if self.inside != NULL:
            for i in range(self.count):
                page = self.numbers[i]
                if page < self.inside_pages:
                    self.inside[page >> 6] &= ~(<uint64_t> 1 << (page & 63))
        self.count = 0

    cdef void forget(self) noexcept nogil:
        """Nothing is in the balloon."""
        self.count = 0
        if self.inside != NULL:
            memset(self.inside, 0, ((self.inside_pages + 63) >> 6) * sizeof(uint64_t))
