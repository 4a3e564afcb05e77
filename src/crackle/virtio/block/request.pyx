"""What virtio-block's chains ask for (virtio 1.2, section 5.2.6): checked, and made into requests for an engine."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from crackle.includes.block cimport *
from crackle.includes.io cimport iovec
from crackle.includes.virtio cimport *
from crackle.virtio.queue cimport chain, copy_buffers

cdef enum:
    HEADER = 16


cdef void parse(chain *c, request *r, disk *d) noexcept nogil:
    cdef virtio_blk_outhdr header
    cdef iovec *last
    r.what, r.error, r.invalid, r.answer, r.length, r.count = DO_NOTHING, 0, False, VIRTIO_BLK_S_OK, 0, 0
    r.head, r.status, r.counted, r.mode, r.fallback, r.zeroes, r.unfinished = c.head, NULL, NULL, 0, 0, False, False
    if copy_buffers(c.iov, c.readable, 0, &header, HEADER, False) != HEADER or c.writable == 0:
        # No header to obey, or no place for an answer.
        r.invalid = True
        return
    # The status is the last byte that the device writes, however the driver cut its buffers (2.7.4).
    last = &c.iov[c.readable + c.writable - 1]
    last.iov_len -= 1
    r.status = <uint8_t *> last.iov_base + last.iov_len
    if last.iov_len == 0:
        c.writable -= 1
    if header.type == VIRTIO_BLK_T_IN:
        r.iov, r.count, r.counted = &c.iov[c.readable], c.writable, &d.counts.reads
        place(r, d, DO_READ, header.sector, c.writable_bytes - 1)
    elif header.type == VIRTIO_BLK_T_OUT:
        parse_write(c, r, d, header.sector)
    elif header.type == VIRTIO_BLK_T_FLUSH:
        r.counted = &d.counts.flushes
        if d.writeback:
            r.what = DO_FLUSH
    elif header.type == VIRTIO_BLK_T_GET_ID:
        r.iov, r.count = &c.iov[c.readable], c.writable
        r.length = copy_buffers(r.iov, r.count, 0, d.serial, VIRTIO_BLK_ID_BYTES, True)
    elif header.type == VIRTIO_BLK_T_DISCARD and d.features >> VIRTIO_BLK_F_DISCARD & 1:
        parse_allocate(c, r, d, False)
    elif header.type == VIRTIO_BLK_T_WRITE_ZEROES and d.features >> VIRTIO_BLK_F_WRITE_ZEROES & 1:
        parse_allocate(c, r, d, True)
    else:
        r.answer = VIRTIO_BLK_S_UNSUPP


cdef uint64_t charge(request *r) noexcept nogil:
    return r.length if r.what == DO_READ or r.what == DO_WRITE or r.zeroes else 0


cdef void place(request *r, disk *d, operation what, uint64_t sector, uint64_t length) noexcept nogil:
    """Have `what` done to `length` bytes from `sector` on, if that is a part of the disk."""
    cdef uint64_t count = length >> SECTOR_SHIFT
    if length > MAX_TRANSFER or length & (SECTOR - 1) or sector > d.sectors or count > d.sectors - sector:
        r.answer = VIRTIO_BLK_S_IOERR
    elif length:
        r.what, r.offset, r.length, r.left = what, sector << SECTOR_SHIFT, length, length


cdef void parse_write(chain *c, request *r, disk *d, uint64_t sector) noexcept nogil:
    cdef uint64_t skip = HEADER
    cdef int first = 0
    if d.read_only:
        r.answer = VIRTIO_BLK_S_IOERR
        return
    while skip and skip >= c.iov[first].iov_len:
        skip -= c.iov[first].iov_len
        first += 1
    if skip:
        c.iov[first].iov_base = <uint8_t *> c.iov[first].iov_base + skip
        c.iov[first].iov_len -= skip
    r.iov, r.count, r.counted = &c.iov[first], c.readable - first, &d.counts.writes
    place(r, d, DO_WRITE, sector, c.readable_bytes - HEADER)


cdef void parse_allocate(chain *c, request *r, disk *d, bint zeroes) noexcept nogil:
    """DISCARD or WRITE_ZEROES of one range, as the configuration space says."""
    cdef virtio_blk_discard_write_zeroes given
    cdef int punch = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, zero = FALLOC_FL_KEEP_SIZE | FALLOC_FL_ZERO_RANGE
    if d.read_only or c.readable_bytes < HEADER + sizeof(given):
        r.answer = VIRTIO_BLK_S_IOERR
        return
    copy_buffers(c.iov, c.readable, HEADER, &given, sizeof(given), False)
    if c.readable_bytes > HEADER + sizeof(given) or given.flags & ~<uint32_t> (
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP if zeroes else 0
    ):
        r.answer = VIRTIO_BLK_S_UNSUPP
        return
    r.mode = r.fallback = punch
    if zeroes:
        # Kept as blocks of zeroes unless the driver allows otherwise, where there is such a thing.
        if given.flags:
            r.fallback = zero
        else:
            r.mode = zero
            r.zeroes = True
    r.counted = &d.counts.write_zeroes if zeroes else &d.counts.discards
    place(r, d, DO_ALLOCATE, given.sector, <uint64_t> given.num_sectors << SECTOR_SHIFT)
