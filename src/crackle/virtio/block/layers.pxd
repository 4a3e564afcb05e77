from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    BLOCK_SHIFT = 12
    BLOCK = 1 << BLOCK_SHIFT
    # Overlays and the base.
    MAX_FILES = 17
    # What `prepare` says where something in flight may be for the same block.
    MUST_WAIT = -1

# One of the files that a disk is made of.
cdef struct layer:
    int fd
    uint64_t start          # where in it the disk begins
    uint64_t *map           # a bit for each block that is in it; NULL for the base, which has all
    uint64_t map_size       # bytes

# All of them, the one that is written first. A plain disk has none of this.
cdef struct stack:
    layer files[MAX_FILES]
    int count
    uint64_t size           # of the disk, bytes
    uint64_t map_at         # where in the first the map is
    bint ordered            # the map is written at a flush, after the data
    uint64_t *unwritten     # where it is ordered: a bit for each page of it that is not in the file as it is here
    uint8_t *staged         # pages of it that a flush is about to write,
    uint32_t *staged_pages  # and which they are
    uint32_t staged_count
    bint flushing           # a flush has begun that is not done
    uint64_t limit          # bytes that the file may take, 0 for no limit
    uint64_t allowance      # bytes of new blocks for which nobody need ask how many it takes
    uint64_t claimed        # bytes of new blocks that are in flight
    uint8_t *renewal        # a header for contents that have changed, to be written before they do; NULL when it has been
    uint32_t renewal_size
    uint64_t renewal_at
    uint8_t *block          # room for one

# How many of `most` bytes from `offset` on are in one file, and which.
cdef uint64_t find_run(stack *s, uint64_t offset, uint64_t most, int *index) noexcept nogil
# Before `length` bytes from `offset` on are written or given back: what has to be there first. 0, errno or MUST_WAIT.
cdef int prepare(stack *s, uint64_t offset, uint64_t length, bint takes_room, bint alone, uint64_t *claim) noexcept nogil
# They are written, or given back: whole blocks, or what `prepare` has made whole.
cdef void take_over(stack *s, uint64_t offset, uint64_t length) noexcept nogil
cdef bint is_here(stack *s, uint64_t block) noexcept nogil
# A flush of an ordered one: `stage`, fdatasync, `write_staged`, fdatasync, `end_flush`. 0 or errno.
cdef int stage(stack *s) noexcept nogil
cdef int write_staged(stack *s) noexcept nogil
cdef void end_flush(stack *s, bint well) noexcept nogil
# All of it at once, while nothing is in flight.
cdef int sync(stack *s) noexcept nogil

cdef class Layers:
    cdef stack own
    cdef object parts
    cdef bint owning            # of the descriptors, but for that of the base
    cdef void release(self) noexcept
