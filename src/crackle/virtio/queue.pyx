"""The device's side of a split virtqueue (virtio 1.2, section 2.7).

Everything in the rings is written by the guest and hostile: each descriptor is copied once, the copy is checked, and only
the copy is used. A chain has at most as many buffers as the queue has entries, which bounds every walk, loops included
(2.7.5.3.1). A fault breaks the queue: the device then asks for a reset and touches the rings no more.

A buffer may begin in one region of guest memory and end in the next: the device then sees two. Each part of a ring, and
an indirect table, lies in one.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove

from crackle.includes.virtio cimport *
from crackle.memory.guest cimport PAGES_THERE, GuestMemory

from crackle.virtio.state import QueueState


cdef extern from * nogil:
    """
    #define load_idx(place) __atomic_load_n(place, __ATOMIC_ACQUIRE)
    #define store_idx(place, value) __atomic_store_n(place, value, __ATOMIC_RELEASE)
    #define full_barrier() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    /* The barrier keeps the compiler from reading guest memory a second time instead of the copy. */
    #define copy_once(to, from) (memcpy(to, from, sizeof(*(to))), __atomic_signal_fence(__ATOMIC_SEQ_CST))
    """
    uint16_t load_idx(uint16_t *place)
    void store_idx(uint16_t *place, uint16_t value)
    void full_barrier()
    void copy_once(vring_desc *to, vring_desc *source)


cdef enum:
    # Bytes of a buffer whose pages are waited for: of more at once only a guest is capable that wants to keep its own
    # device busy, and it may wait for the rest in the kernel.
    MAX_FETCH = 16 << 20


cdef bint overlaps(uint64_t one, uint64_t one_size, uint64_t other, uint64_t other_size) noexcept nogil:
    return one < other + other_size and other < one + one_size


cdef class Virtqueue:
    """One queue over `memory`; `max_size`, a power of two up to 256, is what the device offers.

    The transport sets the three addresses and the size and then enables it. A driver's method names are the ring's: `pop`
    takes an available chain, `push` returns it used, `publish` makes what was pushed visible.
    """

    def __cinit__(self, GuestMemory memory not None, uint16_t max_size=MAX_QUEUE_SIZE):
        if not 0 < max_size <= MAX_QUEUE_SIZE or max_size & (max_size - 1):
            raise ValueError(f"a queue has a power of two of entries up to {MAX_QUEUE_SIZE}, not {max_size}")
        self.memory = memory
        self.max_size = max_size
        self.reset()

    cdef void reset(self) noexcept nogil:
        self.ready = False
        self.size = self.max_size
        self.desc_gpa = self.avail_gpa = self.used_gpa = 0
        self.next_avail = self.next_used = self.published = self.signalled = self.cached_avail = 0
        self.kept_count = self.in_hand = 0
        self.signalled_valid = False
        self.event_idx = self.indirect = self.hushed = False
        self.fault = NULL

    cdef bint enable(self) noexcept nogil:
        """Find the three parts in guest memory; False when one is misaligned or outside (2.7, table of alignments)."""
        cdef uint64_t n = self.size
        if n == 0 or n > self.max_size or n & (n - 1):
            return False
        if self.desc_gpa & 15 or self.avail_gpa & 1 or self.used_gpa & 3:
            return False
        self.desc = <vring_desc *> self.memory.span(self.desc_gpa, 16 * n)
        self.avail = <uint16_t *> self.memory.span(self.avail_gpa, 6 + 2 * n)
        self.used = <uint16_t *> self.memory.span(self.used_gpa, 6 + 8 * n)
        self.ready = self.desc != NULL and self.avail != NULL and self.used != NULL
        self.fault = NULL
        return self.ready

    cdef bint let_go(self, uint64_t gpa, uint64_t size) noexcept nogil:
        """Guest memory in [gpa, gpa + size) goes. Whether a part of this queue was there: then it is enabled no more."""
        cdef uint64_t n = self.size
        if not self.ready or not (
            overlaps(self.desc_gpa, 16 * n, gpa, size)
            or overlaps(self.avail_gpa, 6 + 2 * n, gpa, size)
            or overlaps(self.used_gpa, 6 + 8 * n, gpa, size)
        ):
            return False
        self.ready = False
        self.fault = "the guest memory that the queue lies in was taken away"
        return True

    cdef int broken(self, const char *why) noexcept nogil:
        self.fault = why
        return QUEUE_BROKEN

    cdef int add_buffer(self, chain *c, vring_desc *d) noexcept nogil:
        cdef uint64_t gpa = d.addr, left = d.len, part
        cdef int n = c.readable + c.writable
        cdef uint8_t *host
        if d.flags & VRING_DESC_F_WRITE:
            c.writable_bytes += left
        elif c.writable:
            return self.broken("device-readable descriptor after a device-writable one")
        else:
            c.readable_bytes += left
        while left:
            part = self.memory.piece(gpa, left, &host)
            if part == 0:
                return self.broken("descriptor points outside guest memory")
            if n == CHAIN_IOV:
                return self.broken("descriptor chain in too many pieces of guest memory")
            if self.memory.pages != PAGES_THERE and not (self.names_only and d.flags & VRING_DESC_F_WRITE):
                self.memory.fetch(host, min(part, MAX_FETCH))
            c.iov[n].iov_base, c.iov[n].iov_len, c.gpa[n] = host, part, gpa
            n += 1
            gpa += part
            left -= part
        if d.flags & VRING_DESC_F_WRITE:
            c.writable = n - c.readable
        else:
            c.readable = n
        return QUEUE_CHAIN

    cdef int pop(self, chain *c) noexcept nogil:
        """The next available chain into `c`: QUEUE_CHAIN, QUEUE_EMPTY, or QUEUE_BROKEN with `fault` set."""
        if self.fault != NULL:
            return QUEUE_BROKEN
        if self.next_avail == self.cached_avail:
            self.cached_avail = load_idx(&self.avail[RING_IDX])
            if self.next_avail == self.cached_avail:
                return QUEUE_EMPTY
            if <uint16_t> (self.cached_avail - self.next_avail) > self.size:
                return self.broken("available index ran ahead by more than the queue's size")
            if not self.event_idx and not self.hushed:
                # Until rearm() nobody need say that there is more (2.7.10): an event index does that by staying behind.
                self.hushed = True
                store_idx(&self.used[RING_FLAGS], VRING_USED_F_NO_NOTIFY)
        if self.walk(load_idx(&self.avail[RING_ENTRIES + (self.next_avail & (self.size - 1))]), c) == QUEUE_BROKEN:
            return QUEUE_BROKEN
        self.next_avail += 1
        return QUEUE_CHAIN

    cdef int walk(self, uint32_t head, chain *c) noexcept nogil:
        """The chain that begins with descriptor `head` into `c`: QUEUE_CHAIN, or QUEUE_BROKEN.

        All pages of it are there then, where they come from a page-fault handler.
        """
        cdef int found = self.follow(head, c)
        if self.memory.pages != PAGES_THERE and self.memory.has_lost():
            # Whatever was read may be zeros that stand for something else.
            return self.broken("the page-fault handler of guest memory gives no pages any more")
        return found

    cdef int follow(self, uint32_t head, chain *c) noexcept nogil:
        cdef vring_desc d
        cdef vring_desc *table = self.desc
        cdef uint32_t length = self.size, index = head, steps = 0, buffers = 0
        cdef bint in_table = False
        c.head = index
        c.readable = c.writable = 0
        c.readable_bytes = c.writable_bytes = 0
        while True:
            if index >= length:
                return self.broken("descriptor index beyond its table")
            # Counts descriptors walked, empty ones too, so that a loop ends.
            if steps > self.size:
                return self.broken("descriptor chain longer than the queue")
            steps += 1
            copy_once(&d, &table[index])
            if d.flags & VRING_DESC_F_INDIRECT:
                # 2.7.5.3: a table of its own, not nested, and no NEXT beside it.
                if not self.indirect or in_table or d.flags & VRING_DESC_F_NEXT:
                    return self.broken("indirect descriptor where none is allowed")
                if d.len == 0 or d.len & 15 or d.len // 16 > MAX_QUEUE_SIZE:
                    return self.broken("indirect table of a wrong size")
                table = <vring_desc *> self.memory.span(d.addr, d.len)
                if table == NULL:
                    return self.broken("indirect table outside guest memory")
                length, index, in_table = d.len // 16, 0, True
                continue
            if d.len:
                if buffers == self.size:
                    return self.broken("descriptor chain longer than the queue")
                buffers += 1
                if self.add_buffer(c, &d) == QUEUE_BROKEN:
                    return QUEUE_BROKEN
            if not d.flags & VRING_DESC_F_NEXT:
                break
            index = d.next
        return QUEUE_CHAIN

    cdef int pop_to_keep(self, chain *c) noexcept nogil:
        """pop() for a device that may keep the chain over a snapshot, and returns it with `push_kept`.

        After a restore the chains that were kept come again, in their order, before any other.
        """
        cdef int found
        if self.in_hand < self.kept_count:
            found = QUEUE_BROKEN if self.fault != NULL else self.walk(self.kept[self.in_hand], c)
        else:
            found = self.pop(c)
            if found == QUEUE_CHAIN:
                if self.kept_count == self.size:
                    return self.broken("more chains available than the queue has entries")
                self.kept[self.kept_count] = c.head
                self.kept_count += 1
        self.in_hand += found == QUEUE_CHAIN
        return found

    cdef void push_kept(self, uint16_t head, uint32_t length) noexcept nogil:
        """push() of a chain that `pop_to_keep` gave."""
        cdef int i = 0
        while i < self.in_hand and self.kept[i] != head:
            i += 1
        if i < self.in_hand:
            self.in_hand -= 1
            self.kept_count -= 1
            memmove(&self.kept[i], &self.kept[i + 1], (self.kept_count - i) * sizeof(uint16_t))
        self.push(head, length)

    cdef void put_back(self, uint16_t count) noexcept nogil:
        """The last `count` chains that were popped are available again."""
        self.next_avail -= count

    cdef void push(self, uint16_t head, uint32_t length) noexcept nogil:
        """Note that chain `head` is used, `length` bytes written into it; the driver sees it at the next `publish`."""
        cdef vring_used_elem *ring = <vring_used_elem *> &self.used[RING_ENTRIES]
        cdef uint32_t slot = self.next_used & (self.size - 1)
        ring[slot].id, ring[slot].len = head, length
        self.next_used += 1

    cdef void publish(self) noexcept nogil:
        self.published = self.next_used
        store_idx(&self.used[RING_IDX], self.next_used)
        self.memory.mark_dirty(self.used_gpa, 6 + 8 * <uint64_t> self.size)

    cdef bint show(self, bint last) noexcept nogil:
        """Publish what was pushed, if anything; whether to interrupt the driver now.

        By its event index it says when it wants to hear of it. Without one it is told once a turn, at the `last` of it.
        """
        if self.next_used != self.published:
            self.publish()
        return (last or self.event_idx) and self.wants_interrupt()

    cdef bint wants_interrupt(self) noexcept nogil:
        """After `publish`: must the driver be interrupted (2.7.7 and 2.7.10)?"""
        cdef uint16_t old = self.signalled, new = self.next_used, event
        cdef bint first = not self.signalled_valid
        if old == new:
            return False
        self.signalled, self.signalled_valid = new, True
        full_barrier()
        if not self.event_idx:
            return not load_idx(&self.avail[RING_FLAGS]) & VRING_AVAIL_F_NO_INTERRUPT
        event = load_idx(&self.avail[RING_ENTRIES + self.size])
        return first or <uint16_t> (new - event - 1) < <uint16_t> (new - old)

    cdef bint has_more(self) noexcept nogil:
        return load_idx(&self.avail[RING_IDX]) != self.next_avail

    cdef bint rearm(self) noexcept nogil:
        """Ask to be notified of the next chain; False when one has come meanwhile, and pop() must be called again."""
        if self.event_idx:
            store_idx(&self.used[RING_ENTRIES + 4 * self.size], self.next_avail)
        else:
            # Whatever stands there: a driver that was restored may have been told otherwise.
            self.hushed = False
            store_idx(&self.used[RING_FLAGS], 0)
        full_barrier()
        return load_idx(&self.avail[RING_IDX]) == self.next_avail

    # -- saved state, and the same operations for tests ----------------------------------------------------------

    def save(self):
        """QueueState. The device is at rest."""
        cdef int i
        return QueueState(
            size=self.size,
            ready=self.ready,
            desc=self.desc_gpa,
            avail=self.avail_gpa,
            used=self.used_gpa,
            next_avail=self.next_avail,
            next_used=self.next_used,
            in_flight=tuple([self.kept[i] for i in range(self.kept_count)]),
        )

    def restore(self, state, *, bint event_idx, bint indirect):
        """The reverse of `save`; ValueError when the state does not fit this queue or guest memory."""
        self.reset()
        # A queue that is not enabled may have any size: the driver has written it and nothing has looked at it.
        if not 0 <= state.size <= (self.max_size if state.ready else 0xffff):
            raise ValueError(f"saved queue of {state.size} entries, this device has {self.max_size}")
        self.size, self.desc_gpa, self.avail_gpa, self.used_gpa = state.size, state.desc, state.avail, state.used
        self.event_idx, self.indirect = event_idx, indirect
        if state.ready and not self.enable():
            raise ValueError("saved queue lies outside guest memory")
        if len(state.in_flight) > (self.size if state.ready else 0):
            raise ValueError(f"{len(state.in_flight)} saved chains in flight, the queue has {self.size} entries")
        for head in state.in_flight:
            self.kept[self.kept_count] = head
            self.kept_count += 1
        self.next_avail = self.cached_avail = state.next_avail
        self.next_used = self.published = self.signalled = state.next_used

    def take(self):
        """pop() for tests: None when empty, else (head, [(gpa, length, device-writable)]). ValueError when broken."""
        cdef chain c
        cdef int i, found
        if not self.ready or not self.memory.table.count:
            raise ValueError("the queue is not enabled")
        with nogil:
            found = self.pop(&c)
        if found == QUEUE_BROKEN:
            raise ValueError(self.fault.decode())
        if found == QUEUE_EMPTY:
            return None
        return c.head, [(c.gpa[i], c.iov[i].iov_len, i >= c.readable) for i in range(c.readable + c.writable)]

    def give(self, uint16_t head, uint32_t length, *, bint last=True):
        """push() and show() for tests; whether the driver is to be interrupted."""
        if not self.ready or not self.memory.table.count:
            raise ValueError("the queue is not enabled")
        self.push(head, length)
        return self.show(last)


cdef size_t copy_buffers(
    const iovec *iov, int count, size_t offset, void *data, size_t size, bint to_guest
) noexcept nogil:
    cdef size_t done = 0, n
    cdef char *place
    cdef int i
    for i in range(count):
        if offset >= iov[i].iov_len:
            offset -= iov[i].iov_len
            continue
        if done == size:
            break
        n = min(iov[i].iov_len - offset, size - done)
        place = <char *> iov[i].iov_base + offset
        if to_guest:
            memcpy(place, <char *> data + done, n)
        else:
            memcpy(<char *> data + done, place, n)
        done += n
        offset = 0
    return done
