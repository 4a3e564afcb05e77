from libc.stdint cimport uint16_t, uint32_t, uint64_t

from crackle.includes.io cimport iovec
from crackle.includes.vsock cimport virtio_vsock_hdr
from crackle.memory.guest cimport GuestMemory
from crackle.virtio.queue cimport Virtqueue, chain
from crackle.virtio.vsock.mux cimport Multiplexer
from crackle.virtio.vsock.table cimport connection

cdef enum:
    HEADER = sizeof(virtio_vsock_hdr)
    RX_QUEUE_SIZE = 256
    # What one read from a socket fills: no connection keeps the others waiting for longer.
    MAX_GATHER = 64
    MAX_BUFFERS = 2 * RX_QUEUE_SIZE

# A packet to the guest: a chain of the receive queue.
cdef struct packet:
    uint16_t head
    int first           # of its buffers in the gathering
    int count
    uint32_t room       # for data

cdef class ReceiveBuffers:
    cdef GuestMemory memory
    cdef chain request
    cdef packet packets[MAX_GATHER]
    cdef iovec buffers[MAX_BUFFERS]     # of the packets, headers and all
    cdef uint64_t gpas[MAX_BUFFERS]
    cdef iovec data[MAX_BUFFERS]        # of what is read into them
    cdef readonly uint64_t errors

    cdef int gather(self, Virtqueue queue, int number) noexcept nogil
    cdef bint usable(self) noexcept nogil
    cdef void give_back(self, Virtqueue queue) noexcept nogil
    cdef void put(self, Virtqueue queue, virtio_vsock_hdr *header) noexcept nogil
    cdef int data_buffers(self, packet *p, iovec *data, size_t size) noexcept nogil
    cdef uint32_t read_into(self, Virtqueue queue, Multiplexer mux, connection *c) noexcept nogil
    cdef void put_packet(self, Virtqueue queue, packet *p, virtio_vsock_hdr *header) noexcept nogil
