"""What becomes of the connections of a vsock device: what each has for the guest, and how it ends.

The two sides of a connection meet here: `crackle.virtio.vsock.host` has the host program's socket, `crackle.virtio.vsock.mux`
the guest's packets. Owns the table, the pool of credit, and the descriptors of the connections.
"""

from libc.stdint cimport uint32_t
from posix.unistd cimport close

from crackle.includes.vsock cimport VIRTIO_VSOCK_SHUTDOWN_RCV, VIRTIO_VSOCK_SHUTDOWN_SEND
from crackle.runtime.descriptors cimport give_descriptor
from crackle.virtio.vsock.credit cimport CreditPool
from crackle.virtio.vsock.table cimport *

cdef enum:
    BOTH = VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND


cdef class Streams:
    """The connections of one device."""

    def __cinit__(self):
        self.table = Table()
        self.pool = CreditPool()

    # -- what a connection has for the guest ---------------------------------------------------------------------

    cdef uint32_t credit(self, connection *c) noexcept nogil:
        """Bytes that the guest has room for (5.10.6.3)."""
        cdef uint32_t on_its_way = c.sent - c.guest_forwarded
        return c.guest_room - on_its_way if on_its_way < c.guest_room else 0

    cdef bint sendable(self, connection *c) noexcept nogil:
        if c.todo & SEND_DATA and c.state == OPEN and (not c.short_of_credit or self.credit(c)):
            return True
        return c.todo & ~SEND_DATA != 0

    cdef void ready(self, connection *c) noexcept nogil:
        if self.sendable(c):
            self.table.wait(c)

    cdef void begin(self, connection *c, uint32_t host_port, uint32_t guest_port) noexcept nogil:
        """It has its ports, and is one that the guest knows or is to know; it has its socket, if it can have one."""
        self.table.map(c, host_port, guest_port)
        self.pool.open(c)
        self.added += 1

    cdef void passed_on(self, connection *c, uint32_t size) noexcept nogil:
        c.forwarded += size
        # Half of its credit is unknown to the guest: it never stops for want of news.
        if c.forwarded - c.told_forwarded >= c.room // 2 and c.state == OPEN and not c.todo & SEND_CREDIT:
            self.pool.resize(c)
            c.todo |= SEND_CREDIT
            self.table.wait(c)

    cdef void tell(self, connection *c, uint32_t flags) noexcept nogil:
        """Tell the guest that the host program will receive or send no more."""
        if flags & ~c.told:
            c.told |= flags
            c.todo |= SEND_SHUTDOWN
            self.table.wait(c)
        if c.told == BOTH and c.state == OPEN:
            c.state = FINISHED
            c.todo &= ~(SEND_DATA | SEND_CREDIT)
            self.hang_up(c)

    # -- ends ----------------------------------------------------------------------------------------------------

    cdef void hang_up(self, connection *c) noexcept nogil:
        """No socket any more, and nothing held for it."""
        if c.fd >= 0:
            close(c.fd)
            give_descriptor()
            c.fd = -1
        self.pool.close(c)

    cdef void finish(self, connection *c) noexcept nogil:
        """Close it, and send the guest a reset where that still knows the connection."""
        self.hang_up(c)
        if not c.mapped:
            self.release(c)
            return
        self.table.set_timer(c, NO_TIMER, 0)
        c.state, c.todo = DEAD, SEND_RST
        self.table.wait(c)

    cdef void kill(self, connection *c) noexcept nogil:
        self.killed += 1
        self.finish(c)

    cdef void forget(self, connection *c) noexcept nogil:
        """The guest has: its ports may be another's."""
        self.removed += c.mapped
        self.table.unmap(c)

    cdef void release(self, connection *c) noexcept nogil:
        self.hang_up(c)
        self.forget(c)
        self.greetings -= c.state == GREETING
        self.table.remove(c)

    cdef void release_all(self) noexcept nogil:
        cdef uint32_t i
        for i in range(self.table.made):
            if self.table.slots[i].state:
                self.release(self.table.slots[i])

    cdef void disown(self) noexcept nogil:
        """In a forked child: close the copies, and no more; the fork may have been in the middle of a change."""
        cdef uint32_t i
        for i in range(self.table.made):
            if self.table.slots[i].state and self.table.slots[i].fd >= 0:
                close(self.table.slots[i].fd)
            self.table.slots[i].state = 0

    def __dealloc__(self):
        self.release_all()
