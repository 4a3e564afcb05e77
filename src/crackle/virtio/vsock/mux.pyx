"""The protocol of virtio-vsock (virtio 1.2, section 5.10.6): packets of the guest's driver to connections, and back.

The host's half of each connection, a Unix socket, is `crackle.virtio.vsock.host`'s; what becomes of both is
`crackle.virtio.vsock.streams`'s. Flow control is the specification's: each side counts what it has sent and what the other
has passed on, modulo 2^32. Owns the resets that answer packets of no connection.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from crackle.includes.io cimport iovec
from crackle.includes.socket cimport *
from crackle.includes.vsock cimport *
from crackle.virtio.vsock.host cimport SHORT_NS, HostSockets
from crackle.virtio.vsock.streams cimport Streams
from crackle.virtio.vsock.table cimport *

cdef enum:
    BOTH = VIRTIO_VSOCK_SHUTDOWN_RCV | VIRTIO_VSOCK_SHUTDOWN_SEND


cdef class Multiplexer:
    """Packets of the guest `cid` for `streams`, and of theirs for the guest; `host` has the other ends."""

    def __init__(self, uint64_t cid, Streams streams not None, HostSockets host not None):
        self.cid, self.streams, self.host = cid, streams, host
        self.table = streams.table

    cdef void reset(self) noexcept nogil:
        """The guest's driver has gone: so do all connections."""
        self.reset_count = 0
        self.streams.release_all()
        self.host.stop()

    cdef bint pending(self) noexcept nogil:
        """Whether there is something for the guest."""
        return self.reset_count != 0 or self.table.waiting.first != NULL

    cdef bint full(self) noexcept nogil:
        """Whether packets of the guest have to wait until it takes the answers to others."""
        return self.reset_count == MAX_RESETS

    # -- from the guest ------------------------------------------------------------------------------------------

    cdef bint is_ours(self, const virtio_vsock_hdr *h) noexcept nogil:
        """Whether it belongs to a stream from this guest to the host."""
        return h.type == VIRTIO_VSOCK_TYPE_STREAM and h.dst_cid == VMADDR_CID_HOST and h.src_cid == self.cid

    cdef void take(self, const virtio_vsock_hdr *h, iovec *iov, int count) noexcept nogil:
        """A packet of the guest's: `count` buffers with `h.len` bytes."""
        cdef connection *c
        self.tx_packets += 1
        if not self.is_ours(h):
            self.refuse(h)
            return
        c = self.table.find(h.dst_port, h.src_port)
        if c != NULL and h.op == VIRTIO_VSOCK_OP_REQUEST and (c.state == DRAINING or c.state == DEAD):
            # It uses the port again: the old connection is between us and the host program now.
            self.streams.forget(c)
            if c.state == DEAD:
                self.streams.release(c)
            c = NULL
        if c != NULL:
            self.take_for(c, h, iov, count)
        elif h.op == VIRTIO_VSOCK_OP_REQUEST:
            self.begin(h)
        else:
            self.refuse(h)

    cdef void take_incomplete(self, const virtio_vsock_hdr *h) noexcept nogil:
        """A packet that announces more than it has: what is missing is missing from the stream, which cannot go on."""
        cdef connection *c = NULL
        self.tx_packets += 1
        if self.is_ours(h):
            c = self.table.find(h.dst_port, h.src_port)
        if c == NULL:
            self.refuse(h)
        else:
            self.streams.kill(c)

    cdef void refuse(self, const virtio_vsock_hdr *h) noexcept nogil:
        """Answer with a reset; never a reset with another (5.10.6.6)."""
        cdef reset_reply *reply
        if h.op == VIRTIO_VSOCK_OP_RST or self.full():
            return
        reply = &self.resets[(self.reset_first + self.reset_count) & (MAX_RESETS - 1)]
        reply.cid, reply.host_port, reply.guest_port = h.dst_cid, h.dst_port, h.src_port
        self.reset_count += 1

    cdef void begin(self, const virtio_vsock_hdr *h) noexcept nogil:
        cdef connection *c = self.host.dial(h.dst_port, h.src_port)
        if c == NULL:
            self.refuse(h)
            return
        c.guest_room, c.guest_forwarded = h.buf_alloc, h.fwd_cnt

    cdef void take_for(self, connection *c, const virtio_vsock_hdr *h, iovec *iov, int count) noexcept nogil:
        if h.op == VIRTIO_VSOCK_OP_RST:
            if c.state == DRAINING:
                # It had said before that this was the end. What it sent is still to be read.
                self.streams.forget(c)
            else:
                self.streams.release(c)
            return
        c.guest_room, c.guest_forwarded = h.buf_alloc, h.fwd_cnt
        if h.op == VIRTIO_VSOCK_OP_RW:
            if c.state == OPEN and h.len and not c.guest_shut & VIRTIO_VSOCK_SHUTDOWN_SEND:
                self.host.write(c, iov, count, h.len)
        elif h.op == VIRTIO_VSOCK_OP_SHUTDOWN:
            self.guest_shuts(c, h.flags)
        elif h.op == VIRTIO_VSOCK_OP_RESPONSE:
            if c.state == ASKED and c.request_sent:
                self.host.established(c)
        elif h.op == VIRTIO_VSOCK_OP_CREDIT_REQUEST:
            if c.state == OPEN:
                c.todo |= SEND_CREDIT
        elif h.op == VIRTIO_VSOCK_OP_REQUEST and c.state != DIALLING:
            # It has forgotten the connection.
            self.streams.kill(c)
        if c.state == OPEN:
            self.streams.ready(c)

    cdef void guest_shuts(self, connection *c, uint32_t flags) noexcept nogil:
        """It will receive no more, or send no more, or neither."""
        if c.state != OPEN:
            if c.state == ASKED or c.state == DIALLING or c.state == FINISHED and flags & BOTH == BOTH:
                self.streams.finish(c)
            return
        c.guest_shut |= flags & BOTH
        if c.guest_shut == BOTH:
            c.todo = 0
            self.table.stop_waiting(c)
            if c.held:
                c.state = DRAINING
                self.host.flush(c)
            else:
                self.streams.finish(c)
        elif c.guest_shut & VIRTIO_VSOCK_SHUTDOWN_RCV:
            c.todo &= ~SEND_DATA
            shutdown(c.fd, SHUT_RD)
        elif c.guest_shut and c.held == 0:
            shutdown(c.fd, SHUT_WR)

    # -- to the guest --------------------------------------------------------------------------------------------

    cdef void fill(self, connection *c, virtio_vsock_hdr *h, uint16_t op, uint32_t flags) noexcept nogil:
        memset(h, 0, sizeof(h[0]))
        h.src_cid, h.dst_cid, h.src_port, h.dst_port = VMADDR_CID_HOST, self.cid, c.host_port, c.guest_port
        h.type, h.op, h.flags = VIRTIO_VSOCK_TYPE_STREAM, op, flags
        h.buf_alloc, h.fwd_cnt = c.room, c.forwarded
        c.told_forwarded, c.edge = c.forwarded, c.forwarded + c.room
        c.todo &= ~SEND_CREDIT

    cdef int next_packet(self, connection **which, virtio_vsock_hdr *h) noexcept nogil:
        """What the guest is to be given next, each connection in its turn: NOTHING, a PACKET, or DATA of `which`."""
        cdef connection *c
        cdef reset_reply *reply
        cdef int found
        if self.reset_count:
            reply = &self.resets[self.reset_first & (MAX_RESETS - 1)]
            self.reset_first += 1
            self.reset_count -= 1
            memset(h, 0, sizeof(h[0]))
            h.src_cid, h.dst_cid, h.src_port, h.dst_port = reply.cid, self.cid, reply.host_port, reply.guest_port
            h.type, h.op = VIRTIO_VSOCK_TYPE_STREAM, VIRTIO_VSOCK_OP_RST
            return PACKET
        while True:
            c = self.table.waiting.first
            if c == NULL:
                return NOTHING
            self.table.stop_waiting(c)
            found = self.next_of(c, h)
            which[0] = c
            if found == PACKET and h.op != VIRTIO_VSOCK_OP_RST:
                self.streams.ready(c)
            if found != NOTHING:
                return found

    cdef int next_of(self, connection *c, virtio_vsock_hdr *h) noexcept nogil:
        cdef uint8_t todo = c.todo
        if todo & SEND_RST:
            self.fill(c, h, VIRTIO_VSOCK_OP_RST, 0)
            self.streams.release(c)
        elif todo & SEND_RESPONSE:
            c.todo &= ~SEND_RESPONSE
            self.fill(c, h, VIRTIO_VSOCK_OP_RESPONSE, 0)
        elif todo & SEND_REQUEST:
            c.todo &= ~SEND_REQUEST
            c.request_sent = True
            self.table.set_timer(c, SHORT, self.host.now() + SHORT_NS)
            self.fill(c, h, VIRTIO_VSOCK_OP_REQUEST, 0)
        elif todo & SEND_DATA and c.state == OPEN and self.streams.credit(c):
            c.short_of_credit = False
            return DATA
        elif todo & SEND_DATA and c.state == OPEN and not c.short_of_credit:
            # Once; it tells by itself when its program has read something.
            c.short_of_credit = True
            self.fill(c, h, VIRTIO_VSOCK_OP_CREDIT_REQUEST, 0)
        elif todo & SEND_SHUTDOWN:
            c.todo &= ~SEND_SHUTDOWN
            if c.state == FINISHED:
                self.table.set_timer(c, SHORT, self.host.now() + SHORT_NS)
            self.fill(c, h, VIRTIO_VSOCK_OP_SHUTDOWN, c.told)
        elif todo & SEND_CREDIT:
            self.fill(c, h, VIRTIO_VSOCK_OP_CREDIT_UPDATE, 0)
        else:
            return NOTHING
        return PACKET

    cdef void data_read(self, connection *c, ssize_t size, size_t asked) noexcept nogil:
        """After DATA: readv() of `asked` bytes returned `size`, with errno; the packets are made."""
        if size > 0:
            c.sent += <uint32_t> size
            self.rx_bytes += size
            if <size_t> size < asked and not c.closing:
                # Empty, and epoll tells when it is so no more.
                c.todo &= ~SEND_DATA
        elif size == 0:
            self.host.end_of_stream(c)
        elif errno == EAGAIN:
            c.todo &= ~SEND_DATA
        elif errno != EINTR:
            self.read_fails += 1
            self.streams.kill(c)
            return
        self.streams.ready(c)
