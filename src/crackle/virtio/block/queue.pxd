from libc.stdint cimport uint8_t, uint32_t, uint64_t

from crackle.includes.block cimport VIRTIO_BLK_ID_BYTES
from crackle.ratelimit.limiter cimport RateLimiter
from crackle.virtio.block.engine cimport Engine, operation, request
from crackle.virtio.device cimport VirtioDevice
from crackle.virtio.latency cimport latency
from crackle.virtio.queue cimport Virtqueue, chain

cdef enum:
    SECTOR = 512
    SECTOR_SHIFT = 9
    QUEUE_SIZE = 256
    # A request is a header, the data and a status byte: what remains of a chain for data (5.2.4, seg_max).
    SEG_MAX = QUEUE_SIZE - 2
    # A chain may name the same memory many times over: no request keeps the I/O thread for longer than this takes.
    MAX_TRANSFER = 1 << 30

cdef class BlockQueue(VirtioDevice):
    cdef int fd
    cdef uint64_t sectors
    cdef readonly bint read_only, writeback
    cdef uint8_t serial[VIRTIO_BLK_ID_BYTES]
    cdef chain chain
    cdef Engine engine
    cdef readonly RateLimiter limiter
    cdef uint64_t begun         # when this turn began, ns
    cdef uint32_t vain          # times in a row that nothing more came while it looked out
    cdef uint64_t clock         # when the thread last looked at it, ns
    cdef uint32_t taken         # chains taken in this turn,
    cdef uint32_t answered      # and answered
    cdef bint held              # there may be chains in the queue that no notification will tell of
    cdef readonly uint64_t read_bytes, write_bytes, read_count, write_count, flush_count
    cdef readonly uint64_t discard_count, write_zeroes_count
    cdef readonly uint64_t execute_fails, invalid_requests, empty_events, updates, update_fails
    cdef readonly uint64_t throttled_events, engine_throttled_events, remaining_requests
    cdef latency reads, writes

    cdef void engine_event(self) noexcept nogil
    cdef void serve(self, Virtqueue queue) noexcept nogil
    cdef bint look_out(self, Virtqueue queue, bint for_more) noexcept nogil
    cdef int take_all(self, Virtqueue queue) noexcept nogil
    cdef void reap(self, Virtqueue queue) noexcept nogil
    cdef void finish_all(self, Virtqueue queue) noexcept nogil
    cdef void parse(self, chain *c, request *r) noexcept nogil
    cdef void place(self, request *r, operation what, uint64_t sector, uint64_t length) noexcept nogil
    cdef void parse_write(self, chain *c, request *r, uint64_t sector) noexcept nogil
    cdef void parse_allocate(self, chain *c, request *r, bint zeroes) noexcept nogil
    cdef void finish(self, request *r, Virtqueue queue) noexcept nogil
