"""One TCP connection, opened by the peer (RFC 9293), that carries requests one way and answers the other.

Made for a link that rarely loses a segment and never reorders one: what arrives out of order is dropped and
acknowledged as such, what is lost is sent again from there on, and there is no congestion control. One answer is on its
way at a time, so a connection holds one answer and `ROOM` bytes of requests, whatever the peer does.

Sequence numbers are counted from the connection's first, without wrapping; only what goes over the wire wraps.
"""

from __future__ import annotations

import os

import msgspec

from crackle.mmds.packet import ACK, FIN, PSH, RST, SYN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from crackle.mmds.packet import Segment

    # Takes a request off the bytes received: the answer, and whether it is the last. None if there is none yet.
    Serve = Callable[[bytearray], tuple[bytes, bool] | None]

# Bytes received that wait to be served: the window that is advertised.
ROOM = 4096

# What we take in one segment, as told to the peer.
RECEIVE_MSS = 1460

# Seconds until what is not acknowledged is sent again: at first, at most, and how often before giving up.
FIRST_TIMEOUT_S = 0.2
MAX_TIMEOUT_S = 3.0
MAX_TRIES = 8

# Seconds that a peer has to close its side after we closed ours.
LINGER_S = 10.0

# Acknowledgements of the same byte that mean that a segment was lost (RFC 5681, 3.2).
_DUPLICATES = 3

_WRAP = 1 << 32


class Outgoing(msgspec.Struct, frozen=True):
    """A segment to be sent. Addresses and ports are whoever's who sends it."""

    seq: int
    ack: int
    flags: int
    window: int
    mss: int | None = None
    payload: bytes = b""

    @property
    def length(self) -> int:
        """What it takes of the sequence numbers."""
        return len(self.payload) + bool(self.flags & SYN) + bool(self.flags & FIN)


def _distance(number: int, base: int) -> int:
    """How far the sequence number `number` is ahead of `base`; negative if it is behind."""
    return (number - base + _WRAP // 2) % _WRAP - _WRAP // 2


class Connection:
    """Begins with the peer's SYN. `receive`, `next_segment` and `expire` are given the time in seconds.

    `deadline` is when to call `expire`, if ever; `done` says that nothing is left to do.
    """

    def __init__(self, syn: Segment, serve: Serve, now: float) -> None:
        self.done = False
        self.deadline: float | None = None
        self.active_at = now
        self._serve = serve
        self._first = int.from_bytes(os.urandom(4), "big")  # what _unacked, _next and _sent count from
        self._unacked = 0
        self._next = 0
        self._sent = 0
        self._peer_first = syn.seq
        self._received = 1  # counts from _peer_first; its SYN is the first
        self._peer_window = syn.window
        self._mss = syn.mss
        self._requests = bytearray()
        self._answer = b""
        self._answer_at = 1
        self._peer_closed = False
        self._closing = False
        self._reset: Outgoing | None = None
        self._ack_due = False
        self._probe = False
        self._timeout = FIRST_TIMEOUT_S
        self._tries = 0
        self._duplicates = 0
        self._advertised = ROOM

    # -- what it is doing ----------------------------------------------------------------------------------------

    @property
    def established(self) -> bool:
        """Whether the peer has acknowledged our SYN."""
        return self._unacked > 0

    @property
    def _window(self) -> int:
        return ROOM if self._closing else max(0, ROOM - len(self._requests))

    @property
    def _end(self) -> int:
        """Where all that there is to send ends, our FIN included."""
        return self._answer_at + len(self._answer) + self._closing

    # -- receiving -----------------------------------------------------------------------------------------------

    def receive(self, segment: Segment, now: float) -> bool:
        """Take a segment of this connection. False if it was none that a peer in good order sends."""
        self.active_at = now
        ahead = _distance(segment.seq, (self._peer_first + self._received) % _WRAP)
        if segment.flags & RST:
            return self._receive_reset(ahead)
        if segment.flags & SYN:
            if not self.established and ahead == -1 and not segment.flags & ACK:
                self._next = 0  # our answer to the first was lost
                return True
            # Perhaps a new peer behind the same address: it answers this with a reset (RFC 5961, 4).
            self._ack_due = True
            return False
        if not segment.flags & ACK or not self._receive_ack(segment):
            return False
        usual = self._receive_data(segment, ahead)
        self._go_on(now)
        return usual

    def _receive_reset(self, ahead: int) -> bool:
        if ahead == 0:
            self.done = True
        elif 0 < ahead < self._window:
            self._ack_due = True  # RFC 5961, 3
        return ahead == 0

    def _receive_ack(self, segment: Segment) -> bool:
        ack = self._unacked + _distance(segment.ack, (self._first + self._unacked) % _WRAP)
        if not self.established and ack != 1:
            self._reset = Outgoing(segment.ack, 0, RST, 0)
            return False
        if ack > self._sent:
            self._ack_due = True
            return False
        if ack > self._unacked:
            self._unacked = ack
            self._next = max(self._next, ack)
            self._timeout = FIRST_TIMEOUT_S
            self._tries = self._duplicates = 0
            self.deadline = None
        elif ack == self._unacked and self._sent > ack and not segment.length:
            if segment.window == self._peer_window:
                self._duplicates += 1
                if self._duplicates == _DUPLICATES:
                    self._next = self._unacked
            if not segment.window:
                self._tries = 0  # full, but there
        if ack >= self._unacked:
            if segment.window > self._peer_window == 0:
                self._next = self._unacked  # what went out to ask for room was not taken
            self._peer_window = segment.window
        return True

    def _receive_data(self, segment: Segment, ahead: int) -> bool:
        if ahead > 0:
            self._ack_due = True
            return False
        if not segment.length:
            # One that is behind asks whether we are still there.
            self._ack_due |= ahead < 0
            return True
        self._ack_due = True
        data = segment.payload[-ahead:]
        if self._peer_closed or -ahead > len(segment.payload):
            return ahead < 0  # again
        taken = data[: self._window]
        if not self._closing:
            self._requests += taken
        self._received += len(taken)
        if segment.flags & FIN and len(taken) == len(data):
            self._received += 1
            self._peer_closed = True
        return len(taken) == len(data)

    def _go_on(self, now: float) -> None:
        """Serve the next request if the last answer has arrived, and end the connection where it is to end."""
        while not self._closing and self._unacked >= self._answer_at + len(self._answer):
            self._answer, self._answer_at = b"", self._unacked
            served = self._serve(self._requests)
            if served is None:
                self._closing = self._peer_closed
                break
            self._answer, self._closing = served
            if self._closing:
                self._requests.clear()
        if self._advertised < RECEIVE_MSS <= self._window:
            self._ack_due = True
        if self._closing and self._unacked == self._end:
            # Our FIN has arrived; what is missing is the peer's.
            self.done = self._peer_closed and not self._ack_due
            self.deadline = self.deadline or now + LINGER_S
        else:
            self._set_deadline(now)

    def _set_deadline(self, now: float) -> None:
        if self._unacked == self._end:
            self.deadline = None
        elif self.deadline is None:
            self.deadline = now + self._timeout

    # -- sending -------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """The deadline has passed: send again what is not acknowledged, or give up."""
        self.deadline = None
        if self._closing and self._unacked == self._end:
            self.done = True
            return
        self._tries += 1
        if self._tries > MAX_TRIES:
            self._reset = self.reset()
            return
        self._next = self._unacked
        self._probe = True  # one byte, should the peer have no room for more
        self._timeout = min(2 * self._timeout, MAX_TIMEOUT_S)
        self._set_deadline(now)

    def next_segment(self, now: float) -> Outgoing | None:
        """The next segment to send, or None if there is none now. What it returns counts as sent."""
        if self._reset is not None:
            segment, self._reset, self.done = self._reset, None, True
            return segment
        if self.done:
            return None
        if self._next == 0:
            flags, payload, mss = SYN, b"", RECEIVE_MSS
        else:
            flags, payload, mss = *self._next_data(), None
        if not payload and not flags and not self._ack_due:
            return None
        segment = self._outgoing(self._next, flags | ACK, mss, payload)
        self._next += segment.length
        self._sent = max(self._sent, self._next)
        self._ack_due = False
        self._advertised = segment.window
        if self._closing and self._peer_closed and self._unacked == self._end:
            self.done = True
        elif segment.length:
            self._set_deadline(now)
        return segment

    def _next_data(self) -> tuple[int, bytes]:
        """Flags and payload of the next segment that carries either; nothing of either if none may be sent."""
        begin = self._next - self._answer_at
        left = len(self._answer) - begin
        room = self._unacked + self._peer_window - self._next
        if self._probe:
            room = max(room, 1)
        size = max(0, min(left, room, self._mss))
        if size < min(left, self._mss) and self._next > self._unacked:
            return 0, b""  # wait until a whole segment fits (RFC 1122, 4.2.3.4)
        self._probe = False
        payload = self._answer[begin : begin + size] if size else b""
        flags = PSH if payload and size == left else 0
        if self._closing and size == left and self._next + size == self._end - 1:
            flags |= FIN
        return flags, payload

    def reset(self) -> Outgoing:
        """The segment that tells the peer that this connection is no more."""
        return self._outgoing(self._next, RST | ACK)

    def _outgoing(self, at: int, flags: int, mss: int | None = None, payload: bytes = b"") -> Outgoing:
        return Outgoing(
            (self._first + at) % _WRAP,
            (self._peer_first + self._received) % _WRAP,
            flags,
            self._window,
            mss,
            payload,
        )
