from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from crackle.runtime.iothread cimport IoThread
from crackle.includes.io cimport iovec
from crackle.ratelimit.limiter cimport RateLimiter
from crackle.virtio.latency cimport latency
from crackle.virtio.lookout cimport lookout
from crackle.virtio.device cimport VirtioDevice
from crackle.virtio.net.window cimport ReceiveWindow
from crackle.virtio.queue cimport CHAIN_IOV, Virtqueue, chain

cdef enum:
    RX = 0
    TX = 1
    # Of a frame: what is looked at to decide where it goes, an ARP request being the longest (RFC 826).
    HEAD = 12 + 14 + 28

cdef class Net(VirtioDevice):
    cdef int tap_fd, wire_fd
    cdef readonly bytes mac
    cdef readonly object mtu
    cdef readonly bint drop_spoofed
    cdef readonly RateLimiter rx_limiter, tx_limiter
    cdef ReceiveWindow window
    cdef uint64_t deferred          # bytes of the frame in the window that the limiter holds back, or 0
    cdef uint8_t own_mac[6]
    cdef uint8_t wire_ip[4]
    cdef bint has_mac, has_wire, wire_ready
    cdef uint64_t offloads          # the driver's features that the TAP was last told of
    cdef chain outgoing
    cdef uint8_t head[HEAD]
    cdef iovec gathered[CHAIN_IOV + 1]
    cdef latency writes
    cdef lookout looking
    cdef readonly uint64_t rx_queue_events, tx_queue_events, tap_events
    cdef readonly uint64_t no_rx_buffer, rx_bytes, rx_frames, tap_read_fails, rx_throttled, wire_received
    cdef readonly uint64_t no_tx_buffer
    cdef readonly uint64_t tx_bytes, tx_frames, tx_fails, tx_malformed, tx_spoofed, tx_remaining, tap_write_fails
    cdef readonly uint64_t tx_throttled, wire_sent, wire_dropped

    cdef watch_wire(self)
    cdef void close_own(self) noexcept
    cdef bint tell_tap(self) noexcept nogil
    cdef void arrived(self, bint on_wire) noexcept nogil
    cdef void show(self, Virtqueue queue, int index, bint last) noexcept nogil
    cdef void receive(self, Virtqueue queue) noexcept nogil
    cdef ssize_t fetch(self) noexcept nogil
    cdef void give(self, Virtqueue queue, uint64_t size) noexcept nogil
    cdef void transmit(self, Virtqueue queue) noexcept nogil
    cdef bint look_out(self, Virtqueue queue) noexcept nogil
    cdef bint send(self, chain *c, uint64_t *clock) noexcept nogil
    cdef bint for_wire(self, size_t size) noexcept nogil
