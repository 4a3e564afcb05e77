"""The mappings of this process, read without writing to any of them but one's own stack."""

from libc.stdint cimport uint64_t, uintptr_t

cdef struct mapping:
    uintptr_t start, end
    uint64_t offset, inode
    char access[4]          # as "rw-p"
    const char *name        # "" where it has none

# Text of /proc/PID/maps, whose lines are taken one by one.
cdef struct listing:
    char *text
    char *at

# Read /proc/self/maps; nothing is found in it where that cannot be done.
cdef void list_mappings(listing *maps) noexcept nogil
cdef void forget_mappings(listing *maps) noexcept nogil
# The next one, until there is none.
cdef bint next_mapping(listing *maps, mapping *m) noexcept nogil
cdef bint has_access(mapping *m, const char *access) noexcept nogil
