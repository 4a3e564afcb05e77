"""virtio-vsock (virtio 1.2, section 5.10): streams between programs of the guest and of the host.

Three queues: to the guest, from the guest, and events. Packets are `crackle.virtio.vsock.mux`'s; what they carry is read
from and written to Unix sockets straight out of and into the guest's own buffers, many packets with one system call.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.unistd cimport getpid

from crackle.includes.events cimport EPOLLIN
from crackle.includes.io cimport iovec
from crackle.runtime.iothread cimport IoThread
from crackle.runtime.threads cimport *
from crackle.includes.virtio cimport *
from crackle.includes.vsock cimport *
from crackle.memory.guest cimport GuestMemory
from crackle.virtio.lookout cimport begin_turn, in_vain, lookout
from crackle.virtio.device cimport TURN_NS, VirtioDevice
from crackle.virtio.queue cimport QUEUE_BROKEN, QUEUE_CHAIN, QUEUE_EMPTY, Virtqueue, chain, copy_buffers
from crackle.virtio.vsock.host cimport HostSockets
from crackle.virtio.vsock.listener cimport Listener
from crackle.virtio.vsock.mux cimport DATA, NOTHING, Multiplexer
from crackle.virtio.vsock.receive cimport HEADER, RX_QUEUE_SIZE, ReceiveBuffers
from crackle.virtio.vsock.streams cimport Streams
from crackle.virtio.vsock.table cimport MAX_CONNECTIONS, connection

import msgspec

from crackle.errors import ConfigError
from crackle.runtime.descriptors import measure_descriptors

cdef extern from * nogil:
    void full_barrier "__sync_synchronize" ()

cdef enum:
    QUEUE_SIZE = RX_QUEUE_SIZE
    RX = 0
    TX = 1
    EVENT = 2
    FIRST_GUEST_CID = 3             # 5.10.4: those below are the hypervisor's and the host's
    MAX_BATCH = 4 * QUEUE_SIZE
    # Times in a row that there was data for the guest and none from it.
    STREAM = 16

# The reset event (5.10.6.7) of a restored guest, whose connections are gone.
cdef enum:
    NO_EVENT = 0
    TO_SEND = 1
    SENT = 2        # nothing else is sent until the driver has taken it


cdef check_cid(cid):
    if not 0 <= cid <= 0xffffffff:
        raise ConfigError(f"a guest's CID is a number of 32 bits, not {cid}")


def is_reserved(cid):
    """Whether a guest's driver may refuse to have this one, which is somebody else's or nobody's (5.10.4)."""
    return not FIRST_GUEST_CID <= cid < 0xffffffff


def check(cid, str uds_path not None):
    """Whether there could be a device with these; ConfigError if not. Leaves nothing behind."""
    check_cid(cid)
    Listener(uds_path).close()


class VsockState(msgspec.Struct, frozen=True, kw_only=True, tag="vsock"):
    """What a vsock device adds to its DeviceState. Connections end with the snapshot.

    uds_path: of the Unix socket, unless whoever restores names another. last_port: the last that a host program got.
    """

    cid: int
    uds_path: str
    last_port: int


cdef class Vsock(VirtioDevice):
    """Streams for the guest with context identifier `cid`, 3 to 2^32 - 2 as a rule.

    uds_path: the socket that host programs connect to. last_port: of the ports given to host programs before, from a saved
    state, or 0. Raises ConfigError when the socket cannot be made.
    """

    own_state = VsockState

    cdef Listener listener
    cdef readonly Streams streams
    cdef readonly HostSockets host
    cdef readonly Multiplexer mux
    cdef ReceiveBuffers buffers
    cdef chain request
    cdef int most
    cdef int reset_event
    cdef uint16_t event_avail
    cdef lookout looking
    cdef uint32_t one_way               # see STREAM
    cdef uint64_t seen_rx, seen_tx      # bytes
    cdef readonly uint64_t rx_events, tx_events, tx_errors, event_fails

    def __init__(self, GuestMemory memory, cid, str uds_path not None, uint32_t last_port=0):
        cdef virtio_vsock_config config
        check_cid(cid)
        self.set_up(VIRTIO_ID_VSOCK, 0, (QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE))
        config.guest_cid = cid
        memcpy(self.config, &config, sizeof(config))
        self.config_size = sizeof(config)
        self.buffers = ReceiveBuffers(memory)
        self.streams = Streams()
        self.listener = Listener(uds_path)
        try:
            self.host = HostSockets(self.streams, self.listener, last_port)
        except BaseException:
            self.listener.close()
            raise
        self.mux = Multiplexer(cid, self.streams, self.host)
        self.most = min(<int> measure_descriptors(), <int> MAX_CONNECTIONS)

    def attach(self, IoThread io not None):
        """Serve the queues, and the host's sockets, on `io`."""
        VirtioDevice.attach(self, io)
        self.host.clock = io.clock
        self.watch(self.host.epoll_fd, EPOLLIN, host_ready, <void *> self)

    def close(self):
        """End all connections, remove the socket's file, give the descriptors back; the I/O thread is stopped. Idempotent."""
        VirtioDevice.close(self)
        if self.mux is not None:
            if self.pid == getpid():
                self.streams.release_all()
            else:
                self.streams.disown()
            self.host.close()
            self.listener.close()

    @property
    def uds_path(self):
        """Where host programs connect."""
        return self.listener.path

    @property
    def cid(self):
        """The guest's context identifier."""
        return self.mux.cid

    @property
    def connections(self):
        """How many there are now, those that are only beginning or ending among them."""
        return self.streams.table.count

    @property
    def max_connections(self):
        """How many there can be, by the descriptors that the process could have when the device was made."""
        return self.most

    @property
    def rx_errors(self):
        """Receive buffers that were of no use."""
        return self.buffers.errors

    # -- on the I/O thread, with the lock held -------------------------------------------------------------------

    cdef bint on_activate(self) noexcept nogil:
        return self.host.start()

    cdef void on_reset(self) noexcept nogil:
        self.reset_event = NO_EVENT
        self.mux.reset()

    cdef void fail(self) noexcept nogil:
        self.need_reset()
        self.mux.reset()

    cdef void handle_queue(self, int index, Virtqueue queue) noexcept nogil:
        if index == RX:
            self.rx_events += 1
        elif index == TX:
            self.tx_events += 1
        else:
            self.serve_events(queue)
        self.serve(<Virtqueue> self.table[RX], <Virtqueue> self.table[TX])

    cdef void host_events(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.host.host_events()
        if self.running():
            self.serve(<Virtqueue> self.table[RX], <Virtqueue> self.table[TX])
        pthread_mutex_unlock(&self.lock)

    cdef void serve(self, Virtqueue rx, Virtqueue tx) noexcept nogil:
        """Take what the guest has sent, and give it what there is for it, until there is no more for a while."""
        cdef uint64_t begin = now_ns(), until = 0, now = begin
        begin_turn(&self.looking, begin, self.io.spin_ns)
        while self.running():
            if self.move(rx, tx):
                self.note_direction()
                now = now_ns()
                until = now + self.looking.patience_ns
                if now - begin >= TURN_NS:
                    self.notify_again(TX)
                    break
            # Either side of a stream goes on at once: look out for it for as long as its notification would cost.
            elif now < until:
                if self.one_way >= STREAM:
                    # Its writer may want this CPU, and would be interrupted for each piece if this thread slept.
                    sched_yield()
                self.host.host_events()
                now = now_ns()
            elif self.at_rest(rx, tx):
                if until:
                    in_vain(&self.looking, now, until)
                break
        self.host.arm()

    cdef void note_direction(self) noexcept nogil:
        """Tell a stream to the guest from a conversation, in which the answer must find this thread there."""
        if self.host.tx_bytes != self.seen_tx:
            self.one_way = 0
        elif self.mux.rx_bytes != self.seen_rx and self.one_way < STREAM:
            self.one_way += 1
        self.seen_rx, self.seen_tx = self.mux.rx_bytes, self.host.tx_bytes

    cdef bint at_rest(self, Virtqueue rx, Virtqueue tx) noexcept nogil:
        """Ask to be notified of what is missing; whether it is still missing then."""
        cdef bint rests = True
        if tx.ready and not self.mux.full():
            rests = tx.rearm()
        if rx.ready and self.mux.pending() and self.reset_event == NO_EVENT:
            rests = rx.rearm() and rests
        return rests

    cdef bint move(self, Virtqueue rx, Virtqueue tx) noexcept nogil:
        """Serve both queues as they are; whether anything was used."""
        cdef bint taken = tx.ready and self.take_packets(tx), given = False
        cdef uint32_t wanted = 1 << TX if taken and tx.wants_interrupt() else 0
        if rx.ready and self.reset_event == NO_EVENT and self.running():
            given = self.give_packets(rx)
            if given and rx.wants_interrupt():
                wanted |= 1 << RX
        if wanted:
            self.signal_queues(wanted)
        return taken or given

    cdef bint take_packets(self, Virtqueue queue) noexcept nogil:
        """Serve the transmit queue; whether anything was used."""
        cdef uint64_t end = now_ns() + TURN_NS
        cdef uint32_t served = 0
        cdef int found
        while not self.mux.full():
            found = queue.pop(&self.request)
            if found == QUEUE_EMPTY:
                break
            if found == QUEUE_BROKEN:
                self.fail()
                break
            self.take_packet(&self.request)
            queue.push(self.request.head, 0)
            queue.publish()
            served += 1
            if served == MAX_BATCH or served % 16 == 0 and now_ns() >= end:
                break
        return served != 0

    cdef void take_packet(self, chain *c) noexcept nogil:
        cdef virtio_vsock_hdr header
        cdef iovec *iov = c.iov
        cdef int count
        cdef size_t skip = HEADER, left
        if c.writable or copy_buffers(iov, c.readable, 0, &header, HEADER, False) != HEADER:
            self.tx_errors += 1
            return
        if header.len > c.readable_bytes - HEADER:
            self.tx_errors += 1
            self.mux.take_incomplete(&header)
            return
        while skip and skip >= iov.iov_len:
            skip -= iov.iov_len
            iov += 1
        iov.iov_base = <char *> iov.iov_base + skip
        iov.iov_len -= skip
        left, count = header.len, 0
        while left:
            iov[count].iov_len = min(iov[count].iov_len, left)
            left -= iov[count].iov_len
            count += 1
        self.mux.take(&header, iov, count)

    cdef bint give_packets(self, Virtqueue queue) noexcept nogil:
        """Fill receive buffers; whether any was used."""
        cdef uint64_t end = now_ns() + TURN_NS
        cdef uint32_t served = 0
        cdef connection *c
        cdef virtio_vsock_hdr header
        cdef int found
        while self.mux.pending():
            found = self.buffers.gather(queue, 0)
            if found == QUEUE_BROKEN:
                self.fail()
                break
            if found == QUEUE_EMPTY:
                break
            if not self.buffers.usable():
                self.buffers.give_back(queue)
                served += 1
            else:
                found = self.mux.next_packet(&c, &header)
                if found == NOTHING:
                    queue.next_avail -= 1
                    break
                if found == DATA:
                    served += self.buffers.read_into(queue, self.mux, c)
                else:
                    self.buffers.put(queue, &header)
                    self.mux.rx_packets += 1
                    served += 1
            queue.publish()
            if served >= MAX_BATCH or now_ns() >= end:
                break
        return served != 0

    # -- the reset event -----------------------------------------------------------------------------------------

    cdef void serve_events(self, Virtqueue queue) noexcept nogil:
        """Tell a restored guest that its connections are gone; what the driver does then says that it knows (5.10.6.7)."""
        cdef uint32_t event = VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
        cdef chain *c = &self.request
        cdef int found = QUEUE_EMPTY
        if self.reset_event == TO_SEND:
            self.reset_event = NO_EVENT
            if queue.ready:
                found = queue.pop(c)
            if found == QUEUE_BROKEN:
                self.fail()
            if found != QUEUE_CHAIN:
                # It cannot be told; the resets that its packets are answered with tell it too.
                self.event_fails += 1
                return
            queue.push(c.head, <uint32_t> copy_buffers(
                &c.iov[c.readable], c.writable, 0, &event, sizeof(event), True))
            if c.writable:
                self.memory.mark_dirty(c.gpa[c.readable], sizeof(event))
            # Notified of the next buffer, however many of these it has given already.
            self.event_avail = queue.avail[1]
            queue.used[2 + 4 * queue.size] = self.event_avail
            full_barrier()
            self.reset_event = SENT
            queue.publish()
            self.signal_queue(EVENT)
        if self.reset_event == SENT and queue.avail[1] != self.event_avail:
            self.reset_event = NO_EVENT

    # -- control -------------------------------------------------------------------------------------------------

    def counters(self):
        """As Firecracker's."""
        cdef Multiplexer mux = self.mux
        cdef HostSockets host = self.host
        return {
            "activate_fails": self.activate_fails,
            "cfg_fails": self.cfg_fails,
            "rx_queue_event_fails": self.buffers.errors,
            "tx_queue_event_fails": self.tx_errors,
            "ev_queue_event_fails": self.event_fails,
            "muxer_event_fails": host.muxer_fails,
            "conn_event_fails": host.event_fails,
            "rx_queue_event_count": self.rx_events,
            "tx_queue_event_count": self.tx_events,
            "rx_bytes_count": mux.rx_bytes,
            "tx_bytes_count": host.tx_bytes,
            "rx_packets_count": mux.rx_packets,
            "tx_packets_count": mux.tx_packets,
            "conns_added": self.streams.added,
            "conns_killed": self.streams.killed,
            "conns_removed": self.streams.removed,
            "tx_flush_fails": host.flush_fails,
            "tx_write_fails": host.write_fails,
            "rx_read_fails": mux.read_fails,
        }

    def save_own(self):
        """VsockState. Connections are not saved: a restored guest is told that they are gone."""
        return VsockState(cid=self.mux.cid, uds_path=self.listener.path, last_port=self.host.last_port)

    def restore_own(self, state):
        """The reverse; the constructor was given the state's values, or another path."""
        if state.cid != self.mux.cid:
            raise ValueError(f"a saved vsock device of guest {state.cid}, this one is of {self.mux.cid}")
        self.host.last_port = state.last_port
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.mux.reset()
            if self.running():
                self.reset_event = TO_SEND
                self.host.start()
            pthread_mutex_unlock(&self.lock)


cdef void host_ready(void *context, uint32_t events) noexcept nogil:
    (<Vsock> context).host_events()
