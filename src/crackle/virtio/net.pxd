from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from crackle.devices.iothread cimport IoThread
from crackle.ratelimit.limiter cimport RateLimiter
from crackle.virtio.device cimport VirtioDevice
from crackle.virtio.queue cimport Virtqueue, chain, iovec

cdef enum:
    QUEUE_SIZE = 256
    # readv takes as many buffers at once (IOV_MAX).
    WINDOW = 1024
    # Of a frame: what is looked at to decide where it goes, an ARP request being the longest (RFC 826).
    HEAD = 12 + 14 + 28

# A receive buffer of the guest's that waits for a frame.
cdef struct waiting:
    uint16_t head
    uint16_t buffers        # entries of `iov`
    uint64_t size

cdef struct write_times:
    uint64_t min_us
    uint64_t max_us
    uint64_t sum_us

cdef class Net(VirtioDevice):
    cdef int tap_fd, wire_fd
    cdef readonly bytes mac
    cdef readonly object mtu
    cdef readonly bint drop_spoofed
    cdef readonly RateLimiter rx_limiter, tx_limiter
    cdef uint8_t own_mac[6]
    cdef uint8_t wire_ip[4]
    cdef IoThread io
    cdef bint has_mac, has_wire, wire_ready
    cdef uint64_t offloads          # the driver's features that the TAP was last told of
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
    cdef uint32_t unpublished       # used chains that the driver cannot see yet
    cdef chain incoming, outgoing
    cdef uint8_t head[HEAD]
    cdef iovec gathered[QUEUE_SIZE + 1]
    cdef write_times writes
    cdef uint64_t patience_ns, gave_up
    cdef readonly uint64_t rx_queue_events, tx_queue_events, tap_events
    cdef readonly uint64_t no_rx_buffer, no_tx_buffer, rx_bytes, rx_frames, rx_fails, tap_read_fails, rx_throttled
    cdef readonly uint64_t tx_bytes, tx_frames, tx_fails, tx_malformed, tx_spoofed, tx_remaining, tap_write_fails
    cdef readonly uint64_t tx_throttled, wire_sent, wire_dropped, wire_received

    cdef watch_wire(self)
    cdef void close_own(self) noexcept
    cdef bint tell_tap(self) noexcept nogil
    cdef void arrived(self, bint on_wire) noexcept nogil
    cdef void forget(self) noexcept nogil
    cdef bint gather(self, Virtqueue queue) noexcept nogil
    cdef bint window_full(self) noexcept nogil
    cdef bint take_chain(self, Virtqueue queue) noexcept nogil
    cdef void finish(self, Virtqueue queue, uint64_t size) noexcept nogil
    cdef void tell_driver(self, Virtqueue queue) noexcept nogil
    cdef ssize_t fetch(self) noexcept nogil
    cdef void receive(self, Virtqueue queue) noexcept nogil
    cdef void transmit(self, Virtqueue queue) noexcept nogil
    cdef bint look_out(self, Virtqueue queue) noexcept nogil
    cdef bint send(self, chain *c, uint64_t *clock) noexcept nogil
    cdef bint for_wire(self, size_t size) noexcept nogil
