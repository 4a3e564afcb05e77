"""How much a guest may have on its way to host programs that do not read, and where that is held.

One pool for all connections of a device: each has LEAST_ROOM, whatever happens, and what they have beyond that is never
more than SHARED_ROOM together. A new connection gets less the more there are, one that is used more, as long as there is
some to share, and one that is used while others want more gives back. Never by taking back what the guest was told it
may send (virtio 1.2, section 5.10.6.3): a room is halved once that half has been passed on.

The room is also the measure of the socket's buffer: what the kernel holds for a host program that does not read is
charged to the sender's, ours (unix(7): SO_SNDBUF). Owns what is held.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from crackle.includes.io cimport iovec
from crackle.includes.socket cimport SIOCOUTQ, SO_SNDBUF, SOL_SOCKET, ioctl, setsockopt
from crackle.virtio.queue cimport copy_buffers

cdef enum:
    LEAST_ROOM = 2 << 10
    MOST_ROOM = 256 << 10
    SHARED_ROOM = 16 << 20
    # What one may have of what nobody has yet: with n connections in use each comes to have 1 / (n + SHARES) of it all.
    SHARES = 32
    # And at the beginning the n-th gets 1 / (BEGINNERS * n): those that are idle from then on leave a share, however many.
    BEGINNERS = 8


cdef class CreditPool:
    """Credit for the connections of one device."""

    def __dealloc__(self):
        free(self.spare_ring)

    @property
    def rooms(self):
        """Bytes granted beyond each connection's least."""
        return self.granted

    # -- who gets how much ---------------------------------------------------------------------------------------

    cdef uint32_t share(self, uint32_t room) noexcept nogil:
        """The room that is right now for a connection that has `room`."""
        cdef uint64_t most = LEAST_ROOM + (SHARED_ROOM - self.granted + room - LEAST_ROOM) // SHARES
        cdef uint32_t found = MOST_ROOM
        while found > LEAST_ROOM and found > most:
            found >>= 1
        return found

    cdef void open(self, connection *c) noexcept nogil:
        """Credit for a connection that has its socket, and none yet."""
        cdef uint32_t most = SHARED_ROOM // BEGINNERS // (self.sharers + 1), room = self.share(LEAST_ROOM)
        while room > LEAST_ROOM and room > most:
            room >>= 1
        c.room = LEAST_ROOM
        self.sharers += 1
        self.set_room(c, room)
        c.edge = room

    cdef void close(self, connection *c) noexcept nogil:
        """It needs none any more. Idempotent."""
        self.drop_ring(c)
        if c.room:
            self.granted -= c.room - LEAST_ROOM
            self.sharers -= 1
            c.room = 0

    cdef void resize(self, connection *c) noexcept nogil:
        """Before the guest is told that half a room or more has been passed on: more of it, or less, if that is right."""
        cdef uint32_t right = self.share(c.room)
        cdef int queued
        if right > c.room:
            self.set_room(c, c.room << 1)
        elif right < c.room and c.held == 0 and c.fd >= 0:
            # What the socket still has counts too.
            if ioctl(c.fd, SIOCOUTQ, &queued) == 0 and <uint32_t> queued <= c.room >> 1:
                self.set_room(c, c.room >> 1)

    cdef void set_room(self, connection *c, uint32_t room) noexcept nogil:
        # The kernel doubles it, for what it needs itself. The largest room has as much as its own default (208 KiB): with
        # more of it a stream of small packets costs a tenth more, for what is written has left the cache when it is read.
        cdef int size = room * 13 >> 5
        self.granted += room
        self.granted -= c.room
        c.room = room
        if c.fd >= 0:
            setsockopt(c.fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size))

    cdef bint may_hold(self, connection *c, uint32_t size) noexcept nogil:
        """Whether the guest may send as much."""
        return c.edge - (c.forwarded + c.held) >= size

    # -- what a slow host program has not taken ------------------------------------------------------------------

    cdef bint hold(self, connection *c, const iovec *iov, int count, size_t skip) noexcept nogil:
        """Keep what `iov` has beyond its first `skip` bytes. False, and nothing kept, when there is no room."""
        cdef size_t size = 0, place, part
        cdef int i
        for i in range(count):
            size += iov[i].iov_len
        size -= skip
        if size > c.room - c.held or size > c.ring_size - c.held and not self.enlarge(c):
            return False
        while size:
            place = (c.begin + c.held) & (c.ring_size - 1)
            part = min(size, c.ring_size - place)
            copy_buffers(iov, count, skip, c.ring + place, part, False)
            c.held += <uint32_t> part
            skip += part
            size -= part
        return True

    cdef bint enlarge(self, connection *c) noexcept nogil:
        """A ring as large as the room."""
        cdef iovec parts[2]
        cdef uint32_t held = c.held
        cdef uint8_t *ring
        if c.room == MOST_ROOM and self.spare_ring != NULL:
            ring, self.spare_ring = self.spare_ring, NULL
        else:
            ring = <uint8_t *> malloc(c.room)
        if ring == NULL:
            return False
        if held:
            self.held_parts(c, parts)
            memcpy(ring, parts[0].iov_base, parts[0].iov_len)
            memcpy(ring + parts[0].iov_len, parts[1].iov_base, parts[1].iov_len)
        self.drop_ring(c)
        c.ring, c.ring_size, c.held = ring, c.room, held
        return True

    cdef int held_parts(self, connection *c, iovec *parts) noexcept nogil:
        """What is held, in one or two parts; how many."""
        cdef uint32_t first = min(c.held, c.ring_size - c.begin)
        parts[0].iov_base, parts[0].iov_len = c.ring + c.begin, first
        parts[1].iov_base, parts[1].iov_len = c.ring, c.held - first
        return 2 if c.held > first else 1

    cdef void let_go(self, connection *c, uint32_t size) noexcept nogil:
        """The first `size` bytes held have been taken."""
        c.begin = (c.begin + size) & (c.ring_size - 1)
        c.held -= size
        if c.held == 0:
            self.drop_ring(c)

    cdef void drop_ring(self, connection *c) noexcept nogil:
        if c.ring_size == MOST_ROOM and self.spare_ring == NULL:
            # One is kept: a stream that is faster than its reader needs it again at once.
            self.spare_ring = c.ring
        else:
            free(c.ring)
        c.ring = NULL
        c.ring_size = c.begin = c.held = 0
