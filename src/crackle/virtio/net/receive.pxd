from libc.stdint cimport uint16_t, uint32_t, uint64_t

from crackle.includes.io cimport iovec
from crackle.ratelimit.limiter cimport RateLimiter
from crackle.virtio.device cimport VirtioDevice
from crackle.virtio.queue cimport Virtqueue, chain

cdef enum:
    RX = 0
    TX = 1
    HEADER = 12             # struct virtio_net_hdr_v1
    # The largest frame with its header (5.1.6.3.1).
    MAX_FRAME = 65562
    QUEUE_SIZE = 256
    # readv takes as many buffers at once (IOV_MAX).
    WINDOW = 1024
    # Frames in a turn: neither direction keeps the I/O thread from the other.
    MAX_BATCH = QUEUE_SIZE

# A receive buffer of the guest's that waits for a frame.
cdef struct waiting:
    uint16_t head
    uint16_t buffers        # entries of `iov`
    uint64_t size

cdef class Receiver(VirtioDevice):
    cdef int tap_fd, wire_fd
    cdef bint wire_ready
    cdef readonly RateLimiter rx_limiter
    # The receive window: chains taken from the queue and not filled yet, in order, and their buffers.
    cdef waiting chains[QUEUE_SIZE]
    cdef iovec iov[WINDOW]
    cdef uint64_t gpa[WINDOW]
    cdef int chain_first, chain_count, iov_first, iov_count
    cdef uint64_t room              # bytes in the window
    cdef uint64_t least, largest, chain_least
    cdef bint merging
    cdef uint32_t budget            # chains that may be taken from the queue before others have a turn
    cdef uint64_t deferred          # bytes of the frame in the window that the limiter holds back, or 0
    cdef chain incoming
    cdef readonly uint64_t no_rx_buffer, rx_bytes, rx_frames, rx_fails, tap_read_fails, rx_throttled, wire_received

    cdef void forget(self) noexcept nogil
    cdef bint window_full(self) noexcept nogil
    cdef bint take_chain(self, Virtqueue queue) noexcept nogil
    cdef bint gather(self, Virtqueue queue) noexcept nogil
    cdef ssize_t fetch(self) noexcept nogil
    cdef void receive(self, Virtqueue queue) noexcept nogil
    cdef void finish(self, Virtqueue queue, uint64_t size) noexcept nogil
    cdef void show(self, Virtqueue queue, int index, bint last) noexcept nogil
