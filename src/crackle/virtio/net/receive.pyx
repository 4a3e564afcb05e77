"""The receiving half of virtio-net (virtio 1.2, section 5.1.6.4): from the host's TAP, or the wire, into the guest's buffers.

It keeps a window of chains that were taken from the queue ahead, enough for the largest frame, because the length of a
frame is known only when it has been read. A frame that the limiter refuses stays in the guest's buffers, untold.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove

from crackle.includes.io cimport iovec, readv
from crackle.runtime.threads cimport now_ns
from crackle.virtio.device cimport TURN_NS, VirtioDevice
from crackle.virtio.queue cimport CHAIN_IOV, QUEUE_BROKEN, QUEUE_CHAIN, Virtqueue, chain, copy_buffers


cdef enum:
    NUM_BUFFERS = 10            # where the field is in the header
    # Used chains are shown to the driver in groups: a polling driver shares the cache line with this thread.
    RX_GROUP = 32
    MAX_CHAINS = 4 * QUEUE_SIZE
    # Chains taken ahead of a driver whose frames each have one.
    AHEAD = 64


cdef class Receiver(VirtioDevice):
    """What receives. `virtio.net` adds the rest, opens and closes the descriptors, and says what the driver accepted."""

    def __cinit__(self, *args, **kwargs):
        self.tap_fd = self.wire_fd = -1

    cdef void forget(self) noexcept nogil:
        self.chain_first, self.chain_count, self.iov_first, self.iov_count = 0, 0, 0, 0
        self.room, self.deferred = 0, 0

    cdef bint on_drain(self, uint64_t until) noexcept nogil:
        """Let go of the window: what was taken from the queue ahead is available again, as the saved state says."""
        if self.deferred:
            self.finish(<Virtqueue> self.table[RX], self.deferred)
            self.show(<Virtqueue> self.table[RX], RX, True)
        (<Virtqueue> self.table[RX]).put_back(<uint16_t> self.chain_count)
        self.forget()
        return True

    cdef bint window_full(self) noexcept nogil:
        return self.chain_count == QUEUE_SIZE or self.iov_count + CHAIN_IOV > WINDOW

    cdef bint take_chain(self, Virtqueue queue) noexcept nogil:
        """Move one chain from the queue into the window; False when there is none, or no room for its buffers."""
        cdef waiting *place
        cdef chain *c = &self.incoming
        cdef int found, end
        if self.window_full() or self.budget == 0:
            return False
        self.budget -= 1
        if self.chain_first + self.chain_count == QUEUE_SIZE:
            memmove(self.chains, &self.chains[self.chain_first], self.chain_count * sizeof(waiting))
            self.chain_first = 0
        if self.iov_first + self.iov_count + CHAIN_IOV > WINDOW:
            memmove(self.iov, &self.iov[self.iov_first], self.iov_count * sizeof(iovec))
            memmove(self.gpa, &self.gpa[self.iov_first], self.iov_count * sizeof(uint64_t))
            self.iov_first = 0
        end = self.iov_first + self.iov_count
        found = queue.pop(c)
        if found != QUEUE_CHAIN:
            if found == QUEUE_BROKEN:
                self.need_reset()
            return False
        place = &self.chains[self.chain_first + self.chain_count]
        place.head, place.buffers, place.size = c.head, <uint16_t> c.writable, c.writable_bytes
        if c.readable or c.writable_bytes < self.chain_least:
            # Given back without a byte, in its turn.
            self.rx_fails += 1
            place.buffers, place.size = 0, 0
            if self.chain_count == 0:
                queue.push(c.head, 0)
                return True
        memcpy(&self.iov[end], c.iov, place.buffers * sizeof(iovec))
        memcpy(&self.gpa[end], c.gpa, place.buffers * sizeof(uint64_t))
        self.chain_count += 1
        self.iov_count += place.buffers
        self.room += place.size
        return True

    cdef bint gather(self, Virtqueue queue) noexcept nogil:
        """Fill the window until the largest frame fits; False when the driver provides too little for any."""
        if not self.merging:
            # Several at a time: the driver writes to the lines that these are read from.
            if self.chain_count == 0:
                while self.chain_count < AHEAD and self.take_chain(queue):
                    pass
            return self.chain_count > 0 and self.running()
        while self.room < MAX_FRAME:
            if not self.take_chain(queue):
                return self.running() and self.room >= max(self.least, self.largest)
        return True

    cdef ssize_t fetch(self) noexcept nogil:
        """Read a frame into the window, from the wire if there is one; its length, or -1 when there is none."""
        cdef const iovec *iov = &self.iov[self.iov_first]
        cdef int count = self.iov_count if self.merging else self.chains[self.chain_first].buffers
        cdef ssize_t n
        if self.wire_ready:
            n = readv(self.wire_fd, iov, count)
            if n > 0:
                self.wire_received += 1
                return n
            self.wire_ready = False
        while True:
            n = readv(self.tap_fd, iov, count)
            if n > 0:
                return n
            if n == 0 or errno != EINTR:
                if n < 0 and errno != EAGAIN:
                    self.tap_read_fails += 1
                return -1

    cdef void receive(self, Virtqueue queue) noexcept nogil:
        cdef uint64_t begin, size
        cdef uint32_t frames = 0
        cdef ssize_t n
        if self.rx_limiter.blocked:
            self.rx_throttled += 1
            return
        begin = now_ns()
        self.budget = MAX_CHAINS
        while True:
            size = self.deferred
            if not size:
                if not self.gather(queue):
                    if self.running():
                        self.no_rx_buffer += 1
                        if self.budget == 0 or not (self.window_full() or queue.rearm()):
                            # More has come meanwhile; but others have their turn first.
                            self.notify_again(RX)
                    break
                n = self.fetch()
                if n < 0:
                    break
                size = n
            if size < HEADER or (self.merging and size == self.room and size < MAX_FRAME):
                # Nothing but a header, or a frame that was cut because it is larger than any before it.
                self.rx_fails += 1
                size += 1
            elif self.rx_limiter.consume(size, 1):
                self.finish(queue, size)
            else:
                self.deferred = size
                break
            self.largest = max(self.largest, min(size, <uint64_t> MAX_FRAME))
            frames += 1
            if <uint16_t> (queue.next_used - queue.published) >= RX_GROUP:
                self.show(queue, RX, False)
            if frames == MAX_BATCH or (frames & 15 == 0 and now_ns() - begin >= TURN_NS):
                self.notify_again(RX)
                break
        self.show(queue, RX, True)

    cdef void finish(self, Virtqueue queue, uint64_t size) noexcept nogil:
        """The window begins with a frame of `size` bytes: give its chains to the driver."""
        cdef waiting *place = &self.chains[self.chain_first]
        cdef iovec *iov = &self.iov[self.iov_first]
        cdef uint64_t left = size, part
        cdef uint16_t count = 0
        cdef int i, buffers = 0
        while left:
            part = min(left, place[count].size)
            queue.push(place[count].head, <uint32_t> part)
            left -= part
            buffers += place[count].buffers
            self.room -= place[count].size
            count += 1
        # The TAP leaves this field to the device.
        if iov.iov_len >= HEADER:
            memcpy(<uint8_t *> iov.iov_base + NUM_BUFFERS, &count, sizeof(count))
        else:
            copy_buffers(iov, place.buffers, NUM_BUFFERS, &count, sizeof(count), True)
        if self.memory.tracking:
            left = size
            for i in range(buffers):
                part = min(left, iov[i].iov_len)
                self.memory.mark_dirty(self.gpa[self.iov_first + i], part)
                left -= part
        self.chain_first += count
        self.chain_count -= count
        self.iov_first += buffers
        self.iov_count -= buffers
        while self.chain_count and self.chains[self.chain_first].size == 0:
            # Not fit to receive into: it is its turn to be given back.
            queue.push(self.chains[self.chain_first].head, 0)
            self.chain_first += 1
            self.chain_count -= 1
        self.deferred = 0
        self.rx_frames += 1
        self.rx_bytes += size

    cdef void show(self, Virtqueue queue, int index, bint last) noexcept nogil:
        """Let the driver see what was used, and tell it if it wants to know; `last`: before others have their turn."""
        if queue.show(last):
            self.signal_queue(index)
