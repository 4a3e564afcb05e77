"""The mappings of this process, found without writing to any of them but one's own stack."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

# What a mapping has to be: PROCMAP_QUERY_VMA_* of <linux/fs.h>.
cdef enum:
    READABLE = 1
    WRITABLE = 2
    EXECUTABLE = 4
    OF_A_FILE = 0x20

cdef struct mapping:
    uintptr_t start, end
    uint64_t offset, inode
    uint32_t major, minor   # of the device of its file
    char access[4]          # as "rw-p"

# Mappings in the order of their addresses, as the kernel tells when it is asked for one, or from /proc/PID/maps.
cdef struct listing:
    int fd
    uint32_t wanted
    uintptr_t next          # where the next one ends behind
    char *text              # NULL where the kernel can be asked
    char *at

# Begin with the first of those that are all of `wanted`; nothing is found where the kernel does not tell.
cdef void list_mappings(listing *maps, uint32_t wanted) noexcept nogil
cdef void forget_mappings(listing *maps) noexcept nogil
# Leave out those that end before an address; not to go back.
cdef void skip_to(listing *maps, uintptr_t address) noexcept nogil
# The next one, until there is none.
cdef bint next_mapping(listing *maps, mapping *m) noexcept nogil
cdef bint has_access(mapping *m, const char *access) noexcept nogil

# A descriptor of /proc/PID/pagemap, for the caller to close; -1 where that is not to be had.
cdef int open_pagemap() noexcept nogil
