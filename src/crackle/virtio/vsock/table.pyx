"""The connections of a vsock device: who they are, and what each waits for.

A place in the table is given again with another generation, so that an event of the kernel's for a connection that has
ended meanwhile finds nobody. Owns the memory of all that. What becomes of a connection is `crackle.virtio.vsock.streams`'s.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from crackle.runtime.threads cimport now_ns

cdef enum:
    BUCKETS = 4096


cdef class Table:
    """Up to MAX_CONNECTIONS connections."""

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.made):
            free(self.slots[i])
        free(self.slots)
        free(self.buckets)

    cdef bint prepare(self) noexcept nogil:
        """Before the first connection; False when there is no memory. Idempotent."""
        if self.slots == NULL:
            self.slots = <connection **> calloc(MAX_CONNECTIONS, sizeof(connection *))
        if self.buckets == NULL:
            self.buckets = <connection **> calloc(BUCKETS, sizeof(connection *))
            # The guest chooses ports: it must not know which of them meet in a bucket.
            self.seed = <uint32_t> now_ns() | 1
        return self.slots != NULL and self.buckets != NULL

    cdef connection *add(self) noexcept nogil:
        """A new connection with nothing but a place, or NULL when there are too many."""
        cdef connection *c = self.unused
        cdef uint32_t index, generation
        if c != NULL:
            self.unused = c.same_hash
        elif self.made < MAX_CONNECTIONS:
            c = <connection *> calloc(1, sizeof(connection))
            if c == NULL:
                return NULL
            c.index = self.made
            self.slots[self.made] = c
            self.made += 1
        else:
            return NULL
        index, generation = c.index, c.generation + 1
        memset(c, 0, sizeof(connection))
        c.index, c.generation, c.fd, c.timer = index, generation, -1, NO_TIMER
        self.count += 1
        return c

    cdef void remove(self, connection *c) noexcept nogil:
        """Out of every list; its place may be given again."""
        self.unmap(c)
        self.stop_waiting(c)
        self.set_timer(c, NO_TIMER, 0)
        c.state = 0
        c.same_hash = self.unused
        self.unused = c
        self.count -= 1

    cdef connection *at(self, uint32_t index, uint32_t generation) noexcept nogil:
        if index >= self.made:
            return NULL
        if self.slots[index].generation != generation or self.slots[index].state == 0:
            return NULL
        return self.slots[index]

    # -- by ports ------------------------------------------------------------------------------------------------

    cdef uint32_t bucket(self, uint32_t host_port, uint32_t guest_port) noexcept nogil:
        cdef uint64_t mixed = (<uint64_t> host_port << 32 | guest_port) * (0x9e3779b97f4a7c15ULL ^ self.seed | 1)
        return <uint32_t> (mixed >> 40) & (BUCKETS - 1)

    cdef connection *find(self, uint32_t host_port, uint32_t guest_port) noexcept nogil:
        cdef connection *c = self.buckets[self.bucket(host_port, guest_port)]
        while c != NULL and (c.host_port != host_port or c.guest_port != guest_port):
            c = c.same_hash
        return c

    cdef void map(self, connection *c, uint32_t host_port, uint32_t guest_port) noexcept nogil:
        cdef uint32_t bucket = self.bucket(host_port, guest_port)
        c.host_port, c.guest_port, c.mapped = host_port, guest_port, True
        c.same_hash = self.buckets[bucket]
        self.buckets[bucket] = c

    cdef void unmap(self, connection *c) noexcept nogil:
        cdef connection **place
        if not c.mapped:
            return
        c.mapped = False
        place = &self.buckets[self.bucket(c.host_port, c.guest_port)]
        while place[0] != c:
            place = &place[0].same_hash
        place[0] = c.same_hash

    # -- lists ---------------------------------------------------------------------------------------------------

    cdef void wait(self, connection *c) noexcept nogil:
        """At the end of those that have something for the guest."""
        if c.waiting:
            return
        c.waiting = True
        c.wait.previous, c.wait.next = self.waiting.last, NULL
        if self.waiting.last != NULL:
            self.waiting.last.wait.next = c
        else:
            self.waiting.first = c
        self.waiting.last = c

    cdef void stop_waiting(self, connection *c) noexcept nogil:
        if not c.waiting:
            return
        c.waiting = False
        if c.wait.previous != NULL:
            c.wait.previous.wait.next = c.wait.next
        else:
            self.waiting.first = c.wait.next
        if c.wait.next != NULL:
            c.wait.next.wait.previous = c.wait.previous
        else:
            self.waiting.last = c.wait.previous

    cdef void set_timer(self, connection *c, int kind, uint64_t deadline) noexcept nogil:
        """One of the lists of timers, or NO_TIMER. `deadline` is not before any that the list has."""
        cdef chain_of *timers
        if c.timer != NO_TIMER:
            timers = &self.timers[c.timer]
            if c.due.previous != NULL:
                c.due.previous.due.next = c.due.next
            else:
                timers.first = c.due.next
            if c.due.next != NULL:
                c.due.next.due.previous = c.due.previous
            else:
                timers.last = c.due.previous
        c.timer, c.deadline = kind, deadline
        if kind != NO_TIMER:
            timers = &self.timers[kind]
            c.due.previous, c.due.next = timers.last, NULL
            if timers.last != NULL:
                timers.last.due.next = c
            else:
                timers.first = c
            timers.last = c
