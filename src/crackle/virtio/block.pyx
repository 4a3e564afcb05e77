"""virtio-block (virtio 1.2, section 5.2): a disk backed by a file or a block device.

One queue. Requests are served on the I/O thread, one after the other, by `preadv` and `pwritev` straight between the file
and guest memory. Owns the descriptor of the backing file.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport close

from crackle.includes.threads cimport *
from crackle.includes.virtio cimport *
from crackle.memory.guest cimport GuestMemory
from crackle.virtio.device cimport VirtioDevice
from crackle.virtio.queue cimport QUEUE_BROKEN, QUEUE_EMPTY, Virtqueue, chain, copy_buffers, iovec

import os
import stat

from crackle.errors import ConfigError


cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int fd, const iovec *iov, int count, long offset)
    ssize_t pwritev(int fd, const iovec *iov, int count, long offset)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t size, long offset)
    ssize_t pwrite(int fd, const void *buffer, size_t size, long offset)
    int fdatasync(int fd)

cdef enum:
    SECTOR = 512
    SECTOR_SHIFT = 9
    QUEUE_SIZE = 256
    # A request is a header, the data and a status byte: what remains of a chain for data (5.2.4, seg_max).
    SEG_MAX = QUEUE_SIZE - 2
    HEADER = 16
    # A chain may name the same memory many times over: no request keeps the I/O thread for longer than this takes.
    MAX_TRANSFER = 1 << 30
    # A driver that never stops submitting must not keep the I/O thread from other devices, and from who wants to stop it.
    MAX_BATCH = 4 * QUEUE_SIZE
    MAX_BATCH_NS = 20_000_000


# Nanoseconds to look out for the next request before asking for a notification. On a single CPU the driver could not
# make one meanwhile.
cdef uint64_t spin_ns = 10_000 if len(os.sched_getaffinity(0)) > 1 else 0


cdef struct latency:
    uint64_t min_us
    uint64_t max_us
    uint64_t sum_us


cdef void note_latency(latency *l, uint64_t us) noexcept nogil:
    if us < l.min_us or l.sum_us == 0:
        l.min_us = us
    l.max_us = max(l.max_us, us)
    l.sum_us += us


cdef open_backing(str path, bint read_only):
    """(descriptor, size in bytes) of a regular file or block device; ConfigError otherwise."""
    try:
        # Without waiting, or a named pipe would be waited for; for files that are drives it means nothing.
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot open the drive's file {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"cannot open the drive's file {path!r}: {error}") from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ConfigError(f"cannot use {path} as a drive: it is neither a regular file nor a block device")
        return fd, os.lseek(fd, 0, os.SEEK_END)
    except BaseException:
        os.close(fd)
        raise


cdef class Block(VirtioDevice):
    """A disk.

    path: backing file or block device; its size in whole 512-byte sectors is the disk's, a remainder is out of reach.
    read_only: the guest cannot write, and the file is opened for reading only.
    writeback: offer FLUSH and honour it with fdatasync; without it the guest is told that writes are stable when they
    are answered, and they are only as stable as the host's page cache (Firecracker's "Unsafe").
    Raises ConfigError when the file cannot be used.
    """

    cdef int fd
    cdef uint64_t sectors
    cdef readonly bint read_only, writeback
    cdef readonly str path
    cdef uint8_t serial[VIRTIO_BLK_ID_BYTES]
    cdef chain request
    cdef readonly uint64_t read_bytes, write_bytes, read_count, write_count, flush_count
    cdef readonly uint64_t execute_fails, invalid_requests, empty_events, updates, update_fails
    cdef latency reads, writes

    def __cinit__(self, *args, **kwargs):
        self.fd = -1

    def __init__(self, GuestMemory memory, str path, *, bint read_only=False, bint writeback=False):
        cdef uint64_t features = <uint64_t> 1 << VIRTIO_BLK_F_SEG_MAX
        self.read_only, self.writeback = read_only, writeback
        if read_only:
            features |= <uint64_t> 1 << VIRTIO_BLK_F_RO
        if writeback:
            features |= <uint64_t> 1 << VIRTIO_BLK_F_FLUSH
        self.set_up(VIRTIO_ID_BLOCK, features, (QUEUE_SIZE,))
        self.config_size = sizeof(virtio_blk_config)
        self.use(path)

    def __dealloc__(self):
        if self.made and self.fd >= 0:
            close(self.fd)

    def close(self):
        """Give the descriptors back; the I/O thread is stopped. Idempotent."""
        VirtioDevice.close(self)
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    cdef use(self, str path):
        """Put `path` behind the disk; once the disk is the guest's, tell it."""
        cdef int fd, old = self.fd
        cdef virtio_blk_config config
        cdef char identity[VIRTIO_BLK_ID_BYTES]
        fd, size = open_backing(path, self.read_only)
        # GET_ID: like a disk's serial number, it tells one backing file from another (5.2.6).
        status = os.fstat(fd)
        serial = f"{status.st_dev}{status.st_rdev}{status.st_ino}".encode()[:VIRTIO_BLK_ID_BYTES]
        memset(identity, 0, VIRTIO_BLK_ID_BYTES)
        memcpy(identity, <const char *> serial, len(serial))
        memset(&config, 0, sizeof(config))
        config.capacity = size >> SECTOR_SHIFT
        config.seg_max = SEG_MAX
        with nogil:
            pthread_mutex_lock(&self.lock)
            memcpy(self.serial, identity, VIRTIO_BLK_ID_BYTES)
            memcpy(self.config, &config, sizeof(config))
            self.sectors, self.fd = config.capacity, fd
            if old >= 0:
                self.config_changed()
            pthread_mutex_unlock(&self.lock)
        self.path = path
        if old >= 0:
            close(old)

    def update(self, str path):
        """Put another file behind the disk while the guest runs, and tell the guest. ConfigError leaves the old one."""
        try:
            self.use(path)
        except ConfigError:
            self.update_fails += 1
            raise
        self.updates += 1

    def counters(self):
        """Firecracker's `block` metrics; read_agg and write_agg are microseconds that requests took."""
        return {
            "activate_fails": self.activate_fails,
            "cfg_fails": self.cfg_fails,
            "no_avail_buffer": self.empty_events,
            "event_fails": self.broken_queues,
            "execute_fails": self.execute_fails,
            "invalid_reqs_count": self.invalid_requests,
            "flush_count": self.flush_count,
            "queue_event_count": self.queue_events,
            "update_count": self.updates,
            "update_fails": self.update_fails,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "read_count": self.read_count,
            "write_count": self.write_count,
            "read_agg": self.reads,
            "write_agg": self.writes,
        }

    @property
    def size(self):
        """Bytes that the guest sees."""
        return self.sectors << SECTOR_SHIFT

    # -- on the I/O thread, with the lock held -------------------------------------------------------------------

    cdef void handle_queue(self, int index, Virtqueue queue) noexcept nogil:
        cdef uint64_t begin = now_ns(), before = begin, until
        cdef uint32_t served = 0, told = 0
        cdef int found
        if not queue.ready:
            return
        while True:
            found = queue.pop(&self.request)
            if found == QUEUE_EMPTY:
                if served > told:
                    told = served
                    if queue.wants_interrupt():
                        self.interrupt(VIRTIO_MMIO_INT_VRING)
                    # A driver that waits for its answer asks again at once: look out for it for as long as a notification
                    # would cost it. Until rearm() it need not send one.
                    until = now_ns() + spin_ns
                    while now_ns() < until:
                        if queue.has_more():
                            break
                    else:
                        if queue.rearm():
                            break
                elif queue.rearm():
                    break
                continue
            if found == QUEUE_BROKEN:
                self.need_reset()
                break
            queue.push(self.request.head, self.serve(&self.request, &before))
            queue.publish()
            served += 1
            if served == MAX_BATCH or before - begin >= MAX_BATCH_NS:
                self.notify_again(index)
                break
        if served == 0:
            self.empty_events += 1
        elif served > told and queue.wants_interrupt():
            self.interrupt(VIRTIO_MMIO_INT_VRING)

    cdef uint32_t serve(self, chain *c, uint64_t *clock) noexcept nogil:
        """Do one request (5.2.6); returns the number of bytes written to the guest's buffers."""
        cdef virtio_blk_outhdr header
        cdef iovec *last
        cdef uint8_t *status
        cdef uint8_t result = VIRTIO_BLK_S_UNSUPP
        cdef uint64_t length = 0
        if copy_buffers(c.iov, c.readable, 0, &header, HEADER, False) != HEADER or c.writable == 0:
            # No header to obey, or no place for an answer.
            self.invalid_requests += 1
            return 0
        # The status is the last byte that the device writes, however the driver cut its buffers (2.7.4).
        last = &c.iov[c.readable + c.writable - 1]
        last.iov_len -= 1
        status = <uint8_t *> last.iov_base + last.iov_len
        if header.type == VIRTIO_BLK_T_IN:
            length = c.writable_bytes - 1
            result = self.transfer(&c.iov[c.readable], c.writable, length, header.sector, False, clock)
            if result != VIRTIO_BLK_S_OK:
                length = 0
        elif header.type == VIRTIO_BLK_T_OUT:
            result = self.write_out(c, header.sector, clock)
        elif header.type == VIRTIO_BLK_T_FLUSH:
            self.flush_count += 1
            result = VIRTIO_BLK_S_OK
            if self.writeback:
                if fdatasync(self.fd) < 0:
                    result = VIRTIO_BLK_S_IOERR
                clock[0] = now_ns()
        elif header.type == VIRTIO_BLK_T_GET_ID:
            length = copy_buffers(&c.iov[c.readable], c.writable, 0, self.serial, VIRTIO_BLK_ID_BYTES, True)
            result = VIRTIO_BLK_S_OK
        else:
            self.invalid_requests += 1
        if result == VIRTIO_BLK_S_IOERR:
            self.execute_fails += 1
        status[0] = result
        self.note_written(c)
        return <uint32_t> length + 1

    cdef uint8_t write_out(self, chain *c, uint64_t sector, uint64_t *clock) noexcept nogil:
        cdef uint64_t skip = HEADER
        cdef int first = 0
        if self.read_only:
            return VIRTIO_BLK_S_IOERR
        while skip and skip >= c.iov[first].iov_len:
            skip -= c.iov[first].iov_len
            first += 1
        if skip:
            c.iov[first].iov_base = <uint8_t *> c.iov[first].iov_base + skip
            c.iov[first].iov_len -= skip
        return self.transfer(&c.iov[first], c.readable - first, c.readable_bytes - HEADER, sector, True, clock)

    cdef uint8_t transfer(
        self, iovec *iov, int count, uint64_t length, uint64_t sector, bint writing, uint64_t *clock
    ) noexcept nogil:
        cdef uint64_t sectors = length >> SECTOR_SHIFT, offset = sector << SECTOR_SHIFT, left = length, start = clock[0]
        cdef ssize_t n
        if length > MAX_TRANSFER or length & (SECTOR - 1) or sector > self.sectors or sectors > self.sectors - sector:
            return VIRTIO_BLK_S_IOERR
        while left:
            if count == 1:
                if writing:
                    n = pwrite(self.fd, iov.iov_base, iov.iov_len, <long> offset)
                else:
                    n = pread(self.fd, iov.iov_base, iov.iov_len, <long> offset)
            elif writing:
                n = pwritev(self.fd, iov, count, <long> offset)
            else:
                n = preadv(self.fd, iov, count, <long> offset)
            if n < 0 and errno == EINTR:
                continue
            if n <= 0:
                return VIRTIO_BLK_S_IOERR
            left -= n
            offset += n
            while count and n and <uint64_t> n >= iov.iov_len:
                n -= iov.iov_len
                iov += 1
                count -= 1
            if n:
                iov.iov_base = <uint8_t *> iov.iov_base + n
                iov.iov_len -= n
        clock[0] = now_ns()
        if writing:
            self.write_count += 1
            self.write_bytes += length
            note_latency(&self.writes, (clock[0] - start) // 1000)
        else:
            self.read_count += 1
            self.read_bytes += length
            note_latency(&self.reads, (clock[0] - start) // 1000)
        return VIRTIO_BLK_S_OK

    cdef void note_written(self, chain *c) noexcept nogil:
        cdef int i
        cdef uint8_t *begin
        if self.memory.tracking:
            for i in range(c.readable, c.readable + c.writable):
                # A transfer in parts has moved the start of a buffer, never its end; the status byte is one beyond it.
                begin = self.memory.span(c.gpa[i], 1)
                self.memory.mark_dirty(c.gpa[i], <uint8_t *> c.iov[i].iov_base + c.iov[i].iov_len + 1 - begin)
