"""A guest's vsock driver: packets through the three queues, and what arrives, without a program behind it."""

from __future__ import annotations

import itertools
import struct
import time
from typing import NamedTuple

from crackle.memory import GuestMemory
from crackle.runtime.iothread import IoThread
from crackle.virtio.vsock.device import Vsock
from support import driver
from support.driver import F_EVENT_IDX, F_INDIRECT, F_VERSION_1, Bench, Buffer

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
STREAM = 1
SHUT_RCV, SHUT_SEND, SHUT_BOTH = 1, 2, 3
HOST, CID = 2, 3
HEADER = struct.Struct("<QQIIIHHIII")
RX, TX, EVENT = 0, 1, 2
FEATURES = F_VERSION_1 | F_INDIRECT | F_EVENT_IDX
QUEUE = 256
RINGS, RX_BUFFERS, TX_BUFFERS = 0x1000, 0x100000, 0x2000000
MEMORY = 64 << 20


class Packet(NamedTuple):
    """What is in a header (5.10.6), and the data after it."""

    src_cid: int = CID
    dst_cid: int = HOST
    src_port: int = 0
    dst_port: int = 0
    len: int = 0
    type: int = STREAM
    op: int = 0
    flags: int = 0
    buf_alloc: int = 256 << 10
    fwd_cnt: int = 0
    data: bytes = b""

    def encode(self) -> bytes:
        return HEADER.pack(*self[:-1]) + self.data


def decode(message: bytes) -> Packet:
    return Packet(*HEADER.unpack(message[:44]), message[44:])


class Guest(Bench):
    """A device at `path` and its driver, with `buffers` receive buffers of `size` bytes each."""

    def __init__(
        self,
        path: str,
        *,
        buffers: int = 64,
        size: int = 4096,
        features: int = FEATURES,
        cid: int = CID,
        events: int = 8,
        io: IoThread | None = None,
    ) -> None:
        super().__init__(Vsock(GuestMemory([(0, MEMORY)]), cid, path), io)
        *rings, end = (RINGS + n * driver.ring_bytes(QUEUE) for n in range(4))
        self.rings = self.begin_queues(rings, QUEUE, features, drive=False)
        self.rx, self.tx, self.events = self.rings
        self.size = size
        self.places: dict[int, int] = {}
        self.event_places: dict[int, int] = {}
        self.inbox: list[Packet] = []
        self.next_place = 0
        self.give(*(RX_BUFFERS + n * size for n in range(buffers)))
        for n in range(events):
            gpa = end + 8 * n
            head = self.events.add([Buffer(gpa, 4, True)])
            self.event_places[head] = gpa
            self.events.offer(head)
        self.registers.drive()
        self.settle()

    @property
    def vsock(self) -> Vsock:
        assert isinstance(self.device, Vsock)
        return self.device

    def give(self, *places: int) -> None:
        """Make receive buffers at these addresses available."""
        for gpa in places:
            head = self.rx.add([Buffer(gpa, self.size, True)])
            self.places[head] = gpa
            self.rx.offer(head)
        self.notify(RX)

    def post(self, packet: Packet, *cuts: int) -> None:
        """Send a packet, cut into several buffers at `cuts`, without waiting for what comes of it."""
        message = packet.encode()
        gpa = TX_BUFFERS + self.next_place
        self.next_place = (self.next_place + len(message) + 64) % (16 << 20)
        self.memory.write(gpa, message)
        edges = [0, *cuts, len(message)]
        buffers = [Buffer(gpa + a, b - a) for a, b in itertools.pairwise(edges)]
        if not len(self.tx.free) >= len(buffers):
            self.tx.reap()
        self.tx.offer(self.tx.add(buffers))
        self.notify(TX)

    def send(self, op: int, src: int, dst: int, data: bytes = b"", **fields: int) -> None:
        """Send a packet of an operation from the guest's port `src` to the host's port `dst`."""
        fields = {"len": len(data), **fields}
        self.post(Packet(op=op, src_port=src, dst_port=dst, data=data, **fields))  # type: ignore[arg-type]
        self.settle()
        self.tx.reap()

    def collect(self, *, refill: bool = True) -> list[Packet]:
        """The packets that have arrived since the last call."""
        self.settle()
        found = []
        for head, written in self.rx.reap():
            gpa = self.places.pop(head)
            if written:
                found.append(decode(self.memory.read(gpa, written)))
            if refill:
                self.give(gpa)
        return found

    def packet(self, op: int | None = None, within: float = 5) -> Packet:
        """The next packet; it must be of operation `op`."""
        end = time.monotonic() + within
        while not self.inbox:
            self.inbox = self.collect()
            if not self.inbox:
                assert time.monotonic() < end, "no packet came"
                time.sleep(0.001)
        packet = self.inbox.pop(0)
        assert op in (None, packet.op), packet
        return packet

    def quiet(self) -> bool:
        """Whether nothing has arrived."""
        self.inbox += self.collect()
        return not self.inbox
