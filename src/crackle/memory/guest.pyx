"""Guest memory: what the guest sees as its RAM, as a table of regions that can come and go while the guest runs.

Owns the regions and, for a memfd, its descriptor; `close` gives both back. Everything that reads or writes guest memory
goes through `span` and `piece` (native code) or `read`, `write` and `load` (Python), which check the whole range against
the table before a byte is touched.

Threads look at the table without a lock. What changes it publishes a new one, and then calls the listeners: a listener's
method returns when its threads no longer use what they found in the old one. Whoever uses guest memory from a thread
without the GIL is a listener therefore, and answers once it has had its own lock. After that the old table, and the
mapping of a region that was removed, can go.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.unistd cimport close

from crackle.memory.region cimport HUGE_PAGE_SIZE, PAGE_SIZE, Region, make_memfd, map_region, mark, region_t

import os
from _weakref import ref

from crackle.errors import ConfigError, MemoryAccessError
from crackle.memory.region import BACKINGS


cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)
    enum:
        MADV_DOFORK
        MADV_DONTFORK

cdef extern from * nogil:
    """
    #define publish(slot, value) __atomic_store_n(slot, value, __ATOMIC_RELEASE)
    #define observe(slot) __atomic_load_n(slot, __ATOMIC_ACQUIRE)
    #define set_pages(place, value) __atomic_store_n(place, value, __ATOMIC_SEQ_CST)
    #define get_pages(place) __atomic_load_n(place, __ATOMIC_SEQ_CST)
    #define look_at(place) ((void) *(const volatile unsigned char *) (place))
    """
    void set_pages(int *place, int value)
    int get_pages(int *place)
    void look_at(const uint8_t *place)
    void publish(region_table **slot, region_table *value)
    region_table *observe(region_table **slot)

# Of these a forked process has a copy of its own.
INHERITABLE = ("anonymous", "transparent", "file")

# Of a physical address, at most (Intel SDM volume 3, 4.1.4).
ADDRESS_BITS = 52


cdef inline const region_t *region_of(const region_table *table, uint64_t gpa) noexcept nogil:
    cdef const region_t *r
    cdef int i
    for i in range(table.count):
        r = &table.regions[i]
        if gpa >= r.gpa and gpa - r.gpa < r.size:
            return r
    return NULL


cdef class GuestMemory:
    """Guest RAM as a table of regions.

    layout: [(gpa, size)] in bytes, page aligned, ascending, without overlap.
    backing: "anonymous"; "transparent" (anonymous, in huge pages where the kernel finds some); "memfd" (shared, can be
    handed to another process, which cannot change its size); "transparent-memfd" (both); "file" (a private,
    copy-on-write mapping of `fd`, regions one after the other from `offset`); "hugepages" and "hugepages-memfd" (reserved
    2 MiB pages).
    shared: with "file", map it shared instead.
    Raises ConfigError when the layout is wrong or the host cannot give the memory.
    """

    def __cinit__(self):
        self.memfd = -1
        self.regions = ()
        self.listeners = []
        self.given_up = []
        self.table = <region_table *> calloc(1, sizeof(region_table))
        if self.table == NULL:
            raise MemoryError

    def __init__(self, layout, *, str backing="anonymous", int fd=-1, uint64_t offset=0, bint shared=False):
        if self.regions:
            raise ConfigError("guest memory is already laid out")
        if backing not in BACKINGS:
            raise ConfigError(f"unknown memory backing {backing!r}: expected one of {', '.join(BACKINGS)}")
        if not 0 < len(layout) <= MAX_REGIONS:
            raise ConfigError(f"guest memory needs 1 to {MAX_REGIONS} regions, not {len(layout)}")
        end = 0
        for gpa, size in layout:
            check_range(gpa, size, backing)
            if gpa < end:
                raise ConfigError(f"memory region at {gpa:#x} overlaps the one before it, which ends at {end:#x}")
            end = gpa + size
        self.backing = backing
        try:
            self._map(layout, fd, offset, shared)
        except BaseException:
            self.close()
            raise

    def _map(self, layout, int fd, uint64_t offset, bint shared):
        cdef Region region
        cdef uint64_t total = sum(size for _, size in layout)
        if self.backing == "file":
            # A page beyond the file's end can be mapped, but not touched: that is a SIGBUS.
            try:
                length = os.fstat(fd).st_size
            except OSError as error:
                raise ConfigError(f"cannot map the file of guest memory: {error.strerror}") from None
            if offset + total > length:
                raise ConfigError(f"the file of guest memory has {length} bytes, {offset + total} are needed")
        elif self.backing.endswith("memfd"):
            fd = self.memfd = make_memfd(total, self.backing)
            offset, shared = 0, True
        else:
            fd, offset = -1, 0
        regions = []
        for gpa, size in layout:
            region = map_region(gpa, size, self.backing, fd, offset, shared, False)
            regions.append(region)
            offset += size
        self._publish(regions)
        self._forget_older()

    # -- regions that come and go --------------------------------------------------------------------------------

    def add_listener(self, listener):
        """Call `listener.region_added(region)` and `listener.region_removed(region)` when that has happened to the table.

        `region_added` may raise ConfigError or KvmError, and the region goes again. `region_removed` makes whatever uses
        the region stop: its mapping goes when it returns. Listeners are called in the order in which they came, and for
        what is removed the other way round. One that is dropped listens no more.
        """
        self.listeners.append(ref(listener))

    def remove_listener(self, listener):
        """Call it no more. Idempotent."""
        self.listeners[:] = [each for each in self.listeners if each() is not None and each() is not listener]

    cdef list _live_listeners(self):
        return [listener for listener in [each() for each in self.listeners] if listener is not None]

    def add_region(self, gpa, size, *, backing=None):
        """Add RAM while the guest runs, backed as the rest is unless `backing` says otherwise; returns the Region.

        ConfigError, and nothing has changed, when it overlaps, is one too many, cannot be had, or a listener refuses.
        One thread at a time adds and removes.
        """
        cdef Region region, other
        cdef int fd = -1
        if not self.regions:
            raise ConfigError("guest memory is closed")
        if backing is None:
            backing = "anonymous" if self.backing == "file" else self.backing
        if backing not in BACKINGS or backing == "file":
            raise ConfigError(f"no memory can be added with the backing {backing!r}")
        check_range(gpa, size, backing)
        if gpa < 0:
            raise ConfigError(f"memory region at {gpa:#x} begins below address 0")
        if len(self.regions) == MAX_REGIONS:
            raise ConfigError(f"guest memory has {MAX_REGIONS} regions already; remove one")
        for other in self.regions:
            if gpa < other.r.gpa + other.r.size and other.r.gpa < gpa + size:
                raise ConfigError(f"memory region at {gpa:#x} of {size:#x} bytes overlaps the one at {other.gpa:#x}")
        if backing.endswith("memfd"):
            fd = make_memfd(size, backing)
        try:
            region = map_region(gpa, size, backing, fd, 0, fd >= 0, fd >= 0)
            region.track(self.tracking)
        except BaseException:
            if fd >= 0 and region is None:
                close(fd)
            raise
        self._publish(sorted((*self.regions, region), key=first_address))
        told = []
        try:
            for listener in self._live_listeners():
                listener.region_added(region)
                told.append(listener)
        except BaseException:
            self._take_away(region, told)
            raise
        self._forget_older()
        return region

    def remove_region(self, Region region not None):
        """Take RAM away while the guest runs: an access of the guest finds nothing there from now on.

        A device whose rings lie in it waits for its driver to reset it. BufferError, and nothing has changed, while a
        memoryview of it is alive. What a listener raises is raised when all have been told.
        """
        if region not in self.regions:
            raise ConfigError(f"{region!r} is no region of this guest memory")
        if len(self.regions) == 1:
            raise ConfigError("the last region of guest memory cannot be removed; close it")
        if region.exports:
            raise BufferError("the memory region is in use by a memoryview")
        error = self._take_away(region, self._live_listeners())
        if error is not None:
            raise error

    cdef object _take_away(self, Region region, list told):
        """What a listener raised, or None: then nobody uses the region, and it is unmapped."""
        error = None
        self._publish([each for each in self.regions if each is not region])
        for listener in reversed(told):
            try:
                listener.region_removed(region)
            except Exception as reason:
                error = error or reason
        if error is not None:
            # Somebody may still use it. Address space is cheaper than that.
            self.given_up.append(region)
            return error
        self._forget_older()
        if not region.exports:
            region.unmap()
        return None

    cdef object _publish(self, regions):
        cdef region_table *table = <region_table *> calloc(1, sizeof(region_table))
        cdef Region region
        if table == NULL:
            raise MemoryError
        for region in regions:
            table.regions[table.count] = region.r
            table.count += 1
        table.older = self.table
        self.regions = tuple(regions)
        self.size = sum(each.size for each in self.regions)
        publish(&self.table, table)

    cdef void _forget_older(self) noexcept:
        """Nobody looks at the tables before this one any more."""
        cdef region_table *older
        while self.table.older != NULL:
            older = self.table.older
            self.table.older = older.older
            free(older)

    # -- native access -------------------------------------------------------------------------------------------

    cdef uint64_t piece(self, uint64_t gpa, uint64_t size, uint8_t **host) noexcept nogil:
        cdef const region_t *r = region_of(observe(&self.table), gpa)
        if r == NULL:
            return 0
        host[0] = r.hva + (gpa - r.gpa)
        return min(size, r.size - (gpa - r.gpa))

    cdef const region_t *find(self, uint64_t gpa) noexcept nogil:
        return region_of(observe(&self.table), gpa)

    cdef uint8_t *span(self, uint64_t gpa, uint64_t size) noexcept nogil:
        cdef uint8_t *host = NULL
        return host if self.piece(gpa, size, &host) == size else NULL

    cdef void fetch(self, const uint8_t *host, uint64_t size) noexcept nogil:
        cdef uint64_t at = 0
        while at < size:
            look_at(host + at)
            # The first byte of the next page.
            at += PAGE_SIZE - (<uint64_t> host + at) % PAGE_SIZE

    cdef bint has_lost(self) noexcept nogil:
        return get_pages(&self.pages) == PAGES_LOST

    cdef void mark_dirty(self, uint64_t gpa, uint64_t size) noexcept nogil:
        cdef region_table *table
        cdef int i
        cdef region_t *r
        cdef uint64_t part
        if not self.tracking:
            return
        table = observe(&self.table)
        for i in range(table.count):
            r = &table.regions[i]
            # Regions are in ascending order: what goes on in the next is found next.
            if size and gpa >= r.gpa and gpa - r.gpa < r.size:
                part = min(size, r.size - (gpa - r.gpa))
                mark(r, gpa - r.gpa, part)
                gpa += part
                size -= part

    cdef void mark_dirty_at(self, const uint8_t *hva, uint64_t size) noexcept nogil:
        cdef region_table *table
        cdef int i
        cdef region_t *r
        if not self.tracking or size == 0:
            return
        table = observe(&self.table)
        for i in range(table.count):
            r = &table.regions[i]
            if hva >= r.hva and <uint64_t> (hva - r.hva) < r.size:
                mark(r, <uint64_t> (hva - r.hva), min(size, r.size - <uint64_t> (hva - r.hva)))
                return

    # -- access from Python --------------------------------------------------------------------------------------

    cdef list _cover(self, gpa, size):
        """[(region, offset in it, bytes)] that make up the range, adjacent regions included; MemoryAccessError."""
        cdef Region region
        if not self.regions:
            raise MemoryAccessError("guest memory is closed")
        found = []
        at, left = gpa, size
        if gpa >= 0 and size >= 0:
            for region in self.regions:
                if region.r.gpa <= at < region.r.gpa + region.r.size:
                    part = min(left, region.r.gpa + region.r.size - at)
                    found.append((region, at - region.r.gpa, part))
                    at += part
                    left -= part
                    if left == 0:
                        return found
        raise MemoryAccessError(f"guest physical range {gpa:#x} + {size:#x} is not inside guest memory")

    def read(self, gpa, size):
        """Copy of `size` bytes at guest physical address `gpa`. MemoryAccessError when any byte is outside RAM."""
        cdef Region region
        cdef uint64_t offset, part
        parts = []
        for region, offset, part in self._cover(gpa, size):
            parts.append(PyBytes_FromStringAndSize(<char *> region.r.hva + offset, part))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, gpa, data):
        """Copy `data`, any contiguous buffer, to `gpa`. MemoryAccessError, and nothing written, when it does not fit."""
        cdef Py_buffer view
        cdef Region region
        cdef uint64_t offset, part
        cdef uint8_t *source
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            source = <uint8_t *> view.buf
            for region, offset, part in self._cover(gpa, view.len):
                memcpy(region.r.hva + offset, source, part)
                source += part
                mark(&region.r, offset, part)
        finally:
            PyBuffer_Release(&view)

    def load(self, gpa, int fd, uint64_t offset, size):
        """Read `size` bytes of the file `fd` from `offset` straight into guest memory at `gpa`.

        MemoryAccessError when the range is outside RAM; ConfigError when the file ends early or cannot be read.
        """
        cdef Region region
        cdef uint64_t place, part
        for region, place, part in self._cover(gpa, size):
            # Not to be removed meanwhile.
            region.exports += 1
            try:
                region.load(place, fd, offset, part)
            finally:
                region.exports -= 1
            offset += part

    def map_file(self, int fd):
        """Have the contents of the file `fd`, copy-on-write: regions one after the other, as `write_memory` wrote them.

        Nothing is read before somebody looks at it. The mappings stay where they are, and so do KVM's slots. Keeps a
        descriptor of its own. ConfigError when memory is shared or in reserved huge pages, or the file is too short.
        """
        cdef Region region
        cdef uint64_t offset = 0
        if self.backing not in ("anonymous", "transparent"):
            raise ConfigError(f"a memory file cannot be mapped over {self.backing} memory")
        if os.fstat(fd).st_size < self.size:
            raise ConfigError(f"the memory file has {os.fstat(fd).st_size} bytes, {self.size} are needed")
        self.memfd = os.dup(fd)
        for region in self.regions:
            region.map_private(self.memfd, offset, self.backing == "transparent")
            offset += region.r.size
        self.backing = "file"

    def come_from(self, source):
        """Pages that nobody has touched yet come from `source`, whose `close` is called before they are unmapped.

        Devices wait for them before they begin with what the guest wants, in `Virtqueue.walk`, and never in the kernel
        in the middle of it: there a wait could only be ended by giving the disk zeros.
        """
        self.source = source
        set_pages(&self.pages, PAGES_COME)

    def release(self):
        """Nobody waits any more for a page that the source does not give: it is zeros, of which no device makes use.

        For a machine that ends. Does nothing without a source.
        """
        if self.source is not None:
            set_pages(&self.pages, PAGES_LOST)
            self.source.release()

    # -- forks ---------------------------------------------------------------------------------------------------

    def check_inheritable(self):
        """ConfigError where a forked process would have the same memory, or might not get its own copy of a page."""
        if self.source is not None:
            raise ConfigError(
                "memory whose pages a page-fault handler gives is not forked: the handler would not know of the clones. "
                "Load the snapshot from its memory file"
            )
        if self.backing not in INHERITABLE:
            raise ConfigError(
                f"memory of the kind {self.backing!r} is not copied on write: it is shared with another process, or in "
                "reserved huge pages"
            )

    def let_inherit(self, bint enable):
        """Whether a process that is forked from now on has this memory too, each page until one of the two writes to it."""
        cdef Region region
        for region in self.regions:
            madvise(region.r.hva, region.r.size, MADV_DOFORK if enable else MADV_DONTFORK)

    def inherited(self):
        """In the forked process: it is this one's now. Who listened there does not listen here."""
        self.listeners.clear()
        self.let_inherit(False)

    # -- dirty pages ---------------------------------------------------------------------------------------------

    def track_dirty(self, bint enable):
        """Start (all clean) or stop noting the pages that the VMM itself writes. No device runs meanwhile."""
        cdef Region region
        self.tracking = False
        for region in self.regions:
            region.track(enable)
        self._publish(self.regions)
        self._forget_older()
        self.tracking = enable

    def take_dirty(self, int index):
        """The bitmap of pages written by the VMM in `regions[index]` since the last call, little-endian, bit 0 the first
        page, in the layout of KVM_GET_DIRTY_LOG; it is cleared. Empty when writes are not tracked."""
        if not 0 <= index < len(self.regions):
            raise IndexError(f"no memory region {index}")
        return (<Region> self.regions[index]).take_dirty()

    # -- life ----------------------------------------------------------------------------------------------------

    def close(self):
        """Unmap everything. BufferError while a memoryview of a region is alive. Idempotent.

        No vCPU and no device may still run: the machine stops them first. Listeners are not called.
        """
        cdef Region region
        for region in self.regions:
            if region.exports:
                raise BufferError("guest memory is in use by a memoryview")
        source, self.source = self.source, None
        if source is not None:
            source.close()
        regions = (*self.regions, *self.given_up)
        self._publish(())
        self._forget_older()
        self.given_up.clear()
        for region in regions:
            if not region.exports:
                region.unmap()
        if self.memfd >= 0:
            close(self.memfd)
            self.memfd = -1

    def __dealloc__(self):
        # Each mapping goes with its Region, which a memoryview may keep alive for longer than this table.
        if self.table != NULL:
            self._forget_older()
            free(self.table)
        if self.memfd >= 0:
            close(self.memfd)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def first_address(Region region not None):
    """Where it begins, to sort regions by."""
    return region.r.gpa


cdef object check_range(gpa, size, str backing):
    align = HUGE_PAGE_SIZE if backing.startswith("hugepages") else PAGE_SIZE
    if gpa % align or size % align or size <= 0:
        raise ConfigError(f"memory region at {gpa:#x} of {size:#x} bytes is not a multiple of {align:#x}")
    if gpa + size > 1 << ADDRESS_BITS:
        raise ConfigError(f"memory region at {gpa:#x} ends beyond {ADDRESS_BITS} bits of physical address")
