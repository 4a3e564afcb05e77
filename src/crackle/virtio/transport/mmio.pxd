from libc.stdint cimport uint8_t, uint32_t, uint64_t

from crackle.runtime.iothread cimport IoThread, event_source
from crackle.virtio.device cimport VirtioDevice
from crackle.virtio.queue cimport Virtqueue

cdef class MmioTransport:
    cdef readonly VirtioDevice device
    cdef readonly uint64_t address
    cdef readonly object line       # a crackle.kvm.line.Line
    cdef readonly int irq_fd        # the line's
    cdef list steps                 # what `unplug` takes back
    cdef int interrupt_status       # changed by atomic operations only
    cdef uint64_t raised_ns         # when the line was raised last; under the device's lock, as
    cdef bint owed                  # whether it is to be raised when the timer fires
    cdef int timer_fd
    cdef event_source *timer
    cdef bint lent                  # another process raises interrupts too, and cannot set the bit
    cdef uint32_t device_features_select, driver_features_select, queue_select

    cdef start_timer(self, IoThread io)
    cdef void close_timer(self) noexcept
    cdef bint interrupt(self, int cause) noexcept nogil
    cdef bint raise_line(self, uint64_t now) noexcept nogil
    cdef void raise_owed(self) noexcept nogil
    cdef int access(self, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil
    cdef void config(self, VirtioDevice device, uint64_t offset, uint8_t *data, uint32_t size, bint is_write) noexcept nogil
    cdef uint32_t load(self, VirtioDevice device, uint64_t offset) noexcept nogil
    cdef void store(self, VirtioDevice device, uint64_t offset, uint32_t value) noexcept nogil
    cdef void store_queue(self, Virtqueue queue, uint64_t offset, uint32_t value) noexcept nogil
