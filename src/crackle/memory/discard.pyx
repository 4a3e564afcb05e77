"""Guest memory given back to the host: from then on it takes none of the host's, until the guest touches it again.

What the guest finds there then depends on what lies behind the region. Whoever calls this has the guest's word that it
expects nothing in particular.

- Private memory: MADV_DONTNEED (madvise(2)), and zeros.
- A private mapping of a snapshot's memory file: the same, and what the file has. A page that is only read is the page
  cache's again, which all clones share; new memory mapped over the range would be zeros, but each range a mapping of its own,
  of which the guest could make as many as the kernel allows a process.
- Shared memory: MADV_REMOVE makes a hole in the file, for whoever else has it mapped; zeros.
- Reserved huge pages, of either kind: whole ones only.
- Where a page-fault handler gives the pages, the kernel tells it of those that have gone (UFFD_EVENT_REMOVE), and the call
  returns when it has heard that; what comes then is the handler's business.

Nothing is noted as written: a differential snapshot has of such a page what it was before, or what it reads now.
"""

from libc.stdint cimport uint64_t

from crackle.memory.guest cimport GuestMemory
from crackle.memory.region cimport region_t


cdef extern from "<sys/mman.h>" nogil:
    enum:
        MADV_DONTNEED
        MADV_REMOVE
    int madvise(void *addr, size_t length, int advice)


cdef bint discard_in(const region_t *r, uint64_t gpa, uint64_t size, uint64_t *freed) noexcept nogil:
    cdef uint64_t begin = (gpa + r.page - 1) & ~(r.page - 1), end = (gpa + size) & ~(r.page - 1)
    if begin >= end:
        return True
    if madvise(r.hva + (begin - r.gpa), end - begin, MADV_REMOVE if r.shared else MADV_DONTNEED) < 0:
        return False
    freed[0] += end - begin
    return True


cdef bint discard(GuestMemory memory, uint64_t gpa, uint64_t size, uint64_t *freed) noexcept nogil:
    cdef const region_t *r
    cdef uint64_t part
    while size:
        r = memory.find(gpa)
        if r == NULL:
            return False
        part = min(size, r.size - (gpa - r.gpa))
        if not discard_in(r, gpa, part, freed):
            return False
        gpa += part
        size -= part
    return True


def give_back(GuestMemory memory not None, uint64_t gpa, uint64_t size):
    """discard() for tests: how many bytes were given back, and whether that was all that could be."""
    cdef uint64_t freed = 0
    cdef bint done
    with nogil:
        done = discard(memory, gpa, size, &freed)
    return freed, done
