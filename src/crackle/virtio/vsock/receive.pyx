"""The guest's receive buffers of a vsock device, and packets in them (virtio 1.2, section 5.10.6.1).

What a host program has written is read straight into as many buffers as it fills, with one system call. Those that have
remained empty were never taken.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from crackle.includes.io cimport iovec, readv
from crackle.includes.vsock cimport VIRTIO_VSOCK_OP_RW, virtio_vsock_hdr
from crackle.memory.guest cimport GuestMemory
from crackle.virtio.queue cimport CHAIN_IOV, QUEUE_CHAIN, Virtqueue, chain, copy_buffers
from crackle.virtio.vsock.mux cimport Multiplexer
from crackle.virtio.vsock.table cimport connection

cdef enum:
    MAX_PACKET = 64 << 10
    MAX_READ = 256 << 10


cdef class ReceiveBuffers:
    """Those of one receive queue, in `memory`."""

    def __init__(self, GuestMemory memory not None):
        self.memory = memory

    cdef int gather(self, Virtqueue queue, int number) noexcept nogil:
        """The next receive buffer becomes packet `number`, with a count of 0 when it cannot be one; as Virtqueue.pop()."""
        cdef chain *c = &self.request
        cdef packet *p = &self.packets[number]
        cdef int found = queue.pop(c), i
        if found != QUEUE_CHAIN:
            return found
        p.head, p.count = c.head, 0
        p.first = 0 if number == 0 else self.packets[number - 1].first + self.packets[number - 1].count
        if c.readable or c.writable_bytes < HEADER:
            return found
        p.count, p.room = c.writable, <int> min(c.writable_bytes - HEADER, <uint64_t> MAX_PACKET)
        for i in range(c.writable):
            self.buffers[p.first + i], self.gpas[p.first + i] = c.iov[i], c.gpa[i]
        return found

    cdef bint usable(self) noexcept nogil:
        """Whether the first gathered has room for a header."""
        return self.packets[0].count != 0

    cdef void give_back(self, Virtqueue queue) noexcept nogil:
        """Nothing fits into the first gathered: the driver has it again, empty."""
        self.errors += 1
        queue.push(self.packets[0].head, 0)

    cdef void put(self, Virtqueue queue, virtio_vsock_hdr *header) noexcept nogil:
        """A packet without data into the first gathered."""
        self.put_packet(queue, &self.packets[0], header)

    cdef int data_buffers(self, packet *p, iovec *data, size_t size) noexcept nogil:
        """The first `size` bytes of a packet's room for data as `data`; how many entries that is."""
        cdef iovec *iov = &self.buffers[p.first]
        cdef size_t skip = HEADER, part
        cdef int count = 0
        while size:
            if skip >= iov.iov_len:
                skip -= iov.iov_len
            else:
                part = min(iov.iov_len - skip, size)
                data[count].iov_base, data[count].iov_len = <char *> iov.iov_base + skip, part
                size -= part
                count += 1
                skip = 0
            iov += 1
        return count

    cdef uint32_t read_into(self, Virtqueue queue, Multiplexer mux, connection *c) noexcept nogil:
        """Read what a host program has written into as many packets as it fills; how many. The first is gathered."""
        cdef size_t most = min(mux.streams.credit(c), <uint32_t> MAX_READ), asked = 0, left, part
        cdef int count = 0, entries = 0, filled = 0, i
        cdef virtio_vsock_hdr header
        cdef ssize_t n
        if self.packets[0].room == 0:
            self.give_back(queue)
            mux.streams.ready(c)
            return 1
        while True:
            part = min(<size_t> self.packets[count].room, most - asked)
            entries += self.data_buffers(&self.packets[count], &self.data[entries], part)
            asked += part
            count += 1
            if asked == most or count == MAX_GATHER:
                break
            if self.packets[count - 1].first + self.packets[count - 1].count > MAX_BUFFERS - CHAIN_IOV:
                break
            if self.gather(queue, count) != QUEUE_CHAIN:
                break
            if self.packets[count].count == 0 or self.packets[count].room == 0:
                queue.next_avail -= 1
                break
        n = readv(c.fd, self.data, entries)
        left = max(n, 0)
        for i in range(count):
            if left == 0:
                break
            part = min(left, <size_t> self.packets[i].room)
            mux.fill(c, &header, VIRTIO_VSOCK_OP_RW, 0)
            header.len = <uint32_t> part
            self.put_packet(queue, &self.packets[i], &header)
            mux.rx_packets += 1
            left -= part
            filled += 1
        # Those that have remained empty were never taken.
        queue.next_avail -= <uint16_t> (count - filled)
        mux.data_read(c, n, asked)
        return filled

    cdef void put_packet(self, Virtqueue queue, packet *p, virtio_vsock_hdr *header) noexcept nogil:
        cdef uint64_t left = HEADER + header.len
        cdef int i = p.first
        copy_buffers(&self.buffers[p.first], p.count, 0, header, HEADER, True)
        queue.push(p.head, <uint32_t> left)
        if self.memory.tracking:
            while left:
                self.memory.mark_dirty(self.gpas[i], min(left, self.buffers[i].iov_len))
                left -= min(left, self.buffers[i].iov_len)
                i += 1
