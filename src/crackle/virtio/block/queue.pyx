"""What the I/O thread does with virtio-block's queue (virtio 1.2, section 5.2.6): takes chains, checks them, has them done,
answers them. `block` is the rest of the device.
"""

from libc.errno cimport EOPNOTSUPP
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from crackle.includes.block cimport *
from crackle.includes.io cimport iovec
from crackle.runtime.threads cimport *
from crackle.includes.virtio cimport *
from crackle.virtio.block.engine cimport DO_ALLOCATE, DO_FLUSH, DO_NOTHING, DO_READ, DO_WRITE, operation, request
from crackle.virtio.device cimport TURN_NS, VirtioDevice
from crackle.virtio.latency cimport note_latency
from crackle.virtio.queue cimport QUEUE_BROKEN, QUEUE_CHAIN, QUEUE_EMPTY, Virtqueue, chain, copy_buffers

import os

cdef enum:
    HEADER = 16
    MAX_BATCH = 4 * QUEUE_SIZE
    IN_VAIN = 4
    TRY_AGAIN = 16

# What `take_all` left off for, beside what `pop` says.
cdef enum:
    QUEUE_HELD = 2      # the limiter or the engine takes no more: one of them says when it does
    QUEUE_TIRED = 3     # enough for one turn

# Nanoseconds to look out for the next request before asking for a notification, about what that and the sleep would cost. On
# a single CPU the driver could not make one meanwhile.
cdef uint64_t spin_ns = 10_000 if len(os.sched_getaffinity(0)) > 1 else 0


cdef class BlockQueue(VirtioDevice):
    """Everything here runs on the I/O thread or while it rests, with the device's lock held."""

    cdef void handle_queue(self, int index, Virtqueue queue) noexcept nogil:
        if self.limiter.blocked:
            self.throttled_events += 1
        self.serve(queue)
        if self.answered == 0 and self.taken == 0:
            self.empty_events += 1

    cdef void engine_event(self) noexcept nogil:
        """Something in flight is done."""
        pthread_mutex_lock(&self.lock)
        if self.running():
            self.serve(<Virtqueue> self.table[0])
        pthread_mutex_unlock(&self.lock)

    cdef void serve(self, Virtqueue queue) noexcept nogil:
        """One turn: take what is in the queue, answer what is done, until neither gives more."""
        cdef uint32_t told = 0
        cdef int found
        self.begun = self.clock = now_ns()
        self.taken = self.answered = 0
        self.held = False
        if not queue.ready:
            return
        self.engine.announce(False)
        while True:
            self.reap(queue)
            found = self.take_all(queue)
            if self.engine.kick():
                self.reap(queue)
            if found == QUEUE_BROKEN:
                self.need_reset()
                break
            if found == QUEUE_TIRED or self.clock - self.begun >= TURN_NS:
                self.notify_again(0)
                break
            if found == QUEUE_HELD and not self.limiter.blocked and self.engine.take() != NULL:
                continue
            if self.answered != told:
                told = self.answered
                if queue.wants_interrupt():
                    self.signal_queue(0)
                if self.look_out(queue, found == QUEUE_EMPTY):
                    continue
            self.held = found == QUEUE_HELD
            if (self.held or queue.rearm()) and not self.engine.announce(True):
                return
            self.clock = now_ns()
        self.engine.announce(True)
        if self.answered != told and queue.wants_interrupt():
            self.signal_queue(0)

    cdef bint look_out(self, Virtqueue queue, bint for_more) noexcept nogil:
        """A driver that waits for its answer asks again at once: look out for it, and for what is in flight. Until rearm()
        it need not send a notification. Where that has been in vain, it is tried now and then only.
        """
        cdef uint64_t now = now_ns(), until = now + spin_ns
        if self.vain >= IN_VAIN and self.vain % TRY_AGAIN:
            self.vain += 1
            return False
        while True:
            if (for_more and queue.has_more()) or self.engine.ready():
                self.vain = 0
                return True
            if now >= until:
                break
            if self.engine.writing:
                # By a thread of the kernel, as most file systems have it, which each completion would take the CPU
                # from if this one slept: let it do several.
                sched_yield()
            now = now_ns()
        # Far beyond: others want this CPU, and who sleeps gets it sooner.
        self.vain = IN_VAIN + 1 if now - until > spin_ns else self.vain + 1
        return False

    cdef int take_all(self, Virtqueue queue) noexcept nogil:
        """Submit what is in the queue; what pop() found at last, QUEUE_HELD or QUEUE_TIRED."""
        cdef request *r
        cdef int found
        while self.taken < MAX_BATCH:
            if self.limiter.blocked:
                return QUEUE_HELD
            r = self.engine.take()
            if r == NULL:
                self.engine_throttled_events += 1
                return QUEUE_HELD
            found = queue.pop(&self.chain)
            if found != QUEUE_CHAIN:
                return found
            self.parse(&self.chain, r)
            if not r.invalid and not self.limiter.consume(
                r.length if r.what == DO_READ or r.what == DO_WRITE else 0, 1
            ):
                queue.put_back(1)
                self.throttled_events += 1
                return QUEUE_HELD
            self.taken += 1
            self.remaining_requests += <uint16_t> (queue.cached_avail - queue.next_avail)
            r.started = self.clock
            if r.what == DO_NOTHING or self.engine.submit(r):
                self.clock = now_ns()
                self.finish(r, queue)
                queue.publish()
                if self.clock - self.begun >= TURN_NS:
                    break
        return QUEUE_TIRED

    cdef void reap(self, Virtqueue queue) noexcept nogil:
        """Answer what is done of what was in flight."""
        cdef request *r = self.engine.completed()
        if r == NULL:
            return
        self.clock = now_ns()
        while r != NULL:
            self.finish(r, queue)
            self.engine.release(r)
            r = self.engine.completed()
        queue.publish()

    cdef void on_drain(self) noexcept nogil:
        self.finish_all(<Virtqueue> self.table[0])

    cdef void finish_all(self, Virtqueue queue) noexcept nogil:
        """Wait for what is in flight."""
        cdef uint32_t before = self.answered
        cdef bint live = self.running() and queue.ready
        cdef request *r
        while self.engine.wait():
            if live:
                self.reap(queue)
                continue
            # The rings are no longer ours.
            r = self.engine.completed()
            while r != NULL:
                self.engine.release(r)
                r = self.engine.completed()
        if live and self.answered != before and queue.wants_interrupt():
            self.signal_queue(0)
        if live and self.held and not self.limiter.blocked:
            # The engine takes more now, and has nothing left to announce.
            self.notify_again(0)

    cdef void on_reset(self) noexcept nogil:
        # Guest memory is the driver's again when the reset is done (2.4.1).
        self.status = 0
        self.finish_all(<Virtqueue> self.table[0])
        self.held = False

    # -- requests (5.2.6) ----------------------------------------------------------------------------------------

    cdef void parse(self, chain *c, request *r) noexcept nogil:
        """What the chain asks for, as a request; DO_NOTHING with the answer when that can be told without the file."""
        cdef virtio_blk_outhdr header
        cdef iovec *last
        cdef int i
        r.what, r.error, r.invalid, r.answer, r.length, r.count = DO_NOTHING, 0, False, VIRTIO_BLK_S_OK, 0, 0
        r.head, r.status, r.counted, r.mode, r.fallback = c.head, NULL, NULL, 0, 0
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
            r.iov, r.count, r.counted = &c.iov[c.readable], c.writable, &self.read_count
            self.place(r, DO_READ, header.sector, c.writable_bytes - 1)
        elif header.type == VIRTIO_BLK_T_OUT:
            self.parse_write(c, r, header.sector)
        elif header.type == VIRTIO_BLK_T_FLUSH:
            r.counted = &self.flush_count
            if self.writeback:
                r.what = DO_FLUSH
        elif header.type == VIRTIO_BLK_T_GET_ID:
            r.length = copy_buffers(&c.iov[c.readable], c.writable, 0, self.serial, VIRTIO_BLK_ID_BYTES, True)
            for i in range(c.readable, c.readable + c.writable):
                self.engine.mark_written(c.iov[i].iov_base, c.iov[i].iov_len)
        elif header.type == VIRTIO_BLK_T_DISCARD and self.driver_features >> VIRTIO_BLK_F_DISCARD & 1:
            self.parse_allocate(c, r, False)
        elif header.type == VIRTIO_BLK_T_WRITE_ZEROES and self.driver_features >> VIRTIO_BLK_F_WRITE_ZEROES & 1:
            self.parse_allocate(c, r, True)
        else:
            r.answer = VIRTIO_BLK_S_UNSUPP

    cdef void place(self, request *r, operation what, uint64_t sector, uint64_t length) noexcept nogil:
        """Have `what` done to `length` bytes from `sector` on, if that is a part of the disk."""
        cdef uint64_t count = length >> SECTOR_SHIFT
        if length > MAX_TRANSFER or length & (SECTOR - 1) or sector > self.sectors or count > self.sectors - sector:
            r.answer = VIRTIO_BLK_S_IOERR
        elif length:
            r.what, r.offset, r.length, r.left = what, sector << SECTOR_SHIFT, length, length

    cdef void parse_write(self, chain *c, request *r, uint64_t sector) noexcept nogil:
        cdef uint64_t skip = HEADER
        cdef int first = 0
        if self.read_only:
            r.answer = VIRTIO_BLK_S_IOERR
            return
        while skip and skip >= c.iov[first].iov_len:
            skip -= c.iov[first].iov_len
            first += 1
        if skip:
            c.iov[first].iov_base = <uint8_t *> c.iov[first].iov_base + skip
            c.iov[first].iov_len -= skip
        r.iov, r.count, r.counted = &c.iov[first], c.readable - first, &self.write_count
        self.place(r, DO_WRITE, sector, c.readable_bytes - HEADER)

    cdef void parse_allocate(self, chain *c, request *r, bint zeroes) noexcept nogil:
        """DISCARD or WRITE_ZEROES of one range, as the configuration space says."""
        cdef virtio_blk_discard_write_zeroes given
        cdef int punch = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, zero = FALLOC_FL_KEEP_SIZE | FALLOC_FL_ZERO_RANGE
        if self.read_only or c.readable_bytes < HEADER + sizeof(given):
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
        r.counted = &self.write_zeroes_count if zeroes else &self.discard_count
        self.place(r, DO_ALLOCATE, given.sector, <uint64_t> given.num_sectors << SECTOR_SHIFT)

    cdef void finish(self, request *r, Virtqueue queue) noexcept nogil:
        """Answer a request; `publish` shows it to the driver."""
        cdef uint32_t written = 0
        cdef uint64_t us = (self.clock - r.started) // 1000
        if r.error:
            r.answer = VIRTIO_BLK_S_IOERR
            if r.error == EOPNOTSUPP and r.what == DO_ALLOCATE:
                r.answer = VIRTIO_BLK_S_UNSUPP
        self.execute_fails += r.answer == VIRTIO_BLK_S_IOERR
        self.invalid_requests += r.invalid or r.answer == VIRTIO_BLK_S_UNSUPP
        if r.status != NULL:
            written = 1
            if r.answer == VIRTIO_BLK_S_OK:
                if r.counted != NULL:
                    r.counted[0] += 1
                if r.what == DO_READ:
                    self.read_bytes += r.length
                    note_latency(&self.reads, us)
                elif r.what == DO_WRITE:
                    self.write_bytes += r.length
                    note_latency(&self.writes, us)
                if r.what == DO_READ or r.what == DO_NOTHING:
                    written += <uint32_t> r.length
            r.status[0] = r.answer
            self.engine.mark_written(r.status, 1)
        queue.push(r.head, written)
        self.answered += 1
