from libc.stdint cimport uint32_t, uint64_t

from crackle.includes.io cimport iovec
from crackle.runtime.clock cimport MachineClock
from crackle.virtio.vsock.listener cimport Listener
from crackle.virtio.vsock.streams cimport Streams
from crackle.virtio.vsock.table cimport Table, connection

cdef enum:
    FIRST_PORT = 1 << 30            # of those given to host programs; they go up to 2^31

# Nanoseconds for the guest to accept a connection, or to agree to its end; as Firecracker's.
cdef uint64_t SHORT_NS

cdef class HostSockets:
    cdef Streams streams
    cdef Table table                # the streams'
    cdef Listener listener
    cdef MachineClock clock         # the machine's, once there is one
    cdef readonly int epoll_fd
    cdef int timer_fd
    cdef bint wanted                # there is a driver: host programs may come
    cdef uint64_t retry_after
    cdef uint64_t armed
    cdef readonly uint32_t last_port
    cdef readonly uint64_t tx_bytes, write_fails, flush_fails, event_fails, muxer_fails

    cdef void close_fds(self) noexcept
    # With the device's lock held:
    cdef uint64_t now(self) noexcept nogil
    cdef bint start(self) noexcept nogil
    cdef void stop(self) noexcept nogil
    cdef void host_events(self) noexcept nogil
    cdef void arm(self) noexcept nogil
    cdef void set_alarm(self, uint64_t when) noexcept nogil
    cdef void expire(self) noexcept nogil
    cdef uint64_t next_place(self) noexcept nogil
    cdef void accept_some(self) noexcept nogil
    cdef void greet(self, connection *c) noexcept nogil
    cdef void established(self, connection *c) noexcept nogil
    cdef connection *dial(self, uint32_t host_port, uint32_t guest_port) noexcept nogil
    cdef void try_to_dial(self, connection *c) noexcept nogil
    cdef void host_ready(self, connection *c, uint32_t events) noexcept nogil
    cdef bint watch(self, connection *c, int operation) noexcept nogil
    cdef void write(self, connection *c, iovec *iov, int count, uint32_t size) noexcept nogil
    cdef void flush(self, connection *c) noexcept nogil
    cdef void write_failed(self, connection *c) noexcept nogil
    cdef void end_of_stream(self, connection *c) noexcept nogil
