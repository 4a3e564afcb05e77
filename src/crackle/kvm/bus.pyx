"""The PIO and MMIO address spaces: which device answers at which address.

A device attaches a range with a native handler and is called on the vCPU thread that exited, without the GIL; a device
written in Python is attached with `attach_python` and called under it. Look-ups take no lock: attaching publishes a new
table and keeps the old one until the bus goes.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from crackle.errors import ConfigError


# What a device written in Python returns.
CONTINUE, RESET, SHUTDOWN, PANIC = BUS_CONTINUE, BUS_RESET, BUS_SHUTDOWN, BUS_PANIC

cdef extern from * nogil:
    """
    #define publish(slot, value) __atomic_store_n(slot, value, __ATOMIC_RELEASE)
    #define observe(slot) __atomic_load_n(slot, __ATOMIC_ACQUIRE)
    """
    void publish(bus_table **slot, bus_table *value)
    bus_table *observe(bus_table **slot)


cdef class Bus:
    """One address space. `name` ("pio" or "mmio") appears in messages."""

    def __cinit__(self, str name):
        self.name = name
        self.owners = []
        self.table = <bus_table *> malloc(sizeof(bus_table))
        if self.table == NULL:
            raise MemoryError
        memset(self.table, 0, sizeof(bus_table))

    def __dealloc__(self):
        cdef bus_table *older
        while self.table != NULL:
            older = self.table.older
            free(self.table)
            self.table = older

    cdef int attach(self, uint64_t base, uint64_t size, bus_handler handler, void *device, object owner) except -1:
        """Claim [base, base + size); `owner` is kept alive with the bus. ConfigError when any of it is taken."""
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
        new = <bus_table *> malloc(sizeof(bus_table) + (old.count + 1) * sizeof(bus_range))
        if new == NULL:
            raise MemoryError
        new.count = old.count + 1
        new.older = old
        memcpy(&new.ranges[0], &old.ranges[0], place * sizeof(bus_range))
        memcpy(&new.ranges[place + 1], &old.ranges[place], (old.count - place) * sizeof(bus_range))
        new.ranges[place].base, new.ranges[place].size = base, size
        new.ranges[place].handler, new.ranges[place].device = handler, device
        self.owners.append(owner)
        publish(&self.table, new)
        return 0

    def attach_python(self, uint64_t base, uint64_t size, device):
        """Claim [base, base + size) for a device written in Python.

        It has `read(offset, size) -> int` and `write(offset, size, value) -> int` (what the vCPU is to do: CONTINUE, RESET,
        SHUTDOWN or PANIC), both called on a vCPU thread under the GIL. An exception there is reported as unraisable; the
        guest reads all ones.
        """
        self.attach(base, size, python_handler, <void *> device, device)

    cdef int access(self, uint64_t address, uint8_t *data, uint32_t size, bint is_write) noexcept nogil:
        cdef bus_table *table = observe(&self.table)
        cdef bus_range *r
        cdef int low = 0, high = table.count, middle
        while low < high:
            middle = (low + high) >> 1
            if table.ranges[middle].base <= address:
                low = middle + 1
            else:
                high = middle
        if low > 0:
            r = &table.ranges[low - 1]
            if address - r.base < r.size and size <= r.size - (address - r.base):
                return r.handler(r.device, address - r.base, data, size, is_write)
        # Nobody answers. Zeros, as in Firecracker: all ones from the CMOS clock would be "busy", for ever.
        self.unclaimed += 1
        if not is_write:
            memset(data, 0, size)
        return BUS_CONTINUE

    def read(self, uint64_t address, uint32_t size):
        """What a vCPU reading `size` (1, 2, 4 or 8) bytes at `address` would get, little-endian. For tests."""
        cdef uint64_t value = 0
        if size not in (1, 2, 4, 8):
            raise ValueError(f"an access is 1, 2, 4 or 8 bytes, not {size}")
        with nogil:
            self.access(address, <uint8_t *> &value, size, False)
        return value

    def write(self, uint64_t address, uint32_t size, uint64_t value):
        """What a vCPU writing does. Returns what the device asked of the vCPU: CONTINUE, RESET, ..."""
        cdef int action
        if size not in (1, 2, 4, 8):
            raise ValueError(f"an access is 1, 2, 4 or 8 bytes, not {size}")
        with nogil:
            action = self.access(address, <uint8_t *> &value, size, True)
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
