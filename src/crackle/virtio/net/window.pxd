from libc.stdint cimport uint16_t, uint32_t, uint64_t

from crackle.includes.io cimport iovec
from crackle.memory.guest cimport GuestMemory
from crackle.virtio.queue cimport Virtqueue, chain

cdef enum:
    HEADER = 12             # struct virtio_net_hdr_v1
    # The largest frame with its header (5.1.6.3.1).
    MAX_FRAME = 65562
    QUEUE_SIZE = 256
    # readv takes as many buffers at once (IOV_MAX).
    WINDOW = 1024

# A receive buffer of the guest's that waits for a frame.
cdef struct waiting:
    uint16_t head
    uint16_t buffers        # entries of `iov`
    uint64_t size

cdef class ReceiveWindow:
    cdef GuestMemory memory
    # Chains taken from the queue and not filled yet, in order, and their buffers.
    cdef waiting chains[QUEUE_SIZE]
    cdef iovec iov[WINDOW]
    cdef uint64_t gpa[WINDOW]
    cdef int chain_first, chain_count, iov_first, iov_count
    cdef uint64_t room              # bytes in the window
    cdef uint64_t least, largest, chain_least
    cdef bint merging
    cdef uint32_t budget            # chains that may be taken from the queue before others have a turn
    cdef uint64_t unfit             # chains given back without a byte, or frames that were cut
    cdef chain incoming

    cdef void negotiated(self, bint merging, uint64_t least) noexcept nogil
    cdef void begin_turn(self) noexcept nogil
    cdef void forget(self) noexcept nogil
    cdef void put_back(self, Virtqueue queue) noexcept nogil
    cdef bint full(self) noexcept nogil
    cdef int take_chain(self, Virtqueue queue) noexcept nogil
    cdef int gather(self, Virtqueue queue) noexcept nogil
    cdef int entries(self) noexcept nogil
    cdef bint whole(self, uint64_t size) noexcept nogil
    cdef void fill(self, Virtqueue queue, uint64_t size) noexcept nogil
