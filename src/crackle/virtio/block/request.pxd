from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from crackle.includes.block cimport VIRTIO_BLK_ID_BYTES
from crackle.includes.io cimport iovec
from crackle.virtio.queue cimport chain

cdef enum:
    SECTOR = 512
    SECTOR_SHIFT = 9
    QUEUE_SIZE = 256
    # A request is a header, the data and a status byte: what remains of a chain for data (5.2.4, seg_max).
    SEG_MAX = QUEUE_SIZE - 2
    # A chain may name the same memory many times over.
    MAX_TRANSFER = 1 << 30

cdef enum operation:
    DO_NOTHING          # the request has its answer already
    DO_READ
    DO_WRITE
    DO_FLUSH
    DO_ALLOCATE         # fallocate(2): discard, write zeroes

# What a guest asked for, checked: no address or number in it is the guest's to change any more.
cdef struct request:
    operation what
    uint16_t head           # of its chain
    uint8_t answer          # VIRTIO_BLK_S_*, while `error` is 0
    bint invalid            # no request of this device's
    bint zeroes             # blocks that are to be kept, which costs what writing them does
    bint unfinished         # given back by an engine as it was, to be begun anew
    int error               # errno of what failed
    int mode                # of fallocate
    int fallback            # the mode to try where that one is not supported
    uint64_t *counted       # counter of such requests, NULL for none
    uint8_t *status         # the guest's byte for the answer, NULL where it gave none
    uint64_t length         # bytes to move; bytes written to the guest's buffers for DO_NOTHING
    uint64_t left           # of them
    uint64_t offset         # on the disk, of what is left
    uint64_t piece          # bytes of it that one system call is to move,
    int piece_count         # in so many buffers,
    uint64_t cut            # and what was cut off the last of those
    int file                # which of the disk's files it is for, 0 where there is one,
    uint64_t at             # and where in that
    uint64_t claim          # bytes of new blocks of an overlay that it takes
    bint twice              # a flush that is at its second fdatasync
    bint waiting            # for what is in flight
    uint64_t started        # ns
    uint64_t number         # of writes submitted before it
    uint32_t waits_for      # writes that a flush is held back for
    int count               # buffers left ...
    iovec *iov              # ... and where they are
    iovec one

cdef struct request_counts:
    uint64_t reads, writes, flushes, discards, write_zeroes

# What a request is checked against.
cdef struct disk:
    uint64_t sectors
    uint64_t features       # the driver's
    bint read_only, writeback
    uint8_t serial[VIRTIO_BLK_ID_BYTES]
    request_counts counts

# What the chain asks for; DO_NOTHING with the answer when that can be told without the file. GET_ID is answered here.
cdef void parse(chain *c, request *r, disk *d) noexcept nogil
# What a limiter is to be asked for: bytes.
cdef uint64_t charge(request *r) noexcept nogil
