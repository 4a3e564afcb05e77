from libc.stdint cimport uint32_t, uint64_t

from crackle.includes.io cimport iovec
from crackle.includes.vsock cimport sockaddr_un
from crackle.virtio.vsock.table cimport Table, connection

cdef enum:
    FIRST_PORT = 1 << 30            # of those given to host programs; they go up to 2^31

# Nanoseconds for the guest to accept a connection, or to agree to its end; as Firecracker's.
cdef uint64_t SHORT_NS

cdef class HostSockets:
    cdef Table table
    cdef readonly int epoll_fd
    cdef int listen_fd
    cdef int timer_fd
    cdef bint listening
    cdef uint64_t listen_again
    cdef uint64_t armed
    cdef readonly str path
    cdef sockaddr_un address        # of the listening socket; the guest's connections go to this and _PORT
    cdef size_t path_length
    cdef tuple identity             # device and inode of the socket's file
    cdef readonly uint32_t last_port
    cdef readonly uint64_t rx_bytes, tx_bytes, rx_packets, tx_packets, added, killed, removed
    cdef readonly uint64_t read_fails, write_fails, flush_fails, event_fails, muxer_fails

    cdef listen_at(self, str path)
    cdef set_address(self, bytes path)
    cdef void close_fds(self) noexcept
    # With the device's lock held:
    cdef bint start(self) noexcept nogil
    cdef void stop(self) noexcept nogil
    cdef void host_events(self) noexcept nogil
    cdef void arm(self) noexcept nogil
    cdef uint32_t credit(self, connection *c) noexcept nogil
    cdef bint sendable(self, connection *c) noexcept nogil
    cdef void ready(self, connection *c) noexcept nogil
    cdef bint listen_for_more(self) noexcept nogil
    cdef void accept_some(self) noexcept nogil
    cdef void greet(self, connection *c) noexcept nogil
    cdef void established(self, connection *c) noexcept nogil
    cdef connection *dial(self, uint32_t host_port, uint32_t guest_port) noexcept nogil
    cdef void try_to_dial(self, connection *c) noexcept nogil
    cdef void host_ready(self, connection *c, uint32_t events) noexcept nogil
    cdef void write(self, connection *c, iovec *iov, int count, uint32_t size) noexcept nogil
    cdef void flush(self, connection *c) noexcept nogil
    cdef void passed_on(self, connection *c, uint32_t size) noexcept nogil
    cdef void write_failed(self, connection *c) noexcept nogil
    cdef void end_of_stream(self, connection *c) noexcept nogil
    cdef void tell(self, connection *c, uint32_t flags) noexcept nogil
    cdef bint watch(self, connection *c, int operation) noexcept nogil
    cdef void hang_up(self, connection *c) noexcept nogil
    cdef void finish(self, connection *c) noexcept nogil
    cdef void kill(self, connection *c) noexcept nogil
    cdef void release(self, connection *c) noexcept nogil
    cdef void expire(self) noexcept nogil
