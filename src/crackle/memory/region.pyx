"""One range of guest RAM, and the host mapping behind it.

A mapping of 2 MiB or more lies so that a huge page of the host can hold a huge page of the guest: its host address is as
far from a multiple of 2 MiB as its guest address is.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport strerror
from posix.mman cimport (
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    mmap,
    munmap,
)
from posix.unistd cimport close, ftruncate

from crackle.includes.io cimport pread

from crackle.errors import ConfigError


cdef extern from "<sys/mman.h>" nogil:
    enum:
        MAP_HUGETLB
        MFD_CLOEXEC
        MFD_ALLOW_SEALING
        MFD_HUGETLB
        MADV_DONTDUMP
        MADV_DONTFORK
        MADV_HUGEPAGE
    int memfd_create(const char *name, unsigned int flags)
    int madvise(void *addr, size_t length, int advice)

cdef extern from "<linux/mman.h>" nogil:
    enum:
        MAP_HUGE_2MB

cdef extern from "<linux/memfd.h>" nogil:
    enum:
        MFD_HUGE_2MB

cdef extern from "<fcntl.h>" nogil:
    enum:
        F_ADD_SEALS
        F_SEAL_SEAL
        F_SEAL_SHRINK
        F_SEAL_GROW
    int fcntl(int fd, int command, ...)

cdef extern from * nogil:
    uint64_t atomic_or "__sync_fetch_and_or" (uint64_t *p, uint64_t bits)
    uint64_t atomic_exchange_zero "__sync_fetch_and_and" (uint64_t *p, uint64_t zero)

BACKINGS = ("anonymous", "transparent", "memfd", "transparent-memfd", "file", "hugepages", "hugepages-memfd")

HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage"


def huge_pages_missing(str backing):
    """Why memory of a transparent `backing` gets no huge pages on this host, in words; None when it may."""
    if not backing.startswith("transparent"):
        return None
    switch = "shmem_enabled" if backing.endswith("memfd") else "enabled"
    # Since Linux 6.8 each size has a switch of its own, which may say "inherit".
    for name in (f"{HUGE_PAGES}/hugepages-2048kB/{switch}", f"{HUGE_PAGES}/{switch}"):
        try:
            with open(name) as file:
                setting = file.read()
        except OSError:
            continue
        if "[inherit]" in setting:
            continue
        if "[never]" in setting or "[deny]" in setting:
            return f"{name} says {setting.strip()}"
        return None
    return "this host's kernel has none"


cdef class Region:
    """One contiguous range of guest RAM and owner of the host mapping behind it; a writable buffer.

    `fd` and `offset`: where another process finds the same bytes, when memory is shared or a file; -1 and 0 otherwise.
    """

    def __cinit__(self):
        self.fd = -1

    cdef void unmap(self) noexcept:
        if self.r.hva != NULL:
            munmap(self.r.hva, self.r.size)
            free(self.r.dirty)
            self.r.hva, self.r.dirty = NULL, NULL
        if self.owns_fd:
            close(self.fd)
            self.owns_fd = False
            self.fd = -1

    def __dealloc__(self):
        self.unmap()

    cdef int track(self, bint enable) except -1:
        """Note which pages are written from now on, all of them clean; or stop."""
        free(self.r.dirty)
        self.r.dirty = NULL
        if enable:
            self.r.dirty = <uint64_t *> calloc((self.r.size >> (PAGE_SHIFT + 6)) + 1, 8)
            if self.r.dirty == NULL:
                raise MemoryError("no memory for the dirty bitmap")
        return 0

    cdef int map_private(self, int fd, uint64_t offset, bint transparent) except -1:
        """Put a copy-on-write mapping of `fd` from `offset` on where the region is, whose bytes go."""
        cdef int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE
        if mmap(self.r.hva, self.r.size, PROT_READ | PROT_WRITE, flags, fd, <long> offset) == MAP_FAILED:
            raise ConfigError(f"cannot map {self.r.size >> 20} MiB of a memory file: {strerror(errno).decode()}")
        advise(self.r.hva, self.r.size, transparent)
        self.fd, self.offset = fd, offset
        return 0

    cdef bytes take_dirty(self):
        cdef uint64_t words = (self.r.size + (PAGE_SIZE << 6) - 1) >> (PAGE_SHIFT + 6)
        cdef uint64_t i
        cdef uint64_t *out
        if self.r.dirty == NULL:
            return b""
        bitmap = PyBytes_FromStringAndSize(NULL, words * 8)
        out = <uint64_t *> PyBytes_AS_STRING(bitmap)
        for i in range(words):
            out[i] = atomic_exchange_zero(&self.r.dirty[i], 0)
        return bitmap

    cdef int load(self, uint64_t place, int fd, uint64_t offset, uint64_t size) except -1:
        """Read `size` bytes of the file `fd` from `offset` to `place` in the region. ConfigError when it has fewer."""
        cdef uint64_t done = 0
        cdef ssize_t n
        while done < size:
            with nogil:
                n = pread(fd, self.r.hva + place + done, size - done, <long> (offset + done))
            if n < 0 and errno == EINTR:
                continue
            if n < 0:
                raise ConfigError(f"cannot read {size} bytes at offset {offset}: {strerror(errno).decode()}")
            if n == 0:
                raise ConfigError(f"file ends {size - done} bytes before offset {offset + size}")
            done += n
        mark(&self.r, place, size)
        return 0

    @property
    def gpa(self):
        """First guest physical address."""
        return self.r.gpa

    @property
    def size(self):
        """Length in bytes."""
        return self.r.size

    @property
    def hva(self):
        """Host virtual address of the first byte."""
        return <uint64_t> self.r.hva

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.r.hva == NULL:
            raise ValueError("guest memory is closed")
        PyBuffer_FillInfo(view, self, self.r.hva, self.r.size, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    def __repr__(self):
        return f"Region(gpa={self.gpa:#x}, size={self.size:#x})"


cdef void mark(region_t *r, uint64_t offset, uint64_t size) noexcept nogil:
    cdef uint64_t page, last
    if r.dirty == NULL or size == 0:
        return
    page, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
    while page <= last:
        atomic_or(&r.dirty[page >> 6], <uint64_t> 1 << (page & 63))
        page += 1


cdef int make_memfd(uint64_t size, str backing) except -1:
    cdef unsigned int flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    cdef int fd, error
    if backing == "hugepages-memfd":
        flags |= MFD_HUGETLB | MFD_HUGE_2MB
    fd = memfd_create(b"guest-memory", flags)
    # Who shares it may write into it, but not take pages away from under us: touching them would be a SIGBUS.
    if fd < 0 or ftruncate(fd, <long> size) < 0 or (
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0
    ):
        error = errno
        if fd >= 0:
            close(fd)
        raise ConfigError(f"cannot make a memfd of {size >> 20} MiB: {strerror(error).decode()}")
    return fd


cdef Region map_region(uint64_t gpa, uint64_t size, str backing, int fd, uint64_t offset, bint shared, bint owned):
    cdef Region region = Region.__new__(Region)
    cdef uint8_t *address = NULL
    cdef void *mapped
    cdef int flags, error
    region.fd, region.owns_fd, region.offset = fd, owned, offset if fd >= 0 else 0
    if fd < 0:
        flags = MAP_PRIVATE | MAP_ANONYMOUS
    else:
        flags = MAP_SHARED if shared else MAP_PRIVATE
    if backing == "hugepages":
        flags |= MAP_HUGETLB | MAP_HUGE_2MB
    elif backing != "hugepages-memfd" and not (backing == "file" and shared):
        flags |= MAP_NORESERVE
    if size >= HUGE_PAGE_SIZE:
        address = reserve(size, gpa)
        if address != NULL:
            flags |= MAP_FIXED
    mapped = mmap(address, size, PROT_READ | PROT_WRITE, flags, fd, <long> region.offset)
    if mapped == MAP_FAILED:
        error = errno
        if address != NULL:
            munmap(address, size)
        reason = strerror(error).decode()
        if backing.startswith("hugepages"):
            reason += "; reserve enough 2 MiB pages with sysctl vm.nr_hugepages"
        raise ConfigError(f"cannot map {size >> 20} MiB of guest memory ({backing}): {reason}")
    region.r.gpa, region.r.size, region.r.hva = gpa, size, <uint8_t *> mapped
    region.r.page = HUGE_PAGE_SIZE if backing.startswith("hugepages") else PAGE_SIZE
    region.r.shared = flags & MAP_SHARED != 0
    advise(mapped, size, backing.startswith("transparent"))
    return region


cdef void advise(void *mapped, uint64_t size, bint transparent) noexcept:
    # A forked helper process must neither keep guest memory alive nor see it, and no core dump is to show it.
    madvise(mapped, size, MADV_DONTFORK)
    madvise(mapped, size, MADV_DONTDUMP)
    if transparent:
        madvise(mapped, size, MADV_HUGEPAGE)


cdef uint8_t *reserve(uint64_t size, uint64_t gpa) noexcept:
    """Address space for `size` bytes that is as far from a multiple of 2 MiB as `gpa` is; NULL when there is none."""
    cdef uint64_t lead, room = size + HUGE_PAGE_SIZE
    cdef uint8_t *start = <uint8_t *> mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if start == <uint8_t *> MAP_FAILED:
        return NULL
    lead = (gpa - <uint64_t> start) & (HUGE_PAGE_SIZE - 1)
    if lead:
        munmap(start, lead)
    munmap(start + lead + size, HUGE_PAGE_SIZE - lead)
    return start + lead
