from libc.stdint cimport uint8_t, uint32_t, uint64_t

from crackle.runtime.threads cimport pthread_mutex_t

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
    uint64_t number         # of changes before it
    bus_table *older        # which somebody may still be looking at
    bus_range ranges[0]

# A thread that looks things up, between `enter` and `leave`: which table it is in, NULL for none.
cdef struct bus_reader:
    bus_table *inside
    bus_reader *next

cdef class Bus:
    cdef bus_table *table
    cdef pthread_mutex_t lock
    cdef bus_reader *readers
    cdef readonly str name
    cdef dict owners
    cdef list retired
    cdef uint64_t unclaimed_count
    cdef int attach(self, uint64_t base, uint64_t size, bus_handler handler, void *device, object owner) except -1
    cdef void enter(self, bus_reader *reader) noexcept nogil
    cdef void leave(self, bus_reader *reader) noexcept nogil
    cdef int access(
        self, bus_reader *reader, uint64_t address, uint8_t *data, uint32_t size, bint is_write
    ) noexcept nogil
    cdef bus_table *room(self, int count) except NULL
    cdef void replace(self, bus_table *new, object owner)
    cdef bint is_read(self, bus_table *table) noexcept nogil
    cdef void let_go(self)
