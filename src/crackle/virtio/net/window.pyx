"""Where the frames for a guest go (virtio 1.2, section 5.1.6.4): receive buffers that were taken from the queue ahead.

The length of a frame is known only when it has been read, so there is a window of chains, enough for the largest frame.
One read fills as many as the frame needs; the others stay for the next.
"""

from libc.stdint cimport uint8_t, uint16_t, uint64_t
from libc.string cimport memcpy, memmove

from crackle.includes.io cimport iovec
from crackle.memory.guest cimport GuestMemory
from crackle.virtio.queue cimport CHAIN_IOV, QUEUE_BROKEN, QUEUE_CHAIN, QUEUE_EMPTY, Virtqueue, copy_buffers


cdef enum:
    NUM_BUFFERS = 10            # where the field is in the header
    MAX_CHAINS = 4 * QUEUE_SIZE
    # Chains taken ahead of a driver whose frames each have one.
    AHEAD = 64


cdef class ReceiveWindow:
    """The window of one receive queue, in `memory`."""

    def __cinit__(self, GuestMemory memory not None):
        self.memory = memory

    cdef void negotiated(self, bint merging, uint64_t least) noexcept nogil:
        """merging: a frame may fill several chains (VIRTIO_NET_F_MRG_RXBUF). least: bytes provided for one, at least."""
        self.merging, self.least, self.largest = merging, least, 0
        self.chain_least = HEADER if merging else least

    cdef void begin_turn(self) noexcept nogil:
        self.budget = MAX_CHAINS

    cdef void forget(self) noexcept nogil:
        self.chain_first, self.chain_count, self.iov_first, self.iov_count = 0, 0, 0, 0
        self.room = 0

    cdef void put_back(self, Virtqueue queue) noexcept nogil:
        """What was taken from the queue ahead is available again, as the saved state says."""
        queue.put_back(<uint16_t> self.chain_count)
        self.forget()

    cdef bint full(self) noexcept nogil:
        return self.chain_count == QUEUE_SIZE or self.iov_count + CHAIN_IOV > WINDOW

    cdef int take_chain(self, Virtqueue queue) noexcept nogil:
        """Move one chain from the queue into the window; as Virtqueue.pop(), and QUEUE_EMPTY without room for its buffers."""
        cdef waiting *place
        cdef chain *c = &self.incoming
        cdef int found, end
        if self.full() or self.budget == 0:
            return QUEUE_EMPTY
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
            return found
        place = &self.chains[self.chain_first + self.chain_count]
        place.head, place.buffers, place.size = c.head, <uint16_t> c.writable, c.writable_bytes
        if c.readable or c.writable_bytes < self.chain_least:
            # Given back without a byte, in its turn.
            self.unfit += 1
            place.buffers, place.size = 0, 0
            if self.chain_count == 0:
                queue.push(c.head, 0)
                return QUEUE_CHAIN
        memcpy(&self.iov[end], c.iov, place.buffers * sizeof(iovec))
        memcpy(&self.gpa[end], c.gpa, place.buffers * sizeof(uint64_t))
        self.chain_count += 1
        self.iov_count += place.buffers
        self.room += place.size
        return QUEUE_CHAIN

    cdef int gather(self, Virtqueue queue) noexcept nogil:
        """QUEUE_CHAIN when any frame fits; QUEUE_EMPTY when the driver provides too little for one, or QUEUE_BROKEN."""
        cdef int found = QUEUE_CHAIN
        cdef bint enough
        if not self.merging:
            # Several at a time: the driver writes to the lines that these are read from.
            if self.chain_count == 0:
                while self.chain_count < AHEAD and found == QUEUE_CHAIN:
                    found = self.take_chain(queue)
            return found if found == QUEUE_BROKEN else QUEUE_CHAIN if self.chain_count else QUEUE_EMPTY
        while self.room < MAX_FRAME:
            found = self.take_chain(queue)
            if found != QUEUE_CHAIN:
                enough = self.room >= max(self.least, self.largest)
                return QUEUE_CHAIN if found == QUEUE_EMPTY and enough else found
        return QUEUE_CHAIN

    cdef int entries(self) noexcept nogil:
        """How many of the buffers from `iov_first` on the next frame may fill."""
        return self.iov_count if self.merging else self.chains[self.chain_first].buffers

    cdef bint whole(self, uint64_t size) noexcept nogil:
        """Whether the frame of `size` bytes that was read into the window is one, and not cut. Room for its like is kept."""
        cdef bint cut = self.merging and size == self.room and size < MAX_FRAME
        # Nothing but a header is none.
        cdef bint good = size >= HEADER and not cut
        self.unfit += not good
        self.largest = max(self.largest, min(size + (not good), <uint64_t> MAX_FRAME))
        return good

    cdef void fill(self, Virtqueue queue, uint64_t size) noexcept nogil:
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
