"""The PIO and MMIO address spaces: which device answers at which address.

A device attaches a range with a native handler and is called on the vCPU thread that exited, without the GIL; a device
written in Python is attached with `attach_python` and called under it.

Look-ups take no lock: whoever attaches or detaches publishes a new table. A reader says which table it is in for as long as
a handler out of it runs, and an old table goes, with the device that it alone names, when no reader is in it or an older one.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport usleep

from crackle.runtime.threads cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock
)

from crackle.errors import ConfigError


# What a device written in Python returns.
CONTINUE, RESET, SHUTDOWN, PANIC = BUS_CONTINUE, BUS_RESET, BUS_SHUTDOWN, BUS_PANIC

cdef extern from * nogil:
    """
    #define publish(slot, value) __atomic_store_n(slot, value, __ATOMIC_SEQ_CST)
    #define observe(slot) __atomic_load_n(slot, __ATOMIC_SEQ_CST)
    #define withdraw(slot) __atomic_store_n(slot, NULL, __ATOMIC_RELEASE)
    #define count_one(place) __atomic_fetch_add(place, 1, __ATOMIC_RELAXED)

    /* How many handlers, of any bus, the calling thread is in. */
    static __thread int handlers;
    #define begin_handler() (void) handlers++
    #define end_handler() (void) handlers--
    #define in_handler() (handlers != 0)
    """
    void publish(bus_table **slot, bus_table *value)
    bus_table *observe(bus_table **slot)
    void withdraw(bus_table **slot)
    void count_one(uint64_t *place)
    void begin_handler()
    void end_handler()
    bint in_handler()

cdef enum:
    GRACE_POLL_US = 50


cdef class Bus:
    """One address space. `name` ("pio" or "mmio") appears in messages."""

    def __cinit__(self, str name):
        pthread_mutex_init(&self.lock, NULL)
        self.name = name
        self.owners = {}
        self.retired = []
        self.table = self.room(0)

    def __dealloc__(self):
        cdef bus_table *older
        while self.table != NULL:
            older = self.table.older
            free(self.table)
            self.table = older
        pthread_mutex_destroy(&self.lock)

    # -- what answers where: with the GIL, which keeps changes apart ----------------------------------------------

    cdef bus_table *room(self, int count) except NULL:
        """A table for `count` ranges, to be filled in."""
        cdef bus_table *new = <bus_table *> malloc(sizeof(bus_table) + count * sizeof(bus_range))
        if new == NULL:
            raise MemoryError
        new.count, new.number, new.older = count, 0, NULL
        return new

    cdef void replace(self, bus_table *new, object owner):
        """Publish a table; `owner` is kept for as long as somebody may be in the one before."""
        new.older = self.table
        self.retired.append((self.table.number, owner))
        new.number = self.table.number + 1
        publish(&self.table, new)
        self.let_go()

    cdef void let_go(self):
        """Free what nobody can be in any more, the oldest first."""
        cdef bus_table *newer
        cdef bus_table *oldest
        while self.retired:
            newer = self.table
            while newer.older.older != NULL:
                newer = newer.older
            oldest = newer.older
            if self.is_read(oldest):
                return
            newer.older = NULL
            free(oldest)
            # Last: its end may run any code, and that may come back here.
            owner = self.retired.pop(0)
            del owner

    cdef int attach(self, uint64_t base, uint64_t size, bus_handler handler, void *device, object owner) except -1:
        """Claim [base, base + size); `owner` is kept alive until it is detached. ConfigError when any of it is taken."""
        cdef bus_table *old = self.table
        cdef bus_table *new
        cdef int i, place = 0
        if size == 0 or base + size < base:
            raise ConfigError(f"{self.name} range {base:#x} + {size:#x} is empty or wraps around")
        for i in range(old.count):
            if base < old.ranges[i].base + old.ranges[i].size and old.ranges[i].base < base + size:
                raise ConfigError(f"{self.name} range {base:#x} + {size:#x} overlaps the device at {old.ranges[i].base:#x}")
            if old.ranges[i].base < base:
                place = i + 1
        new = self.room(old.count + 1)
        memcpy(&new.ranges[0], &old.ranges[0], place * sizeof(bus_range))
        memcpy(&new.ranges[place + 1], &old.ranges[place], (old.count - place) * sizeof(bus_range))
        new.ranges[place].base, new.ranges[place].size = base, size
        new.ranges[place].handler, new.ranges[place].device = handler, device
        self.owners[base] = owner
        self.replace(new, None)
        return 0

    def attach_python(self, uint64_t base, uint64_t size, device):
        """Claim [base, base + size) for a device written in Python.

        It has `read(offset, size) -> int` and `write(offset, size, value) -> int` (what the vCPU is to do: CONTINUE, RESET,
        SHUTDOWN or PANIC), both called on a vCPU thread under the GIL. An exception there is reported as unraisable; the
        guest reads all ones.
        """
        self.attach(base, size, python_handler, <void *> device, device)

    def detach(self, uint64_t base):
        """Take away the range that begins at `base`; ConfigError when none does.

        When this returns, no vCPU is in its handler, and none comes again. The caller holds no lock that a handler takes.
        A handler itself may detach, its own range too: then nobody is waited for, and the device is let go of, memory and
        all, with a later change, when its handlers have returned.
        """
        cdef bus_table *old = self.table
        cdef bus_table *new
        cdef uint64_t number = old.number
        cdef int place = 0
        while place < old.count and old.ranges[place].base != base:
            place += 1
        if place == old.count:
            raise ConfigError(f"no {self.name} range begins at {base:#x}")
        new = self.room(old.count - 1)
        memcpy(&new.ranges[0], &old.ranges[0], place * sizeof(bus_range))
        memcpy(&new.ranges[place], &old.ranges[place + 1], (new.count - place) * sizeof(bus_range))
        self.replace(new, self.owners.pop(base))
        # The oldest goes first, so that `old` is gone when nobody is in any table that has the range.
        while not in_handler() and self.retired and self.retired[0][0] <= number:
            with nogil:
                usleep(GRACE_POLL_US)
            self.let_go()

    # -- look-ups ------------------------------------------------------------------------------------------------

    cdef void enter(self, bus_reader *reader) noexcept nogil:
        """From now on `reader` may be given to `access`, by one thread."""
        reader.inside = NULL
        pthread_mutex_lock(&self.lock)
        reader.next = self.readers
        self.readers = reader
        pthread_mutex_unlock(&self.lock)

    cdef void leave(self, bus_reader *reader) noexcept nogil:
        cdef bus_reader **place = &self.readers
        pthread_mutex_lock(&self.lock)
        while place[0] != reader:
            place = &place[0].next
        place[0] = reader.next
        pthread_mutex_unlock(&self.lock)

    cdef bint is_read(self, bus_table *table) noexcept nogil:
        """Whether a reader is in `table`, which has been replaced."""
        cdef bint found = False
        pthread_mutex_lock(&self.lock)
        cdef bus_reader *reader = self.readers
        while reader != NULL and not found:
            found = observe(&reader.inside) == table
            reader = reader.next
        pthread_mutex_unlock(&self.lock)
        return found

    cdef int access(
        self, bus_reader *reader, uint64_t address, uint8_t *data, uint32_t size, bint is_write
    ) noexcept nogil:
        cdef bus_table *table = observe(&self.table)
        cdef bus_range *r
        cdef int low = 0, high, middle, action = BUS_CONTINUE
        while True:
            publish(&reader.inside, table)
            # Replaced before this reader could be seen in it: it may be gone.
            if observe(&self.table) == table:
                break
            table = observe(&self.table)
        high = table.count
        while low < high:
            middle = (low + high) >> 1
            if table.ranges[middle].base <= address:
                low = middle + 1
            else:
                high = middle
        if low > 0:
            r = &table.ranges[low - 1]
            if address - r.base < r.size and size <= r.size - (address - r.base):
                begin_handler()
                action = r.handler(r.device, address - r.base, data, size, is_write)
                end_handler()
                withdraw(&reader.inside)
                return action
        withdraw(&reader.inside)
        # Nobody answers. Zeros, as in Firecracker: all ones from the CMOS clock would be "busy", for ever.
        count_one(&self.unclaimed_count)
        if not is_write:
            memset(data, 0, size)
        return BUS_CONTINUE

    @property
    def unclaimed(self):
        """Accesses that no device answered."""
        return self.unclaimed_count

    def read(self, uint64_t address, uint32_t size):
        """What a vCPU reading `size` (1, 2, 4 or 8) bytes at `address` would get, little-endian. For tests."""
        cdef uint64_t value = 0
        cdef bus_reader reader
        if size not in (1, 2, 4, 8):
            raise ValueError(f"an access is 1, 2, 4 or 8 bytes, not {size}")
        with nogil:
            self.enter(&reader)
            self.access(&reader, address, <uint8_t *> &value, size, False)
            self.leave(&reader)
        return value

    def write(self, uint64_t address, uint32_t size, uint64_t value):
        """What a vCPU writing does. Returns what the device asked of the vCPU: CONTINUE, RESET, ..."""
        cdef bus_reader reader
        cdef int action
        if size not in (1, 2, 4, 8):
            raise ValueError(f"an access is 1, 2, 4 or 8 bytes, not {size}")
        with nogil:
            self.enter(&reader)
            action = self.access(&reader, address, <uint8_t *> &value, size, True)
            self.leave(&reader)
        return action


cdef int python_handler(void *device, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept with gil:
    cdef uint64_t value = 0
    cdef int action = BUS_CONTINUE
    cdef object target = <object> <PyObject *> device
    memset(&value, 0xff, sizeof(value))
    try:
        if is_write:
            value = 0
            memcpy(&value, data, size)
            action = target.write(offset, size, value)
        else:
            value = target.read(offset, size)
    finally:
        if not is_write:
            memcpy(data, &value, size)
    return action
