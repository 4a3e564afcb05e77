"""Guest memory: host mappings that the guest sees as its RAM.

Owns the mappings and, for a memfd, its descriptor; `close` gives both back. Everything that reads or writes guest memory
goes through `span` (native code) or `read`, `write` and `load` (Python), which check the whole range against the region
table before a byte is touched.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strerror
from posix.mman cimport (
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    mmap,
    munmap,
)
from posix.unistd cimport close, ftruncate

from crackle.includes.io cimport pread

import os

from crackle.errors import ConfigError, MemoryAccessError


cdef extern from "<sys/mman.h>" nogil:
    enum:
        MAP_HUGETLB
        MFD_CLOEXEC
        MFD_HUGETLB
    int memfd_create(const char *name, unsigned int flags)
    int madvise(void *addr, size_t length, int advice)
    enum:
        MADV_DONTFORK
        MADV_DONTNEED
        MADV_HUGEPAGE

cdef extern from "<linux/mman.h>" nogil:
    enum:
        MAP_HUGE_2MB

cdef extern from "<linux/memfd.h>" nogil:
    enum:
        MFD_HUGE_2MB

cdef extern from "<malloc.h>" nogil:
    int malloc_trim(size_t pad)

cdef extern from * nogil:
    uint64_t atomic_or "__sync_fetch_and_or" (uint64_t *p, uint64_t bits)
    uint64_t atomic_exchange_zero "__sync_fetch_and_and" (uint64_t *p, uint64_t zero)

cdef enum:
    PAGE_SIZE = 1 << PAGE_SHIFT
    HUGE_PAGE_SIZE = 2 << 20

BACKINGS = ("anonymous", "transparent", "memfd", "file", "hugepages", "hugepages-memfd")


def unmap_pages(uint64_t address, uint64_t size):
    """Take the pages of [address, address + size) out of this process; the next access maps them in again.

    Only for mappings of a file of which no page has been changed: a changed page would come back as it is in the file.
    """
    madvise(<void *> address, size, MADV_DONTNEED)


def trim_heap():
    """Give the C heap's unused pages back to the system."""
    malloc_trim(0)


cdef class Region:
    """One contiguous range of guest RAM and owner of the host mapping behind it; a writable buffer."""

    cdef void unmap(self) noexcept:
        if self.r.hva != NULL:
            munmap(self.r.hva, self.r.size)
            memset(&self.r, 0, sizeof(region_t))

    def __dealloc__(self):
        self.unmap()

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


cdef class GuestMemory:
    """Guest RAM as a table of regions.

    layout: [(gpa, size)] in bytes, page aligned, ascending, without overlap.
    backing: "anonymous"; "transparent" (anonymous, in huge pages where the kernel finds some); "memfd" (shared, can be
    handed to another process); "file" (a private, copy-on-write mapping of `fd`, regions one after the other from
    `offset`); "hugepages" and "hugepages-memfd" (reserved 2 MiB pages).
    shared: with "file", map it shared instead.
    Raises ConfigError when the layout is wrong or the host cannot give the memory.
    """

    def __cinit__(self):
        self.memfd = -1
        self.regions = ()

    def __init__(self, layout, *, str backing="anonymous", int fd=-1, uint64_t offset=0, bint shared=False):
        if self.count:
            raise ConfigError("guest memory is already laid out")
        if backing not in BACKINGS:
            raise ConfigError(f"unknown memory backing {backing!r}: expected one of {', '.join(BACKINGS)}")
        align = HUGE_PAGE_SIZE if backing.startswith("hugepages") else PAGE_SIZE
        self._check_layout(layout, align)
        try:
            self._map(layout, backing, fd, offset, shared)
        except BaseException:
            self.close()
            raise

    def _check_layout(self, layout, uint64_t align):
        if not 0 < len(layout) <= MAX_REGIONS:
            raise ConfigError(f"guest memory needs 1 to {MAX_REGIONS} regions, not {len(layout)}")
        end = 0
        for gpa, size in layout:
            if gpa % align or size % align or size <= 0:
                raise ConfigError(f"memory region at {gpa:#x} of {size:#x} bytes is not a multiple of {align:#x}")
            if gpa < end:
                raise ConfigError(f"memory region at {gpa:#x} overlaps the one before it, which ends at {end:#x}")
            end = gpa + size
            if end > 1 << 52:
                raise ConfigError(f"memory region at {gpa:#x} ends beyond 52 bits of physical address")

    def _map(self, layout, str backing, int fd, uint64_t offset, bint shared):
        cdef int flags
        cdef void *address
        cdef Region region
        cdef uint64_t total = sum(size for _, size in layout)
        if backing in ("anonymous", "transparent"):
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
            fd = -1
        elif backing == "hugepages":
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_2MB
            fd = -1
        elif backing == "file":
            # A page beyond the file's end can be mapped, but not touched: that is a SIGBUS.
            try:
                length = os.fstat(fd).st_size
            except OSError as error:
                raise ConfigError(f"cannot map the file of guest memory: {error.strerror}") from None
            if offset + total > length:
                raise ConfigError(f"the file of guest memory has {length} bytes, {offset + total} are needed")
            flags = MAP_SHARED if shared else MAP_PRIVATE | MAP_NORESERVE
        else:
            flags = MAP_SHARED
            if backing == "hugepages-memfd":
                self.memfd = memfd_create(b"guest-memory", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB)
            else:
                flags |= MAP_NORESERVE
                self.memfd = memfd_create(b"guest-memory", MFD_CLOEXEC)
            if self.memfd < 0 or ftruncate(self.memfd, <long> total) < 0:
                raise ConfigError(f"cannot make a memfd of {total >> 20} MiB: {strerror(errno).decode()}")
            fd = self.memfd
        regions = []
        for gpa, size in layout:
            address = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, <long> offset if fd >= 0 else 0)
            if address == MAP_FAILED:
                reason = strerror(errno).decode()
                if backing.startswith("hugepages"):
                    reason += "; reserve enough 2 MiB pages with sysctl vm.nr_hugepages"
                raise ConfigError(f"cannot map {size >> 20} MiB of guest memory ({backing}): {reason}")
            region = Region.__new__(Region)
            region.r.gpa, region.r.size, region.r.hva = gpa, size, <uint8_t *> address
            region.fd, region.offset = fd, offset
            # A forked helper process must neither keep guest memory alive nor see it.
            madvise(address, size, MADV_DONTFORK)
            if backing == "transparent":
                madvise(address, size, MADV_HUGEPAGE)
            self.table[self.count] = region.r
            self.count += 1
            self.size += size
            regions.append(region)
            self.regions = tuple(regions)
            if fd >= 0:
                offset += size

    # -- native access -------------------------------------------------------------------------------------------

    cdef uint8_t *span(self, uint64_t gpa, uint64_t size) noexcept nogil:
        cdef int i
        cdef region_t *r
        for i in range(self.count):
            r = &self.table[i]
            if gpa >= r.gpa and gpa - r.gpa < r.size:
                return r.hva + (gpa - r.gpa) if size <= r.size - (gpa - r.gpa) else NULL
        return NULL

    cdef void mark_dirty(self, uint64_t gpa, uint64_t size) noexcept nogil:
        cdef int i
        cdef region_t *r
        cdef uint64_t page, last
        if size == 0 or not self.tracking:
            return
        for i in range(self.count):
            r = &self.table[i]
            if r.dirty != NULL and gpa >= r.gpa and gpa - r.gpa < r.size:
                page = (gpa - r.gpa) >> PAGE_SHIFT
                last = (min(gpa - r.gpa + size, r.size) - 1) >> PAGE_SHIFT
                while page <= last:
                    atomic_or(&r.dirty[page >> 6], <uint64_t> 1 << (page & 63))
                    page += 1
                return

    cdef void mark_dirty_at(self, const uint8_t *hva, uint64_t size) noexcept nogil:
        cdef int i
        cdef region_t *r
        if not self.tracking:
            return
        for i in range(self.count):
            r = &self.table[i]
            if hva >= r.hva and <uint64_t> (hva - r.hva) < r.size:
                self.mark_dirty(r.gpa + <uint64_t> (hva - r.hva), size)
                return

    # -- access from Python --------------------------------------------------------------------------------------

    cdef uint8_t *_checked(self, gpa, size) except NULL:
        if not self.count:
            raise MemoryAccessError("guest memory is closed")
        cdef uint8_t *host = NULL
        if 0 <= gpa < 1 << 64 and 0 <= size < 1 << 63:
            host = self.span(gpa, size)
        if host == NULL:
            raise MemoryAccessError(f"guest physical range {gpa:#x} + {size:#x} is not inside guest memory")
        return host

    def read(self, gpa, size):
        """Copy of `size` bytes at guest physical address `gpa`. MemoryAccessError when any byte is outside RAM."""
        cdef uint8_t *host = self._checked(gpa, size)
        return PyBytes_FromStringAndSize(<char *> host, size)

    def write(self, gpa, data):
        """Copy `data`, any contiguous buffer, to `gpa`. MemoryAccessError, and nothing written, when it does not fit."""
        cdef Py_buffer view
        cdef uint8_t *host
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            host = self._checked(gpa, view.len)
            memcpy(host, view.buf, view.len)
            self.mark_dirty(gpa, view.len)
        finally:
            PyBuffer_Release(&view)

    def load(self, gpa, int fd, uint64_t offset, size):
        """Read `size` bytes of the file `fd` from `offset` straight into guest memory at `gpa`.

        MemoryAccessError when the range is outside RAM; ConfigError when the file ends early or cannot be read.
        """
        cdef uint8_t *host = self._checked(gpa, size)
        cdef uint64_t done = 0, total = size
        cdef ssize_t n
        while done < total:
            with nogil:
                n = pread(fd, host + done, total - done, <long> (offset + done))
            if n < 0 and errno == EINTR:
                continue
            if n < 0:
                raise ConfigError(f"cannot read {size} bytes at offset {offset}: {strerror(errno).decode()}")
            if n == 0:
                raise ConfigError(f"file ends {total - done} bytes before offset {offset + total}")
            done += n
        self.mark_dirty(gpa, total)

    # -- dirty pages ---------------------------------------------------------------------------------------------

    def track_dirty(self, bint enable):
        """Start (all clean) or stop noting the pages that the VMM itself writes. No device runs meanwhile."""
        cdef int i
        self.tracking = False
        for i in range(self.count):
            free(self.table[i].dirty)
            self.table[i].dirty = NULL
            if enable:
                self.table[i].dirty = <uint64_t *> calloc((self.table[i].size >> (PAGE_SHIFT + 6)) + 1, 8)
                if self.table[i].dirty == NULL:
                    raise MemoryError("no memory for the dirty bitmap")
        self.tracking = enable

    def take_dirty(self, int index):
        """The bitmap of pages written by the VMM in region `index` since the last call, little-endian, bit 0 the first
        page, in the layout of KVM_GET_DIRTY_LOG; it is cleared. Empty when writes are not tracked."""
        if not 0 <= index < self.count:
            raise IndexError(f"no memory region {index}")
        cdef region_t *r = &self.table[index]
        cdef uint64_t words = (r.size + (PAGE_SIZE << 6) - 1) >> (PAGE_SHIFT + 6)
        cdef uint64_t i
        if r.dirty == NULL:
            return b""
        bitmap = PyBytes_FromStringAndSize(NULL, words * 8)
        cdef uint64_t *out = <uint64_t *> PyBytes_AS_STRING(bitmap)
        for i in range(words):
            out[i] = atomic_exchange_zero(&r.dirty[i], 0)
        return bitmap

    # -- life ----------------------------------------------------------------------------------------------------

    def close(self):
        """Unmap everything. BufferError while a memoryview of a region is alive. Idempotent.

        No vCPU and no device may still run: the machine stops them first.
        """
        cdef Region region
        for region in self.regions:
            if region.exports:
                raise BufferError("guest memory is in use by a memoryview")
        for region in self.regions:
            region.unmap()
        cdef int i
        for i in range(self.count):
            free(self.table[i].dirty)
        self.count = 0
        self.size = 0
        self.regions = ()
        if self.memfd >= 0:
            close(self.memfd)
            self.memfd = -1

    def __dealloc__(self):
        # Each mapping goes with its Region, which a memoryview may keep alive for longer than this table.
        cdef int i
        for i in range(self.count):
            free(self.table[i].dirty)
        if self.memfd >= 0:
            close(self.memfd)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
