"""What is mapped in this process, and code that need not be.

From 6.11 on the kernel tells of one mapping at a time (PROCMAP_QUERY, <linux/fs.h>); before, /proc/PID/maps has the text
of all (proc(5)), a millisecond's work for the four hundred of an interpreter. Neither allocates anything, so that
whoever looks where memory can be given back does not use more.

Owns what `keep_open` has opened: in a jail there is no /proc, and a process that goes into one has its files open before.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, fcntl, open
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close, getpid, pread

cdef extern from * nogil:
    """
    #include <fcntl.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>

    /* <linux/fs.h>, struct procmap_query, which older headers do not have. */
    struct map_query {
        uint64_t size, flags, address, start, end, vma_flags, page_size, offset, inode;
        uint32_t major, minor, name_size, build_id_size;
        uint64_t name, build_id;
    };
    #define QUERY_MAP _IOWR('f', 17, struct map_query)
    enum { SHARED = 8, COVERING_OR_NEXT = 0x10 };

    #ifndef MADV_POPULATE_READ
    #define MADV_POPULATE_READ 22
    #endif
    """
    enum:
        F_DUPFD_CLOEXEC
        MADV_DONTNEED
        MADV_POPULATE_READ
        SHARED
        COVERING_OR_NEXT
        QUERY_MAP
    struct map_query:
        uint64_t size, flags, address, start, end, vma_flags, offset, inode
        uint32_t major, minor
    int ioctl(int fd, unsigned long request, map_query *query)
    int openat(int folder, const char *path, int flags)
    int madvise(void *address, size_t size, int advice)

cdef extern from "<malloc.h>" nogil:
    int malloc_trim(size_t pad)
    int mallopt(int parameter, int value)
    enum:
        M_ARENA_MAX

cdef enum:
    MAPS = 1 << 20          # bytes of text, at most
    CODE = READABLE | EXECUTABLE | OF_A_FILE


cdef bint text_only = False

# What is kept open, and the process that it is about.
cdef int kept_maps = -1, kept_pagemap = -1, kept_by = 0


def keep_open(int proc):
    """Have what is asked for here open for good, in a process that will have no /proc; `proc` is open on that yet.

    Whoever opens it with CAP_SYS_ADMIN is shown in it for good in which frames of the host's memory pages are.
    """
    global kept_maps, kept_pagemap, kept_by
    kept_maps = openat(proc, "self/maps", O_RDONLY | O_CLOEXEC)
    kept_pagemap = openat(proc, "self/pagemap", O_RDONLY | O_CLOEXEC)
    kept_by = getpid()


def kept_open():
    """The descriptors of that."""
    return [fd for fd in (kept_maps, kept_pagemap) if fd >= 0 and kept_by == getpid()]


def forget_open():
    """In a process that was forked since: those are about its parent, and their numbers are somebody else's from now on."""
    global kept_maps, kept_pagemap
    kept_maps = kept_pagemap = -1


cdef int open_pagemap() noexcept nogil:
    return open_own("/proc/self/pagemap", kept_pagemap)


cdef int open_own(const char *path, int kept) noexcept nogil:
    # In a process that was forked since it is about another.
    if kept >= 0 and kept_by == getpid():
        return fcntl(kept, F_DUPFD_CLOEXEC, 0)
    return open(path, O_RDONLY | O_CLOEXEC)


cdef void list_mappings(listing *maps, uint32_t wanted) noexcept nogil:
    cdef map_query query
    maps.wanted = wanted
    maps.next = 0
    maps.text = NULL
    maps.fd = open_own("/proc/self/maps", kept_maps)
    if maps.fd >= 0 and (text_only or not ask(maps, &query)):
        read_all(maps)


cdef void read_all(listing *maps) noexcept nogil:
    cdef ssize_t size = 0, part
    maps.at = maps.text = <char *> mmap(NULL, MAPS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if maps.text == <char *> MAP_FAILED:
        maps.text = NULL
        return
    # The last byte stays 0.
    while size < MAPS - 1:
        part = pread(maps.fd, maps.text + size, MAPS - 1 - size, size)
        if part <= 0:
            break
        size += part


cdef void forget_mappings(listing *maps) noexcept nogil:
    if maps.text != NULL:
        munmap(maps.text, MAPS)
    if maps.fd >= 0:
        close(maps.fd)


cdef void skip_to(listing *maps, uintptr_t address) noexcept nogil:
    maps.next = max(maps.next, address)


cdef bint next_mapping(listing *maps, mapping *m) noexcept nogil:
    cdef map_query query
    if maps.text != NULL:
        while next_line(&maps.at, m):
            if m.end > maps.next and flags_of(m) & maps.wanted == maps.wanted:
                return True
        return False
    if not ask(maps, &query):
        return False
    m.start, m.end, m.offset, m.inode = query.start, query.end, query.offset, query.inode
    m.major, m.minor = query.major, query.minor
    m.access[0] = c'r' if query.vma_flags & READABLE else c'-'
    m.access[1] = c'w' if query.vma_flags & WRITABLE else c'-'
    m.access[2] = c'x' if query.vma_flags & EXECUTABLE else c'-'
    m.access[3] = c's' if query.vma_flags & SHARED else c'p'
    maps.next = m.end
    return True


cdef bint ask(const listing *maps, map_query *query) noexcept nogil:
    memset(query, 0, sizeof(map_query))
    query.size = sizeof(map_query)
    query.flags = COVERING_OR_NEXT | maps.wanted
    query.address = maps.next
    return maps.fd >= 0 and not ioctl(maps.fd, QUERY_MAP, query)


cdef uint32_t flags_of(const mapping *m) noexcept nogil:
    return (
        (READABLE if m.access[0] == c'r' else 0) | (WRITABLE if m.access[1] == c'w' else 0)
        | (EXECUTABLE if m.access[2] == c'x' else 0) | (OF_A_FILE if m.inode else 0)
    )


cdef bint next_line(char **text, mapping *m) noexcept nogil:
    """A line: "start-end access offset major:minor inode      name"."""
    cdef char *p = text[0]
    if p[0] == 0:
        return False
    m.start = number(&p, 16)
    p += 1
    m.end = number(&p, 16)
    p += 1
    memcpy(m.access, p, 4)
    p += 5
    m.offset = number(&p, 16)
    p += 1
    m.major = <uint32_t> number(&p, 16)
    p += 1
    m.minor = <uint32_t> number(&p, 16)
    p += 1
    m.inode = number(&p, 10)
    while p[0] and p[0] != c'\n':
        p += 1
    text[0] = p + 1 if p[0] else p
    return True


cdef uint64_t number(char **at, int base) noexcept nogil:
    cdef uint64_t value = 0
    cdef char *p = at[0]
    while True:
        if c'0' <= p[0] <= c'9':
            value = value * base + (p[0] - c'0')
        elif base == 16 and c'a' <= p[0] <= c'f':
            value = value * base + (p[0] - c'a' + 10)
        else:
            break
        p += 1
    at[0] = p
    return value


cdef bint has_access(mapping *m, const char *access) noexcept nogil:
    return not memcmp(m.access, access, 4)


def unmap_code():
    """Let go of the code of executables and libraries, which is read anew from their files when it runs again."""
    cdef listing maps
    cdef mapping m
    list_mappings(&maps, CODE)
    while next_mapping(&maps, &m):
        if is_code(&m):
            madvise(<void *> m.start, m.end - m.start, MADV_DONTNEED)
    forget_mappings(&maps)


def map_ahead():
    """Have what is in the page cache of code, and of private memory that is a file's, mapped before it is wanted.

    Nothing is copied: nobody has more memory then. On kernels before 5.14 nothing is done.
    """
    cdef listing maps
    cdef mapping m
    list_mappings(&maps, READABLE | OF_A_FILE)
    while next_mapping(&maps, &m):
        if is_code(&m) or has_access(&m, "rw-p"):
            madvise(<void *> m.start, m.end - m.start, MADV_POPULATE_READ)
    forget_mappings(&maps)


cdef bint is_code(mapping *m) noexcept nogil:
    """Never to be written to, and so never changed: read-only data has been, by the linker."""
    return has_access(m, "r-xp")


def trim_heap():
    """Give the C heap's unused pages back to the system."""
    malloc_trim(0)


def share_heap():
    """Have the threads that are yet to come take memory from the one C heap: each would have its own otherwise."""
    mallopt(M_ARENA_MAX, 1)


def code_in(bytes maps not None):
    """(address, size) of what `unmap_code` takes of such a text; for tests."""
    cdef bytearray text = bytearray(maps + b"\0")
    cdef listing given
    cdef mapping m
    given.fd, given.wanted, given.next = -1, CODE, 0
    given.text = given.at = text
    found = []
    while next_mapping(&given, &m):
        if is_code(&m):
            found.append((m.start, m.end - m.start))
    return found


def as_before_6_11():
    """Do without asking the kernel from now on; for tests."""
    global text_only
    text_only = True


def list_all():
    """(start, end, access, offset, device, inode) of all mappings; for tests."""
    cdef listing maps
    cdef mapping m
    list_mappings(&maps, 0)
    found = []
    while next_mapping(&maps, &m):
        found.append((m.start, m.end, m.access[:4], m.offset, (m.major, m.minor), m.inode))
    forget_mappings(&maps)
    return found
