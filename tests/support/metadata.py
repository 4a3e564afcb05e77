"""The other end of the metadata service's link: a TCP client that sends what the test says, and reads every answer."""

from __future__ import annotations

from typing import Any

from crackle.mmds import packet
from crackle.mmds.http import Responder
from crackle.mmds.packet import ACK, FIN, SYN, Peer, Segment
from crackle.mmds.stack import Stack
from crackle.mmds.store import Store
from crackle.schema.mmds import MmdsConfig

SERVICE = bytes((169, 254, 169, 254))
GUEST = bytes((169, 254, 1, 1))
GUEST_MAC = bytes.fromhex("060000000001")
WRAP = 1 << 32


def store_of(document: Any, limit: int = 1 << 24) -> Store:
    """A store that holds `document`."""
    store = Store(limit)
    store.put(document)
    return store


def stack_of(document: Any, version: str = "V1", imds_compat: bool = False) -> Stack:
    """A link's end that serves `document`."""
    config = MmdsConfig(["eth0"], version, None, imds_compat)  # type: ignore[arg-type]
    return Stack(SERVICE, Responder(config, store_of(document)).take)


def frame(
    flags: int = ACK,
    seq: int = 0,
    ack: int = 0,
    payload: bytes = b"",
    *,
    window: int = 65535,
    mss: int | None = None,
    port: int = 50000,
    to: int = 80,
) -> bytes:
    """A message that carries this segment from the guest to the service."""
    return packet.segment(
        GUEST,
        port,
        Peer(packet.MAC, SERVICE, to),
        seq=seq % WRAP,
        ack=ack % WRAP,
        flags=flags,
        window=window,
        mss=mss,
        payload=payload,
    )


def sent(stack: Stack, now: float = 0.0, most: int = 10_000) -> list[Segment]:
    """Everything the stack has to send now, checksums verified."""
    found = []
    while (message := stack.transmit(now)) is not None:
        parsed = packet.parse(message, GUEST)
        assert isinstance(parsed, Segment)
        found.append(parsed)
        assert len(found) <= most, "it does not stop sending"
    return found


class Client:
    """A connection to `stack`, sequence numbers from `first`. Every method is at the time `now`."""

    def __init__(
        self,
        stack: Stack,
        first: int = 1000,
        *,
        port: int = 50000,
        mss: int | None = 1460,
        window: int = 65535,
    ) -> None:
        self.stack = stack
        self.port = port
        self.window = window
        self.next = first + 1
        self.now = 0.0
        self.body = b""
        self.closed = False
        stack.receive(frame(SYN, first, mss=mss, window=window, port=port), self.now)
        (answer,) = sent(stack, self.now)
        assert answer.flags == SYN | ACK
        assert answer.ack == self.next % WRAP
        self.expected = answer.seq + 1

    def send(self, payload: bytes = b"", flags: int = ACK, *, seq: int | None = None) -> None:
        """Send a segment; by default the next one there is."""
        at = self.next if seq is None else seq
        self.stack.receive(
            frame(flags, at, self.expected, payload, port=self.port, window=self.window), self.now
        )
        if seq is None:
            self.next += len(payload) + bool(flags & FIN)

    def take(self, segments: list[Segment]) -> None:
        """Put what arrived in order behind what has been received; the rest counts as lost."""
        for segment in segments:
            if segment.seq == self.expected % WRAP and not self.closed:
                self.body += segment.payload
                self.expected += segment.length
                self.closed = bool(segment.flags & FIN)

    def fetch(self, request: bytes, rounds: int = 10_000) -> bytes:
        """Send `request` and acknowledge what comes until nothing does; all bytes received since the last."""
        before = len(self.body)
        self.send(request)
        for _ in range(rounds):
            segments = sent(self.stack, self.now)
            self.take(segments)
            if not any(segment.length for segment in segments):
                return self.body[before:]
            self.send()
        raise AssertionError("no end")


def get(path: str, *headers: str) -> bytes:
    """The bytes of a GET request."""
    return "\r\n".join((f"GET {path} HTTP/1.1", "Host: 169.254.169.254", *headers, "", "")).encode()


def body_of(answer: bytes) -> bytes:
    """What an HTTP answer says, without its head."""
    return answer.partition(b"\r\n\r\n")[2]
