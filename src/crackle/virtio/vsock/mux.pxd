from libc.stdint cimport uint16_t, uint32_t, uint64_t

from crackle.includes.io cimport iovec
from crackle.includes.vsock cimport virtio_vsock_hdr
from crackle.virtio.vsock.host cimport HostSockets
from crackle.virtio.vsock.streams cimport Streams
from crackle.virtio.vsock.table cimport Table, connection

cdef enum:
    MAX_RESETS = 256

# What next_packet() has found for the guest.
cdef enum:
    NOTHING = 0
    PACKET = 1      # the header is all of it
    DATA = 2        # the socket is to be read

# A reset that answers a packet of no connection.
cdef struct reset_reply:
    uint64_t cid
    uint32_t host_port
    uint32_t guest_port

cdef class Multiplexer:
    cdef readonly uint64_t cid
    cdef Streams streams
    cdef Table table                # the streams'
    cdef HostSockets host
    cdef readonly uint64_t rx_bytes, rx_packets, tx_packets, read_fails
    cdef reset_reply resets[MAX_RESETS]
    cdef uint32_t reset_first
    cdef uint32_t reset_count

    cdef void reset(self) noexcept nogil
    cdef bint pending(self) noexcept nogil
    cdef bint full(self) noexcept nogil
    cdef bint is_ours(self, const virtio_vsock_hdr *h) noexcept nogil
    cdef void take(self, const virtio_vsock_hdr *h, iovec *iov, int count) noexcept nogil
    cdef void take_incomplete(self, const virtio_vsock_hdr *h) noexcept nogil
    cdef void refuse(self, const virtio_vsock_hdr *h) noexcept nogil
    cdef void begin(self, const virtio_vsock_hdr *h) noexcept nogil
    cdef void take_for(self, connection *c, const virtio_vsock_hdr *h, iovec *iov, int count) noexcept nogil
    cdef void guest_shuts(self, connection *c, uint32_t flags) noexcept nogil
    cdef int next_packet(self, connection **which, virtio_vsock_hdr *h) noexcept nogil
    cdef int next_of(self, connection *c, virtio_vsock_hdr *h) noexcept nogil
    cdef void fill(self, connection *c, virtio_vsock_hdr *h, uint16_t op, uint32_t flags) noexcept nogil
    cdef void data_read(self, connection *c, ssize_t size, size_t asked) noexcept nogil
