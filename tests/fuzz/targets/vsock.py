"""Streams between a guest and host programs, both of which misbehave."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import tempfile

from crackle.virtio.vsock.device import Vsock
from support.driver import F_VERSION_1, Buffer
from targets.block import in_memory
from targets.choices import Choices
from targets.device import DATA, END, GPA, HEADERS, DeviceTarget, Station, reap

RX, TX, EVENT = 0, 1, 2
HOST, CID = 2, 3
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
HEADER = struct.Struct("<QQIIIHHIII")
PORTS = (52, 53, 54)
"""Of the host; nobody listens on the last."""
MOST = 32
"""Sockets that the host holds."""


class Streams(DeviceTarget):
    """Packets of a guest, connections of the host's, data and ends in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.home = tempfile.TemporaryDirectory(prefix="crackle-fuzz-", dir=in_memory())
        self.path = os.path.join(self.home.name, "v")
        self.listeners = []
        for port in PORTS[:2]:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{self.path}_{port}")
            # A second that is not accepted yet has to wait.
            listener.listen(1 if port == 53 else 64)
            listener.setblocking(False)
            self.listeners.append(listener)
        self.ends: list[socket.socket] = []
        self.seen: list[tuple[int, int]] = []

    def make(self, kind: int) -> Vsock:
        return Vsock(self.memory, CID, self.path)

    def begin(self, kind: int, station: Station) -> None:
        self.seen = []
        self.hang_up()

    def hang_up(self) -> None:
        for end in self.ends:
            end.close()
        self.ends = []
        while self.accept():
            self.ends.pop().close()

    def recover(self, station: Station) -> None:
        # A reset ends all connections; what the host still has is the host's.
        super().recover(station)
        self.hang_up()
        assert station.device.connections == 0

    # -- the guest -----------------------------------------------------------------------------------------------

    def chain(self, choices: Choices, queue: int) -> list[Buffer]:
        if queue != TX:
            size = choices.nearly(choices.of((44, 64, 256, 1024, 4096)), (0, 1, 4, 8, 43, 45)) % 0x5000
            gpa = self.somewhere(choices, 64, size)
            cut = choices.of((0, 0, 0, 1, 44, 43, 45, 30))
            if not cut or cut >= size:
                return [Buffer(gpa, size, not choices.rarely())]
            return [Buffer(gpa, cut, True), Buffer((gpa + cut) % (1 << 64), size - cut, True)]
        return self.packet(choices)

    def packet(self, choices: Choices) -> list[Buffer]:
        op = choices.of((REQUEST, RESPONSE, RST, SHUTDOWN, RW, RW, CREDIT_UPDATE, CREDIT_REQUEST))
        if op == RESPONSE and self.seen:
            # To a host program that has asked for a port of the guest's.
            dst, src = self.seen[choices.byte() % len(self.seen)]
        else:
            src, dst = 1024 + choices.below(4), choices.of(PORTS)
            if self.seen and choices.byte() & 1:
                dst, src = self.seen[choices.byte() % len(self.seen)]
        size = (
            choices.nearly(choices.of((0, 1, 100, 4000, 0x9000)), (1 << 16, 70000)) % (1 << 20)
            if op == RW
            else 0
        )
        header = HEADER.pack(
            choices.nearly(CID) % (1 << 64),
            choices.nearly(HOST) % (1 << 64),
            src,
            choices.nearly(dst) % (1 << 32),
            choices.nearly(size) % (1 << 32),
            choices.nearly(1) & 0xFFFF,
            choices.nearly(op) & 0xFFFF,
            choices.of((3, 1, 2, 0, 3, 0xFFFFFFFF)) if op == SHUTDOWN else 0,
            choices.nearly(choices.of((1 << 18, 4096, 64, 0))) % (1 << 32),
            choices.nearly(0) % (1 << 32),
        )
        gpa = self.put(header)
        buffers = [Buffer(gpa, choices.nearly(44, range(64)) % 256)]
        while size > 0:
            part = min(size, choices.of((0xA000, 0xA000, 1, 512, 3000)))
            buffers.append(Buffer(max(DATA, END - part - choices.below(64)), part, choices.rarely()))
            size -= part
            if len(buffers) > 6:
                break
        return buffers

    def look(self, station: Station) -> None:
        """What ports the host's programs have, from what the guest has been given."""
        ring = station.rings[RX]
        for head, chain in list(ring.chains.items())[:16]:
            if not chain or head >= ring.size:
                continue
            gpa, size, _, _ = struct.unpack("<QIHH", self.memory.read(ring.desc + 16 * chain[0], 16))
            if GPA <= gpa <= END - 44 and size >= 44:
                fields = HEADER.unpack(self.memory.read(gpa, 44))
                if fields[0] == HOST and (fields[2], fields[3]) not in self.seen:
                    self.seen = [*self.seen[-7:], (fields[2], fields[3])]

    # -- the host ------------------------------------------------------------------------------------------------

    def accept(self) -> bool:
        for listener in self.listeners:
            try:
                end, _ = listener.accept()
            except BlockingIOError:
                continue
            end.setblocking(False)
            self.ends.append(end)
            return True
        return False

    def outside(self, choices: Choices, station: Station) -> None:
        what = choices.byte() % 9
        if what == 8:
            # The process has no descriptors left, for once.
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            station.settle(2)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        elif what == 0 and len(self.ends) < MOST:
            end = socket.socket(socket.AF_UNIX)
            end.setblocking(False)
            self.ends.append(end)
            try:
                end.connect(self.path)
            except BlockingIOError:
                return
            greeting = b"CONNECT %d\n" % choices.nearly(52)
            self.send(end, greeting[: choices.nearly(len(greeting))])
            if choices.byte() & 1:
                self.send(end, bytes(choices.below(256) * 64))
        elif what == 1 and len(self.ends) < MOST:
            self.accept()
        elif what == 7:
            self.look(station)
        elif self.ends:
            self.use(choices, what, self.ends[choices.byte() % len(self.ends)])

    def use(self, choices: Choices, what: int, end: socket.socket) -> None:
        if what in (2, 3):
            self.send(end, choices.bytes(choices.below(32)) or bytes(choices.of((1, 4096, 70000, 300000))))
        elif what == 4:
            with contextlib.suppress(OSError):
                end.recv(choices.of((1 << 20, 1, 4096)))
        elif what == 5:
            with contextlib.suppress(OSError):
                end.shutdown(choices.of((socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR)))
        else:
            self.ends.remove(end)
            end.close()

    def send(self, end: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):
            end.send(data)

    def prelude(self, stage: int, station: Station) -> None:
        """Receive buffers; a connection of the guest's that the host has accepted; more than its program has read."""
        rx = station.rings[RX]
        if stage & 1:
            rx.offer(*[rx.add([Buffer(DATA + 0x800 * n, 0x800, True)]) for n in range(min(8, len(rx.free)))])
            station.notify(RX)
        if stage & 2:
            self.say(station, REQUEST, 1024)
            self.accept()
        if stage == 3:
            for _ in range(6):
                self.say(station, RW, 1024, size=END - DATA)

    def say(self, station: Station, op: int, port: int, data: bytes = b"", size: int = 0) -> None:
        """A packet of a driver in order: with `data`, or `size` bytes of whatever is in memory."""
        tx = station.rings[TX]
        header = HEADER.pack(CID, HOST, port, PORTS[0], len(data) + size, 1, op, 0, 1 << 18, 0)
        buffers = [Buffer(self.put(header + data), 44 + len(data))]
        if size:
            buffers.append(Buffer(DATA, size))
        if len(tx.free) < 2:
            return
        tx.offer(tx.add(buffers))
        station.notify(TX)
        station.settle()
        reap(tx)

    def has_arrived(self, op: int, data: bytes) -> bool:
        """Whether one of the buffers of `prove_alive` has this packet for port 2000."""
        for n in range(16):
            packet = self.memory.read(DATA + 0x400 * n, 44 + len(data))
            fields = HEADER.unpack(packet[:44])
            if (fields[3], fields[6], packet[44:]) == (2000, op, data):
                return True
        return False

    def prove_alive(self, station: Station) -> None:
        """A connection is made, and what each side says arrives."""
        self.free = HEADERS
        self.hang_up()
        station.start(F_VERSION_1, 16)
        station.settle()
        while station.device.connections:
            # Of host programs that connected while no guest was there; they could fill every buffer below.
            station.start(F_VERSION_1, 16)
            station.settle()
        rx, tx = station.rings[RX], station.rings[TX]
        rx.offer(*[rx.add([Buffer(DATA + 0x400 * n, 0x400, True)]) for n in range(16)])
        station.notify(RX)
        self.say(station, REQUEST, 2000)
        self.say(station, RW, 2000, b"alive")
        station.await_that(lambda: self.has_arrived(RESPONSE, b""))
        assert self.accept()
        assert self.ends[-1].recv(100) == b"alive"
        self.ends[-1].send(b"and well")
        station.await_that(lambda: self.has_arrived(RW, b"and well"))
        reap(tx)
        assert not tx.chains
