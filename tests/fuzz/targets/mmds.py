"""The metadata service behind its wire: frames, segments and requests of a hostile guest."""

from __future__ import annotations

import struct

from crackle.mmds.http import Responder
from crackle.mmds.packet import ACK, FIN, PSH, RST, SYN, VNET_HEADER_SIZE, checksum
from crackle.mmds.stack import MAX_CONNECTIONS, PORT, Stack
from crackle.mmds.store import Store
from crackle.schema.mmds import MmdsConfig
from targets.choices import Choices
from targets.device import Target

SERVICE, GUEST = bytes((169, 254, 169, 254)), bytes((169, 254, 1, 2))
MAC = bytes.fromhex("06000000000a")
DOCUMENT = {
    "latest": {"meta-data": {"ami-id": "ami-1", "list": [1, {"a": "b"}], "n": 5}},
    "x~y": {"a/b": "c"},
}
MOST = 24
"""Steps of an input."""

WORDS = (
    b"GET /latest/meta-data/ami-id HTTP/1.1\r\n",
    b"GET /latest HTTP/1.0\r\n",
    b"GET http://169.254.169.254/x~0y/a~1b HTTP/1.1\r\n",
    b"PUT /latest/api/token HTTP/1.1\r\n",
    b"X-metadata-token-ttl-seconds: 60\r\n",
    b"X-aws-ec2-metadata-token: AAAA\r\n",
    b"Accept: application/json\r\n",
    b"Accept-Encoding: identity;q=0, *;q=0\r\n",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"X-Forwarded-For: 1\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive\r\n",
    b"\r\n",
    b"\n\n",
    b"/latest/meta-data/list/1/a",
    b"HTTP/1.1",
    b"Expect: 100-continue\r\n",
)


def service(version: str = "V2", *, compatible: bool = False) -> Responder:
    store = Store(51200)
    store.put(DOCUMENT)
    config = MmdsConfig(network_interfaces=["eth0"], version=version, imds_compat=compatible)
    return Responder(config, store)


def request(choices: Choices) -> bytes:
    """A request out of words that it may well have."""
    found = b""
    for _ in range(choices.below(10)):
        number = choices.byte()
        if number < 0xD0:
            found += WORDS[number % len(WORDS)]
        else:
            found += choices.bytes(choices.below(24))
    return found


class Http(Target):
    """Requests, whole and in pieces."""

    def __init__(self) -> None:
        self.responders = [
            service(version, compatible=yes) for version in ("V1", "V2") for yes in (False, True)
        ]

    def run(self, data: bytes) -> None:
        choices = Choices(data)
        responder, waiting = choices.of(self.responders), bytearray()
        token = b"none"
        for _ in range(MOST):
            if not choices:
                break
            kind = choices.byte()
            if kind < 0x30:
                # As a client in order asks, with the token that it was given.
                waiting += choices.of(WORDS[:3]) + choices.of((b"", WORDS[6], WORDS[7]))
                waiting += b"X-metadata-token: " + token + b"\r\n\r\n"
            else:
                waiting += request(choices) if kind < 0xC0 else choices.bytes(choices.below(200))
            before = len(waiting)
            while (answer := responder.take(waiting)) is not None:
                assert answer[0].startswith((b"HTTP/1.1 ", b"HTTP/1.0 "))
                assert len(waiting) < before
                token = answer[0].rpartition(b"\r\n\r\n")[2] if b"oken-ttl" in answer[0] else token
                before = len(waiting)
                if answer[1]:
                    return
            assert len(waiting) < 4096


class Frames(Target):
    """Frames to the service; what it sends is taken, lost or late."""

    def run(self, data: bytes) -> None:
        choices = Choices(data)
        self.now = 1000.0
        self.stack = Stack(SERVICE, service().take)
        self.last: dict[int, tuple[int, int]] = {}
        for _ in range(MOST):
            if not choices:
                break
            what = choices.byte()
            if what < 0xA0:
                self.stack.receive(self.segment(choices), self.now)
            elif what < 0xB0:
                self.stack.receive(self.arp(choices), self.now)
            elif what < 0xC0:
                self.stack.receive(bytes(VNET_HEADER_SIZE) + choices.bytes(choices.below(64)), self.now)
            elif what < 0xD0:
                self.now += choices.of((0.001, 0.3, 1.0, 5.0, 20.0))
            if what & 1 or choices.byte() & 1:
                self.take(2 + choices.below(8))
            deadline = self.stack.deadline()
            if deadline is not None and deadline <= self.now:
                self.stack.expire(self.now)
            assert len(self.stack) <= MAX_CONNECTIONS
        self.end()

    def take(self, most: int) -> None:
        """What the service sends now; the guest sees the numbers."""
        for _ in range(most):
            message = self.stack.transmit(self.now)
            if message is None:
                break
            frame = message[VNET_HEADER_SIZE:]
            assert len(frame) <= 1514
            if frame[12:14] == b"\x08\x00":
                assert checksum(frame[14:34]) == 0
                port, seq, ack = struct.unpack_from("!HII", frame, 36)
                size = len(frame) - 34 - (frame[46] >> 4) * 4
                flags = frame[47]
                ends = seq + size + bool(flags & SYN) + bool(flags & FIN)
                self.last[port] = (ends % (1 << 32), ack)

    def end(self) -> None:
        """All that waits ends by itself, and a guest in good order is served."""
        for _ in range(400):
            self.take(400)
            deadline = self.stack.deadline()
            if deadline is None:
                break
            self.now = max(self.now, deadline)
            self.stack.expire(self.now)
        else:
            raise AssertionError("the service never comes to rest")
        self.now += 100
        port = 60000
        self.stack.receive(self.tcp(port, 5, 0, SYN, b""), self.now)
        self.take(200)
        seq, ack = self.last[port]
        assert ack == 6
        self.stack.receive(self.tcp(port, ack, seq, ACK | PSH, b"GET / HTTP/1.1\r\n\r\n"), self.now)
        self.take(200)
        assert self.last[port][1] == ack + 18
        assert self.last[port][0] != seq

    def segment(self, choices: Choices) -> bytes:
        port = 40000 + choices.of((0, 0, 0, 1, 2, *range(48)))
        seq, ack = self.last.get(port, (0, 100))[::-1]
        flags = choices.of((SYN, ACK, ACK | PSH, ACK | FIN, ACK, ACK | PSH, RST, SYN | ACK, 0x1FF))
        if flags & SYN and port not in self.last:
            seq = 100
        payload = request(choices) if flags & PSH else b""
        if flags & PSH and choices.rarely():
            payload += bytes(choices.of((1, 600, 1460, 5000)))
        options = b""
        if flags & SYN:
            options = choices.of(
                (b"", b"\x02\x04\x05\xb4", b"\x02\x04\x00\x00", b"\x01\x01\x03\x00", b"\x08\xff\x00\x00")
            )
        message = self.tcp(
            port,
            choices.nearly(seq) % (1 << 32),
            choices.nearly(ack) % (1 << 32),
            flags,
            payload,
            window=choices.of((65535, 65535, 0, 1, 100, 1460)),
            options=options,
            to=PORT if not choices.rarely() else choices.number(2),
        )
        if choices.rarely():
            message = message[: choices.nearly(VNET_HEADER_SIZE + choices.below(80))]
        if choices.rarely():
            at = VNET_HEADER_SIZE + choices.below(80)
            message = message[:at] + choices.bytes(choices.below(4)) + message[at + choices.below(4) :]
        return message

    def tcp(
        self,
        port: int,
        seq: int,
        ack: int,
        flags: int,
        payload: bytes,
        window: int = 65535,
        options: bytes = b"",
        to: int = PORT,
    ) -> bytes:
        """A segment in its frame; the checksum of TCP is left to the receiver, as an offloading guest does."""
        offset = (20 + len(options)) // 4 << 12
        segment = (
            struct.pack("!HHIIHHHH", port, to, seq, ack, offset | flags, window, 0, 0) + options + payload
        )
        size = 20 + len(segment)
        header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, size & 0xFFFF, 0, 0, 64, 6, 0, GUEST, SERVICE)
        header = header[:10] + struct.pack("!H", checksum(header)) + header[12:]
        frame = bytes(6) + MAC + b"\x08\x00" + header + segment
        return b"\x01" + bytes(VNET_HEADER_SIZE - 1) + frame

    def arp(self, choices: Choices) -> bytes:
        body = struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, MAC, GUEST, bytes(6), SERVICE)
        if choices.byte() & 3 == 0:
            body = body[: choices.below(len(body))]
        return bytes(VNET_HEADER_SIZE) + bytes(6) + MAC + b"\x08\x06" + body
