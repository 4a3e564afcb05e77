"""The metadata service's end of one link: answers ARP requests and TCP segments, counts and drops everything else.

It is asked, not driven: `receive` takes a message and sends nothing, `transmit` gives the next message to send. So a
link that is full holds up only what is to go out on it, and what waits is bounded: one answer for each connection,
and `_MAX_REPLIES` replies that belong to none.
"""

from __future__ import annotations

from collections import deque

from crackle.mmds import packet
from crackle.mmds.packet import ACK, RST, SYN, ArpRequest, FrameError, Peer, Segment
from crackle.mmds.tcp import Connection, Outgoing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.mmds.tcp import Serve

PORT = 80

MAX_CONNECTIONS = 30

# Seconds without a segment after which a connection gives way to a new one.
EVICTABLE_AFTER_S = 10.0

_MAX_REPLIES = 100

COUNTERS = (
    "rx_accepted",
    "rx_accepted_err",
    "rx_accepted_unusual",
    "rx_bad_eth",
    "rx_count",
    "tx_bytes",
    "tx_count",
    "tx_errors",
    "tx_frames",
    "connections_created",
    "connections_destroyed",
)


class Stack:
    """Serves `serve` at the IPv4 address `address` (4 bytes). Times are in seconds of a clock that never goes back.

    `counters` hold Firecracker's metrics of that name; those of sending are the caller's to keep.
    """

    def __init__(self, address: bytes, serve: Serve) -> None:
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._address = address
        self._serve = serve
        self._connections: dict[tuple[bytes, int], Connection] = {}
        self._peers: dict[tuple[bytes, int], Peer] = {}
        # Those that may have something to send, in their order.
        self._ready: dict[tuple[bytes, int], None] = {}
        self._replies: deque[bytes] = deque(maxlen=_MAX_REPLIES)

    def __len__(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def receive(self, message: bytes, now: float) -> None:
        """Take a message of the guest's, whatever is in it."""
        self.counters["rx_accepted"] += 1
        try:
            parsed = packet.parse(message, self._address)
        except FrameError as error:
            self.counters[error.counter] += 1
            return
        if isinstance(parsed, ArpRequest):
            self._replies.append(packet.arp_reply(parsed, self._address))
            return
        self.counters["rx_count"] += 1
        if not self._receive_segment(parsed, now):
            self.counters["rx_accepted_unusual"] += 1

    def _receive_segment(self, segment: Segment, now: float) -> bool:
        key = (segment.peer.address, segment.peer.port)
        connection = self._connections.get(key) if segment.port == PORT else None
        if connection is None:
            return self._open(key, segment, now)
        self._peers[key] = segment.peer
        usual = connection.receive(segment, now)
        if connection.done:
            self._remove(key)
        else:
            self._ready[key] = None
        return usual

    def _open(self, key: tuple[bytes, int], segment: Segment, now: float) -> bool:
        """Begin a connection with `segment`, or refuse it. False if it is not one to begin with."""
        begins = segment.flags & (SYN | ACK | RST | packet.FIN) == SYN
        if not begins or segment.port != PORT or not self._make_room(now):
            self._refuse(segment)
            return begins
        self._connections[key] = Connection(segment, self._serve, now)
        self._peers[key] = segment.peer
        self._ready[key] = None
        self.counters["connections_created"] += 1
        return True

    def _make_room(self, now: float) -> bool:
        """Whether there is room for one more connection, if need be in the place of the one that is idle longest."""
        if len(self._connections) < MAX_CONNECTIONS:
            return True
        key, oldest = min(self._connections.items(), key=lambda item: item[1].active_at)
        if now - oldest.active_at < EVICTABLE_AFTER_S:
            return False
        self._replies.append(self._message(self._peers[key], PORT, oldest.reset()))
        self._remove(key)
        return True

    def _refuse(self, segment: Segment) -> None:
        """Answer a segment that belongs to no connection with a reset (RFC 9293, 3.10.7.1)."""
        if segment.flags & RST:
            return
        if segment.flags & ACK:
            reset = Outgoing(segment.ack, 0, RST, 0)
        else:
            reset = Outgoing(0, (segment.seq + segment.length) % (1 << 32), RST | ACK, 0)
        self._replies.append(self._message(segment.peer, segment.port, reset))

    def transmit(self, now: float) -> bytes | None:
        """The next message to send, or None if there is none now."""
        if self._replies:
            return self._replies.popleft()
        while self._ready:
            key = next(iter(self._ready))
            del self._ready[key]
            connection = self._connections[key]
            outgoing = connection.next_segment(now)
            message = None if outgoing is None else self._message(self._peers[key], PORT, outgoing)
            if connection.done:
                self._remove(key)
            elif outgoing is not None:
                self._ready[key] = None  # behind the others
            if message is not None:
                return message
        return None

    def deadline(self) -> float | None:
        """When to call `expire`; None while nothing waits for time to pass."""
        deadlines = [c.deadline for c in self._connections.values() if c.deadline is not None]
        return min(deadlines, default=None)

    def expire(self, now: float) -> None:
        """Do what time asks for; then there may be something to transmit."""
        for key, connection in list(self._connections.items()):
            if connection.deadline is None or connection.deadline > now:
                continue
            connection.expire(now)
            if connection.done:
                self._remove(key)
            else:
                self._ready[key] = None

    def forget(self) -> None:
        """End all connections without a word, and drop what waits to be sent."""
        self._replies.clear()
        for key in list(self._connections):
            self._remove(key)

    def _remove(self, key: tuple[bytes, int]) -> None:
        del self._connections[key], self._peers[key]
        self._ready.pop(key, None)
        self.counters["connections_destroyed"] += 1

    def _message(self, peer: Peer, port: int, outgoing: Outgoing) -> bytes:
        return packet.segment(
            self._address,
            port,
            peer,
            seq=outgoing.seq,
            ack=outgoing.ack,
            flags=outgoing.flags,
            window=outgoing.window,
            mss=outgoing.mss,
            payload=outgoing.payload,
        )
