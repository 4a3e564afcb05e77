"""A network interface whose TAP is a socket: frames from both sides, and a wire to a metadata service beside it."""

from __future__ import annotations

import os
import socket
import struct

from crackle.virtio.net.device import Net
from support.driver import F_VERSION_1, Buffer
from targets.choices import Choices
from targets.device import DATA, END, HEADERS, DeviceTarget, Station, reap

RX, TX = 0, 1
MAC, OTHER = bytes.fromhex("06000000000a"), bytes.fromhex("06000000000b")
SERVICE = bytes((169, 254, 169, 254))
CSUM, GUEST_CSUM, MAC_F, GUEST_TSO4, GUEST_TSO6, GUEST_UFO, MRG = 0, 1, 5, 7, 8, 10, 15
VNET = 12
SIZE_LIMIT = 1 << 17


def bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


class Interface(DeviceTarget):
    """Receiving with and without merged buffers, transmitting, the detour to the metadata service."""

    kinds = 4
    features = (
        0,
        bits(MRG),
        bits(MRG, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6),
        bits(GUEST_CSUM, GUEST_TSO4, CSUM),
    )

    def __init__(self) -> None:
        super().__init__()
        self.host: dict[object, list[socket.socket]] = {}

    def make(self, kind: int) -> Net:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        for pair in pairs:
            for end in pair:
                end.setblocking(False)
        device = Net(
            self.memory,
            pairs[0][1].detach(),
            mac=MAC if kind & 1 else None,
            mtu=1500 if kind & 1 else None,
            drop_spoofed=bool(kind & 1),
        )
        if kind & 2:
            device.detour(os.dup(pairs[1][1].fileno()), SERVICE)
        self.host[device] = [pairs[0][0], *pairs[1]]
        return device

    def frame(self, choices: Choices) -> bytes:
        """An Ethernet frame, often for the metadata service."""
        kind = choices.byte()
        source = OTHER if kind & 8 else MAC
        if kind & 3 == 0:
            body = struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, source, bytes(4), bytes(6), SERVICE)
            frame = bytes(6) + source + b"\x08\x06" + body
        else:
            target = SERVICE if kind & 3 == 1 else bytes((10, 0, 0, 1))
            size = choices.of((0, 1, 20, 64, 600, 1480, 9000, 60000))
            header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + size, 0, 0, 1, 6, 0, bytes(4), target)
            frame = OTHER + source + b"\x08\x00" + header + bytes(size)
        if kind & 0x10:
            frame = frame[: choices.below(64)]
        if kind & 0x20:
            frame += choices.bytes(choices.below(256))
        return frame

    def vnet(self, choices: Choices) -> bytes:
        if choices.byte() < 0xA0:
            return bytes(VNET)
        return choices.bytes(VNET).ljust(VNET, b"\0")

    def chain(self, choices: Choices, queue: int) -> list[Buffer]:
        if queue == TX:
            return self.cut(choices, self.vnet(choices) + self.frame(choices))
        buffers = []
        for _ in range(1 + choices.below(5)):
            size = choices.nearly(
                choices.of((1526, 4096, 2048, 12, 1, 7, 13, 64, 16384, 65562 // 5 + 1)), (0, 1, 11)
            )
            size %= SIZE_LIMIT
            buffers.append(Buffer(self.somewhere(choices, 64, size), size, not choices.rarely()))
        return buffers

    def cut(self, choices: Choices, message: bytes) -> list[Buffer]:
        """The message in memory, in one buffer or several; what is long repeats itself."""
        place = DATA + choices.below(128) * 64
        part = message[: END - place]
        self.memory.write(place, part)
        buffers, at = [], 0
        for _ in range(choices.below(4)):
            size = min(choices.of((12, 14, 1, 10, 26, 42, 64, 500)), len(part) - at)
            buffers.append(Buffer(place + at, size, choices.rarely()))
            at += size
        return [*buffers, Buffer(place + at, max(0, choices.nearly(len(part) - at)) % SIZE_LIMIT)]

    def outside(self, choices: Choices, station: Station) -> None:
        """Frames arrive on the TAP or on the wire, or what the guest has sent is read."""
        tap, wire = self.host[station.device][:2]
        what = choices.byte() % 8
        if what < 5:
            for _ in range(1 + choices.below(3)):
                message = self.vnet(choices) + self.frame(choices)
                self.send(wire if what == 4 else tap, message[: choices.nearly(len(message))])
        elif what == 5:
            self.send(tap, choices.bytes(choices.below(32)))
        else:
            self.drain(station)

    def send(self, end: socket.socket, message: bytes) -> bool:
        """Whether there was room for it."""
        try:
            end.send(message)
        except BlockingIOError:
            return False
        return True

    def drain(self, station: Station) -> list[bytes]:
        """What has come out on the host's side."""
        found = []
        for end in self.host[station.device][:2]:
            while True:
                try:
                    found.append(end.recv(1 << 17))
                except BlockingIOError:
                    break
        return found

    def prelude(self, stage: int, station: Station) -> None:
        """Receive buffers: large ones, small ones at the end of memory, or both."""
        rx = station.rings[RX]
        if stage & 1:
            rx.offer(*[rx.add([Buffer(DATA, 0x9000, True)]) for _ in range(min(4, len(rx.free)))])
        if stage & 2 and len(rx.free) >= 3:
            rx.offer(rx.add([Buffer(END - size, size, True) for size in (7, 64, 0x9000)]))
        station.notify(RX)

    def prove_alive(self, station: Station) -> None:
        self.drain(station)
        station.start(F_VERSION_1 | bits(MRG), 16)
        rx, tx = station.rings
        mark = bytes(VNET) + OTHER + MAC + b"\x88\xb5" + b"alive" * 10
        self.memory.write(HEADERS, mark)
        tx.offer(tx.add([Buffer(HEADERS, len(mark))]))
        station.notify(TX)
        station.await_used(tx)
        assert mark in self.drain(station)
        # What has waited in the TAP since before comes first.
        sent = False
        for _ in range(500):
            while len(rx.chains) < 4:
                rx.offer(rx.add([Buffer(DATA, END - DATA, True)]))
            station.notify(RX)
            station.settle(64)
            reap(rx)
            if sent and self.memory.read(DATA + VNET, len(mark) - VNET) == mark[VNET:]:
                return
            sent = sent or self.send(self.host[station.device][0], mark)
        raise AssertionError("the frame has not arrived")
