from libc.stdint cimport uint8_t, uint32_t, uint64_t

# What a handler asks of the vCPU that called it.
cdef enum:
    BUS_CONTINUE = 0
    BUS_RESET = 1           # the guest asked for a reset of the machine
    BUS_SHUTDOWN = 2        # the guest asked to be switched off
    BUS_PANIC = 3           # the guest's kernel has panicked, and the vCPU is to end

# Reads or writes `size` (1 to 8) bytes at `offset` into the device's range; runs on a vCPU thread without the GIL.
ctypedef int (*bus_handler)(void *device, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil

cdef struct bus_range:
    uint64_t base
    uint64_t size
    bus_handler handler
    void *device

cdef struct bus_table:
    int count
    bus_table *older        # kept until the bus is freed: a vCPU may still be looking at it
    bus_range ranges[0]

cdef class Bus:
    cdef bus_table *table
    cdef readonly str name
    cdef list owners
    cdef readonly uint64_t unclaimed
    cdef int attach(self, uint64_t base, uint64_t size, bus_handler handler, void *device, object owner) except -1
    cdef int access(self, uint64_t address, uint8_t *data, uint32_t size, bint is_write) noexcept nogil
