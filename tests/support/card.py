"""A virtio-net device with its driver and, on the other side of its TAP, the host."""

from __future__ import annotations

import itertools
import random
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from crackle.memory import GuestMemory
from crackle.virtio.net.device import Net
from crackle.virtio.net.tap import open_tap
from support.driver import F_INDIRECT, F_VERSION_1, Bench, Buffer
from support.network import Namespace

RX, TX = 0, 1
HEADER = 12
MAX_FRAME = 65562
RX_RING, TX_RING, TABLES, ARENA = 0x1000, 0x5000, 0x10000, 0x100000
LOW, HIGH = 8 << 20, 1 << 32
MAC = bytes.fromhex("06f00d0000a1")
PEER = bytes.fromhex("06f00d0000b2")
ETHERTYPE = 0x88B5  # for local experiments (IEEE 802)
F_MRG = 1 << 15
MERGE = F_VERSION_1 | F_INDIRECT | F_MRG

NEEDS_CSUM, GSO_TCPV4, GSO_UDP_L4 = 1, 1, 5  # virtio 1.2, 5.1.6

_ETH_P_ALL = 3
_PACKET_VNET_HDR = 15  # <linux/if_packet.h>
_SOL_PACKET = 263


def frame(size: int, *, source: bytes = MAC, target: bytes = PEER, seed: int = 0) -> bytes:
    """An Ethernet frame of `size` bytes of a protocol that nobody speaks."""
    payload = random.Random(seed or size).randbytes(max(size - 14, 0))
    return (target + source + struct.pack(">H", ETHERTYPE) + payload)[:size]


class Card(Bench):
    """An interface on a descriptor that carries frames, with a driver that has set up both queues."""

    def __init__(self, fd: int, features: int = MERGE, size: int = 256, **options: Any) -> None:
        super().__init__(Net(GuestMemory([(0, LOW), (HIGH, LOW)]), fd, **options))
        self.device: Net
        self.begin_both(features, size)

    def begin_both(self, features: int, size: int = 256) -> None:
        """The whole initialisation with both queues."""
        self.rx, self.tx = self.begin_queues((RX_RING, TX_RING), size, features)
        self.buffers: dict[int, list[Buffer]] = {}
        self.place = ARENA
        self.table = TABLES

    def room(self, sizes: Sequence[int], *, gap: int = 5) -> list[Buffer]:
        """Device-writable buffers of these sizes, in low and high memory in turn."""
        found = []
        for n, size in enumerate(sizes):
            found.append(Buffer(self.place + (HIGH if n % 2 else 0), size, True))
            self.place += size + gap
        assert self.place < LOW
        return found

    def provide(self, *chains: Sequence[int], direct: int | None = None) -> None:
        """Give the device receive chains with buffers of these sizes."""
        heads = []
        for sizes in chains:
            buffers = self.room(sizes)
            head = self.rx.add(buffers, direct=direct, table=self.table)
            if direct is not None:
                self.table += 16 * len(buffers)
            self.buffers[head] = buffers
            heads.append(head)
        self.rx.offer(*heads)
        self.notify(RX)

    def received(self) -> list[tuple[bytes, bytes]]:
        """(header, frame) of everything received since the last call, checked against the rules of merging."""
        frames = []
        used = iter(self.rx.reap())
        for head, written in used:
            data = self._take(head, written)
            count = struct.unpack_from("<H", data, 10)[0]
            assert count >= 1
            for head, written in itertools.islice(used, count - 1):
                data += self._take(head, written)
            frames.append((data[:HEADER], data[HEADER:]))
        return frames

    def _take(self, head: int, written: int) -> bytes:
        data = b"".join(self.memory.read(gpa, size) for gpa, size, _ in self.buffers.pop(head))
        assert 0 < written <= len(data)
        return data[:written]

    def wait_received(self, count: int, seconds: float = 10.0) -> list[tuple[bytes, bytes]]:
        deadline = time.monotonic() + seconds
        frames: list[tuple[bytes, bytes]] = []
        while len(frames) < count:
            assert time.monotonic() < deadline, f"{len(frames)} frames of {count}"
            frames += self.received()
            time.sleep(0.001)
        return frames

    def send(self, *messages: bytes, cuts: Sequence[int] = (HEADER,), direct: int | None = None) -> None:
        """Transmit, each with its header, in buffers cut at `cuts`."""
        heads = []
        for message in messages:
            edges = [0, *sorted(min(cut, len(message)) for cut in cuts), len(message)]
            buffers = []
            for begin, end in itertools.pairwise(edges):
                self.memory.write(self.place, message[begin:end])
                buffers.append(Buffer(self.place, end - begin))
                self.place += end - begin + 3
            heads.append(self.tx.add(buffers, direct=direct, table=self.table))
            self.table += 16 * len(buffers)
        assert self.place < LOW
        self.tx.offer(*heads)
        self.notify(TX)
        self.settle()


class Host:
    """The host's side of a TAP: what the guest sends arrives here, what is sent here goes to the guest."""

    def __init__(self, namespace: Namespace, name: str, *, headers: bool = False) -> None:
        self.headers = headers
        self.socket = namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        if headers:
            self.socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.socket.bind((name, _ETH_P_ALL))
        self.socket.setblocking(False)

    def send(self, data: bytes) -> None:
        self.socket.send(data)

    def frames(self, count: int, seconds: float = 10.0) -> list[bytes]:
        """The next `count` frames from the guest."""
        found: list[bytes] = []
        deadline = time.monotonic() + seconds
        while len(found) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(found)} frames of {count}"
            if not select.select([self.socket], [], [], left)[0]:
                continue
            data, address = self.socket.recvfrom(1 << 17)
            if address[2] != socket.PACKET_OUTGOING:
                found.append(data)
        return found

    def nothing_more(self) -> bool:
        """Whether there is no other frame from the guest."""
        while True:
            try:
                _, address = self.socket.recvfrom(1 << 17)
            except BlockingIOError:
                return True
            if address[2] != socket.PACKET_OUTGOING:
                return False

    def close(self) -> None:
        self.socket.close()


class Link(Card):
    """An interface on a TAP of a namespace, and the host on the other side."""

    def __init__(
        self,
        namespace: Namespace,
        features: int = MERGE,
        *,
        headers: bool = False,
        mtu: int = 1500,
        size: int = 256,
        **options: Any,
    ) -> None:
        name = namespace.tap(mtu=mtu)
        with namespace.entered():
            fd = open_tap(name)
        self.name = name
        super().__init__(fd, features, size, **options)
        self.host = Host(namespace, name, headers=headers)

    def close(self) -> None:
        self.host.close()
        super().close()


def tcp_segment(size: int, part: int = 1400) -> tuple[bytes, bytes]:
    """(virtio header, frame) of `size` bytes of TCP that whoever cannot take them whole cuts into parts."""
    head = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x10, 65535, 0, 0)
    return _segment(6, head, 16, GSO_TCPV4, size, part)


def udp_segment(size: int, part: int = 1400) -> tuple[bytes, bytes]:
    """The same of UDP: datagrams of `part` bytes in one."""
    return _segment(17, struct.pack(">HHHH", 1000, 2000, 8 + size, 0), 6, GSO_UDP_L4, size, part)


def _segment(
    protocol: int, head: bytes, checksum: int, gso: int, size: int, part: int
) -> tuple[bytes, bytes]:
    length = 20 + len(head) + size
    addresses = bytes((10, 0, 0, 2, 10, 0, 0, 3))
    ip = struct.pack(">BBHHHBBH", 0x45, 0, length, 1, 0, 64, protocol, 0) + addresses
    total = sum(struct.unpack(">10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    ip = ip[:10] + struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF) + ip[12:]
    header = struct.pack("<BBHHHHH", NEEDS_CSUM, gso, 34 + len(head), part, 34, checksum, 0)
    return header, PEER + MAC + b"\x08\x00" + ip + head + random.Random(size).randbytes(size)
