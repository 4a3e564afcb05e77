"""virtio-net (virtio 1.2, section 5.1): an Ethernet interface on a TAP of the host.

Queue 0 receives, queue 1 transmits; both are served on the I/O thread, by `readv` straight into the guest's buffers, a
window of which is taken ahead (`net.window`), and `writev` straight out of them. Owns the TAP's descriptor and, where
there is a metadata service, the device's end of the wire to it: a socket of frames beside the TAP.
"""

from libc.errno cimport EAGAIN, EINTR, ENOTTY, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset
from posix.unistd cimport close, write

from crackle.runtime.iothread cimport IoThread
from crackle.includes.events cimport EPOLLET, EPOLLIN
from crackle.includes.io cimport iovec, readv, writev
from crackle.includes.net cimport *
from crackle.runtime.threads cimport *
from crackle.memory.guest cimport GuestMemory
from crackle.ratelimit.limiter cimport RateLimiter
from crackle.virtio.device cimport TURN_NS, VirtioDevice
from crackle.virtio.latency cimport note_latency
from crackle.virtio.lookout cimport begin_turn, in_vain
from crackle.virtio.net.window cimport HEADER, MAX_FRAME, QUEUE_SIZE, ReceiveWindow
from crackle.virtio.queue cimport QUEUE_BROKEN, QUEUE_EMPTY, Virtqueue, chain, copy_buffers

import msgspec

from crackle.errors import ConfigError
from crackle.ratelimit.state import LimiterState


cdef enum:
    ETHERNET = 14               # two addresses and a type
    # What a driver without large frames provides, with its header (5.1.6.3.1).
    PLAIN_FRAME = 1526
    ETHERTYPE_IPV4 = 0x0800
    ETHERTYPE_ARP = 0x0806
    # Used chains are shown to the driver in groups: a polling driver shares the cache line with this thread.
    RX_GROUP = 32
    TX_GROUP = 16
    # Frames in a turn: neither direction keeps the I/O thread from the other.
    MAX_BATCH = QUEUE_SIZE

cdef uint64_t GSO_IN = (
    <uint64_t> 1 << VIRTIO_NET_F_GUEST_TSO4 | <uint64_t> 1 << VIRTIO_NET_F_GUEST_TSO6
    | <uint64_t> 1 << VIRTIO_NET_F_GUEST_UFO
    | <uint64_t> 1 << VIRTIO_NET_F_GUEST_USO4 | <uint64_t> 1 << VIRTIO_NET_F_GUEST_USO6
)
cdef uint64_t USO_IN = <uint64_t> 1 << VIRTIO_NET_F_GUEST_USO4 | <uint64_t> 1 << VIRTIO_NET_F_GUEST_USO6
cdef uint64_t OFFERED = (
    GSO_IN & ~USO_IN | <uint64_t> 1 << VIRTIO_NET_F_GUEST_CSUM | <uint64_t> 1 << VIRTIO_NET_F_CSUM
    | <uint64_t> 1 << VIRTIO_NET_F_HOST_TSO4 | <uint64_t> 1 << VIRTIO_NET_F_HOST_TSO6
    | <uint64_t> 1 << VIRTIO_NET_F_HOST_UFO | <uint64_t> 1 << VIRTIO_NET_F_MRG_RXBUF
)
cdef uint64_t OFFERED_USO = USO_IN | <uint64_t> 1 << VIRTIO_NET_F_HOST_USO
MTU_RANGE = (68, 65535)
# 5.1.3.1: segments are cut, or put together, only where checksums are left to the other side.
NEEDS = (
    *((feature, (VIRTIO_NET_F_GUEST_CSUM,)) for feature in (
        VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
        VIRTIO_NET_F_GUEST_USO6,
    )),
    *((feature, (VIRTIO_NET_F_CSUM,)) for feature in (
        VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO,
    )),
)


cdef unsigned int offload_flags(uint64_t features) noexcept nogil:
    """What TUNSETOFFLOAD allows the host to send to a driver with these features."""
    cdef unsigned int flags = 0
    if features >> VIRTIO_NET_F_GUEST_CSUM & 1:
        flags |= TUN_F_CSUM
    if features >> VIRTIO_NET_F_GUEST_TSO4 & 1:
        flags |= TUN_F_TSO4
    if features >> VIRTIO_NET_F_GUEST_TSO6 & 1:
        flags |= TUN_F_TSO6
    if features >> VIRTIO_NET_F_GUEST_UFO & 1:
        flags |= TUN_F_UFO
    # The kernel has both or neither.
    if features & USO_IN == USO_IN:
        flags |= TUN_F_USO4 | TUN_F_USO6
    return flags


class NetState(msgspec.Struct, frozen=True, kw_only=True, tag="net"):
    """What a network interface adds to its DeviceState: what its configuration space says, and its limiters."""

    mac: bytes | None
    mtu: int | None
    rx_limiter: LimiterState
    tx_limiter: LimiterState


cdef class Net(VirtioDevice):
    """A network interface on `tap_fd`, from `crackle.virtio.net.tap.open_tap`; the device closes it.

    Any descriptor that passes whole frames with a `struct virtio_net_hdr_v1` before them will do, not blocking.
    mac: the guest's address, 6 bytes; None lets the guest choose. mtu: what the guest is told, 68 to 65535; None for nothing.
    rx_limiter, tx_limiter: `crackle.schema.rate_limiter.RateLimiter`, of frames and their bytes; None does not limit.
    drop_spoofed: frames that the guest sends from another address than `mac` are dropped, not only counted.
    Raises ConfigError.
    """

    own_state = NetState

    def __cinit__(self, GuestMemory memory not None, *args, **kwargs):
        self.tap_fd = self.wire_fd = -1
        self.window = ReceiveWindow(memory)

    def __init__(
        self, GuestMemory memory, int tap_fd, *, bytes mac=None, mtu=None, rx_limiter=None, tx_limiter=None,
        bint drop_spoofed=False,
    ):
        cdef uint64_t features = OFFERED
        cdef virtio_net_config config
        memset(&config, 0, sizeof(config))
        if mac is not None:
            if len(mac) != sizeof(self.own_mac):
                raise ConfigError(f"a MAC address has 6 bytes, not {len(mac)}")
            memcpy(self.own_mac, <const char *> mac, sizeof(self.own_mac))
            memcpy(config.mac, self.own_mac, sizeof(self.own_mac))
            self.has_mac = True
            features |= <uint64_t> 1 << VIRTIO_NET_F_MAC
        elif drop_spoofed:
            raise ConfigError("frames from other addresses cannot be dropped without a guest_mac to compare with")
        if mtu is not None:
            if not MTU_RANGE[0] <= mtu <= MTU_RANGE[1]:
                raise ConfigError(f"MTU {mtu} is out of range [{MTU_RANGE[0]}, {MTU_RANGE[1]}]")
            config.mtu = mtu
            features |= <uint64_t> 1 << VIRTIO_NET_F_MTU
        # Ask, because only the running kernel knows: Linux 6.2 and newer segment UDP.
        if ioctl(tap_fd, TUNSETOFFLOAD, <unsigned long> offload_flags(GSO_IN | OFFERED)) == 0:
            features |= OFFERED_USO
        self.rx_limiter, self.tx_limiter = RateLimiter(rx_limiter), RateLimiter(tx_limiter)
        self.set_up(VIRTIO_ID_NET, features, (QUEUE_SIZE, QUEUE_SIZE), NEEDS)
        self.add_limiter(self.rx_limiter, RX)
        self.add_limiter(self.tx_limiter, TX)
        self.config_size = sizeof(config)
        memcpy(self.config, &config, sizeof(config))
        self.mac, self.mtu, self.drop_spoofed = mac, mtu, drop_spoofed
        self.tap_fd = tap_fd

    def __dealloc__(self):
        if self.made:
            self.close_own()

    cdef void close_own(self) noexcept:
        if self.tap_fd >= 0:
            close(self.tap_fd)
            self.tap_fd = -1
        if self.wire_fd >= 0:
            close(self.wire_fd)
            self.wire_fd = -1

    def close(self):
        """Give the descriptors back; the I/O thread is stopped. Idempotent."""
        VirtioDevice.close(self)
        self.close_own()

    def detour(self, int wire_fd, bytes ipv4 not None):
        """Send frames for the address `ipv4` (4 bytes) to `wire_fd` instead of the TAP, and receive from both.

        The wire is one end of a SOCK_SEQPACKET pair, not blocking, that carries a `struct virtio_net_hdr_v1` and a frame
        in each message; the device closes it. To be called once, before the guest runs.
        """
        if len(ipv4) != sizeof(self.wire_ip):
            raise ValueError(f"an IPv4 address has 4 bytes, not {len(ipv4)}")
        memcpy(self.wire_ip, <const char *> ipv4, sizeof(self.wire_ip))
        self.wire_fd, self.has_wire = wire_fd, True
        if self.io is not None:
            self.watch_wire()

    cdef watch_wire(self):
        self.watch(self.wire_fd, EPOLLIN | EPOLLET, wire_readable, <void *> self)

    def attach(self, IoThread io not None):
        """Serve the queues, the TAP and the wire on `io`."""
        VirtioDevice.attach(self, io)
        # Told once of each arrival: while the guest has no room, what waits in the TAP wakes nobody.
        self.watch(self.tap_fd, EPOLLIN | EPOLLET, tap_ready, <void *> self)
        if self.has_wire:
            self.watch_wire()

    # -- the driver's life ---------------------------------------------------------------------------------------

    cdef bint on_activate(self) noexcept nogil:
        return self.tell_tap()

    cdef void on_reset(self) noexcept nogil:
        self.window.forget()
        self.deferred = 0

    cdef bint on_drain(self, uint64_t until) noexcept nogil:
        """Let go of the window, and give out what the limiter holds back."""
        if self.deferred:
            self.give(<Virtqueue> self.table[RX], self.deferred)
            self.show(<Virtqueue> self.table[RX], RX, True)
        self.window.put_back(<Virtqueue> self.table[RX])
        return True

    cdef bint tell_tap(self) noexcept nogil:
        """Let the host use the offloads that the driver has accepted, and know what buffers it provides."""
        cdef uint64_t features = self.driver_features
        if ioctl(self.tap_fd, TUNSETOFFLOAD, <unsigned long> offload_flags(features)) < 0 and errno != ENOTTY:
            return False
        self.window.negotiated(
            features >> VIRTIO_NET_F_MRG_RXBUF & 1, MAX_FRAME if features & GSO_IN else PLAIN_FRAME)
        self.offloads = features
        return True

    cdef void notified(self, int index) noexcept nogil:
        if index == RX:
            self.rx_queue_events += 1
        else:
            self.tx_queue_events += 1
        VirtioDevice.notified(self, index)

    cdef void handle_queue(self, int index, Virtqueue queue) noexcept nogil:
        # After a restore nobody has told the TAP yet.
        if self.offloads != self.driver_features and not self.tell_tap():
            self.activate_fails += 1
            self.need_reset()
        elif not queue.ready:
            return
        elif index == RX:
            self.receive(queue)
        else:
            self.transmit(queue)

    cdef void arrived(self, bint on_wire) noexcept nogil:
        """Something can be read, from the TAP or from the wire."""
        pthread_mutex_lock(&self.lock)
        if on_wire:
            self.wire_ready = True
        else:
            self.tap_events += 1
        if self.running():
            self.handle_queue(RX, <Virtqueue> self.table[RX])
        pthread_mutex_unlock(&self.lock)

    cdef void show(self, Virtqueue queue, int index, bint last) noexcept nogil:
        """Let the driver see what was used, and tell it if it wants to know; `last`: before others have their turn."""
        if queue.show(last):
            self.signal_queue(index)

    # -- receiving (5.1.6.4) -------------------------------------------------------------------------------------

    cdef void receive(self, Virtqueue queue) noexcept nogil:
        cdef uint64_t begin, size
        cdef uint32_t frames = 0
        cdef ssize_t n
        cdef int found
        if self.rx_limiter.blocked:
            self.rx_throttled += 1
            return
        begin = now_ns()
        self.window.begin_turn()
        while True:
            size = self.deferred
            if not size:
                found = self.window.gather(queue)
                if found == QUEUE_BROKEN:
                    self.need_reset()
                    break
                if found == QUEUE_EMPTY:
                    self.no_rx_buffer += 1
                    if self.window.budget == 0 or not (self.window.full() or queue.rearm()):
                        # More has come meanwhile; but others have their turn first.
                        self.notify_again(RX)
                    break
                n = self.fetch()
                if n < 0:
                    break
                size = n
                if not self.window.whole(size):
                    size = 0
            if size:
                if not self.rx_limiter.consume(size, 1):
                    # It stays in the guest's buffers, untold: the limiter's timer comes back for it.
                    self.deferred = size
                    break
                self.give(queue, size)
            frames += 1
            if <uint16_t> (queue.next_used - queue.published) >= RX_GROUP:
                self.show(queue, RX, False)
            if frames == MAX_BATCH or (frames & 15 == 0 and now_ns() - begin >= TURN_NS):
                self.notify_again(RX)
                break
        self.show(queue, RX, True)

    cdef ssize_t fetch(self) noexcept nogil:
        """Read a frame into the window, from the wire if there is one; its length, or -1 when there is none."""
        cdef const iovec *iov = &self.window.iov[self.window.iov_first]
        cdef int count = self.window.entries()
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

    cdef void give(self, Virtqueue queue, uint64_t size) noexcept nogil:
        """The frame that the window begins with is the driver's."""
        self.window.fill(queue, size)
        self.deferred = 0
        self.rx_frames += 1
        self.rx_bytes += size

    # -- transmitting (5.1.6.2) ----------------------------------------------------------------------------------

    cdef void transmit(self, Virtqueue queue) noexcept nogil:
        cdef uint64_t begin, before
        cdef uint32_t served = 0
        cdef int found
        if self.tx_limiter.blocked:
            self.tx_throttled += 1
            return
        begin = before = now_ns()
        begin_turn(&self.looking, begin, self.io.spin_ns)
        while True:
            found = queue.pop(&self.outgoing)
            if found == QUEUE_BROKEN:
                self.need_reset()
                break
            if found == QUEUE_EMPTY:
                self.show(queue, TX, False)
                if not self.look_out(queue):
                    self.show(queue, TX, True)
                    if queue.rearm():
                        break
                before = now_ns()
                continue
            self.tx_remaining += <uint16_t> (queue.cached_avail - queue.next_avail)
            if not self.send(&self.outgoing, &before):
                # It stays in the ring: the limiter's timer comes back for it.
                queue.put_back(1)
                break
            queue.push(self.outgoing.head, 0)
            served += 1
            if served % TX_GROUP == 0:
                self.show(queue, TX, False)
            if served == MAX_BATCH or before - begin >= TURN_NS:
                self.notify_again(TX)
                break
        self.show(queue, TX, True)
        if not served:
            self.no_tx_buffer += 1

    cdef bint look_out(self, Virtqueue queue) noexcept nogil:
        """Whether another frame comes at once: to wait for it a little costs less than a notification and a sleep."""
        cdef uint64_t now = now_ns(), until = now + self.looking.patience_ns
        while now < until:
            if queue.has_more():
                return True
            now = now_ns()
        in_vain(&self.looking, now, until)
        return False

    cdef bint send(self, chain *c, uint64_t *clock) noexcept nogil:
        """Send or drop one frame; False when the limiter wants it to wait. `clock`: the time before it, and after."""
        cdef size_t size = c.readable_bytes, seen = 0, skip
        cdef const iovec *iov = c.iov
        cdef int count = c.readable, i
        cdef bint spoofed = False
        cdef uint64_t now
        cdef ssize_t n
        if c.writable:
            self.tx_fails += 1
            return True
        if size < HEADER or size > MAX_FRAME:
            self.tx_malformed += 1
            return True
        if self.has_mac or self.has_wire:
            seen = copy_buffers(iov, count, 0, self.head, HEAD, False)
            if self.has_wire and self.for_wire(seen):
                n = writev(self.wire_fd, iov, count)
                if n < 0:
                    self.wire_dropped += 1
                else:
                    self.wire_sent += 1
                return True
            spoofed = (
                self.has_mac and seen >= HEADER + ETHERNET
                and memcmp(&self.head[HEADER + 6], self.own_mac, sizeof(self.own_mac)) != 0
            )
        if spoofed and self.drop_spoofed:
            self.tx_spoofed += 1
            return True
        if not self.tx_limiter.consume(size, 1):
            return False
        self.tx_spoofed += spoofed
        if self.drop_spoofed or self.has_wire:
            # What was looked at is what is sent, whatever the guest has written there since.
            self.gathered[0].iov_base, self.gathered[0].iov_len = self.head, seen
            count, skip = 1, seen
            for i in range(c.readable):
                if skip >= c.iov[i].iov_len:
                    skip -= c.iov[i].iov_len
                    continue
                self.gathered[count].iov_base = <uint8_t *> c.iov[i].iov_base + skip
                self.gathered[count].iov_len = c.iov[i].iov_len - skip
                count, skip = count + 1, 0
            iov = self.gathered
        while True:
            # One buffer is the rule, and write() the cheaper call.
            n = write(self.tap_fd, iov.iov_base, iov.iov_len) if count == 1 else writev(self.tap_fd, iov, count)
            if n >= 0 or errno != EINTR:
                break
        now = now_ns()
        if n < 0:
            self.tap_write_fails += 1
        else:
            self.tx_frames += 1
            self.tx_bytes += size
        note_latency(&self.writes, (now - clock[0]) // 1000)
        clock[0] = now
        return True

    cdef bint for_wire(self, size_t size) noexcept nogil:
        """Whether the frame whose first `size` bytes are in `head` is for the service behind the wire.

        IPv4 to its address, and ARP requests for it (RFC 826: who has it).
        """
        cdef const uint8_t *frame = &self.head[HEADER]
        cdef uint32_t kind
        if size < HEADER + ETHERNET:
            return False
        size -= HEADER
        kind = <uint32_t> frame[12] << 8 | frame[13]
        if kind == ETHERTYPE_IPV4:
            return size >= ETHERNET + 20 and memcmp(&frame[ETHERNET + 16], self.wire_ip, 4) == 0
        return (
            kind == ETHERTYPE_ARP and size >= ETHERNET + 28 and frame[ETHERNET + 6] == 0 and frame[ETHERNET + 7] == 1
            and memcmp(&frame[ETHERNET + 24], self.wire_ip, 4) == 0
        )

    # -- what it tells -------------------------------------------------------------------------------------------

    @property
    def rx_fails(self):
        """Receive chains that were of no use, and frames that were none or were cut."""
        return self.window.unfit

    def counters(self):
        """Firecracker's metrics of a network device, since the start."""
        return {
            "activate_fails": self.activate_fails,
            "cfg_fails": self.cfg_fails,
            "no_rx_avail_buffer": self.no_rx_buffer,
            "no_tx_avail_buffer": self.no_tx_buffer,
            "event_fails": self.broken_queues + self.irq_fails,
            "rx_queue_event_count": self.rx_queue_events,
            "rx_event_rate_limiter_count": self.rx_limiter.events,
            "rx_rate_limiter_throttled": self.rx_limiter.throttled + self.rx_throttled,
            "rx_tap_event_count": self.tap_events,
            "rx_bytes_count": self.rx_bytes,
            "rx_packets_count": self.rx_frames,
            "rx_fails": self.rx_fails,
            "rx_count": self.rx_frames,
            "tap_read_fails": self.tap_read_fails,
            "tap_write_fails": self.tap_write_fails,
            "tap_write_agg": self.writes,
            "tx_bytes_count": self.tx_bytes,
            "tx_malformed_frames": self.tx_malformed,
            "tx_fails": self.tx_fails,
            "tx_count": self.tx_frames,
            "tx_packets_count": self.tx_frames,
            "tx_queue_event_count": self.tx_queue_events,
            "tx_rate_limiter_event_count": self.tx_limiter.events,
            "tx_rate_limiter_throttled": self.tx_limiter.throttled + self.tx_throttled,
            "tx_spoofed_mac_count": self.tx_spoofed,
            "tx_remaining_reqs_count": self.tx_remaining,
        }

    def save_own(self):
        """NetState. The machine is paused and drained."""
        return NetState(
            mac=self.mac, mtu=self.mtu, rx_limiter=self.rx_limiter.save(), tx_limiter=self.tx_limiter.save())

    def restore_own(self, state):
        """The reverse of `save_own`; ValueError when the state is not this device's."""
        if (state.mac, state.mtu) != (self.mac, self.mtu):
            raise ValueError(f"saved address and MTU {state.mac}, {state.mtu} are not {self.mac}, {self.mtu}")
        self.rx_limiter.restore(state.rx_limiter)
        self.tx_limiter.restore(state.tx_limiter)


cdef void tap_ready(void *context, uint32_t events) noexcept nogil:
    (<Net> context).arrived(False)


cdef void wire_readable(void *context, uint32_t events) noexcept nogil:
    (<Net> context).arrived(True)
