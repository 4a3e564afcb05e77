"""What is mapped in this process (proc(5), /proc/PID/maps), and code that need not be.

Reading it allocates nothing, so that whoever looks where memory can be given back does not use more.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memcmp, memcpy
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, open
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close, read

cdef extern from "<sys/mman.h>" nogil:
    enum:
        MADV_DONTNEED
    int madvise(void *address, size_t size, int advice)

cdef extern from "<malloc.h>" nogil:
    int malloc_trim(size_t pad)

cdef enum:
    MAPS = 1 << 20          # bytes of text, at most


cdef void list_mappings(listing *maps) noexcept nogil:
    cdef ssize_t size = 0, part
    cdef int fd
    maps.at = maps.text = <char *> mmap(NULL, MAPS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if maps.text == <char *> MAP_FAILED:
        maps.text = NULL
        return
    fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC)
    if fd >= 0:
        # The last byte stays 0.
        while size < MAPS - 1:
            part = read(fd, maps.text + size, MAPS - 1 - size)
            if part <= 0:
                break
            size += part
        close(fd)


cdef void forget_mappings(listing *maps) noexcept nogil:
    if maps.text != NULL:
        munmap(maps.text, MAPS)


cdef bint next_mapping(listing *maps, mapping *m) noexcept nogil:
    """A line: "start-end access offset major:minor inode      name"."""
    cdef char *p = maps.at
    if maps.text == NULL or p[0] == 0:
        return False
    m.start = number(&p, 16)
    p += 1
    m.end = number(&p, 16)
    p += 1
    memcpy(m.access, p, 4)
    p += 5
    m.offset = number(&p, 16)
    p += 1
    number(&p, 16)
    p += 1
    number(&p, 16)
    p += 1
    m.inode = number(&p, 10)
    while p[0] == c' ':
        p += 1
    m.name = p
    while p[0] and p[0] != c'\n':
        p += 1
    if p[0]:
        p[0] = 0
        p += 1
    maps.at = p
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


cdef bint is_code(mapping *m) noexcept nogil:
    """Of a file, executable and not to be written, and so never changed: read-only data has been, by the linker."""
    return has_access(m, "r-xp") and m.name[0] == c'/'


def unmap_code():
    """Let go of the code of executables and libraries, which is read anew from their files when it runs again."""
    cdef listing maps
    cdef mapping m
    list_mappings(&maps)
    while next_mapping(&maps, &m):
        if is_code(&m):
            madvise(<void *> m.start, m.end - m.start, MADV_DONTNEED)
    forget_mappings(&maps)


def trim_heap():
    """Give the C heap's unused pages back to the system."""
    malloc_trim(0)


def code_in(bytes maps not None):
    """(address, size) of what `unmap_code` takes of such a text; for tests."""
    cdef bytearray text = bytearray(maps + b"\0")
    cdef listing given
    cdef mapping m
    given.text = given.at = text
    found = []
    while next_mapping(&given, &m):
        if is_code(&m):
            found.append((m.start, m.end - m.start))
    return found
