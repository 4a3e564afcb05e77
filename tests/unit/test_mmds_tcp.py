"""The metadata service's TCP/IP: what it answers, what it sends again, and what it lets pass."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.mmds import packet, tcp
from crackle.mmds.packet import ACK, DEFAULT_MSS, FIN, MAX_MSS, MIN_MSS, PSH, RST, SYN
from crackle.mmds.stack import EVICTABLE_AFTER_S, MAX_CONNECTIONS, Stack
from crackle.mmds.tcp import LINGER_S, MAX_TIMEOUT_S, MAX_TRIES, ROOM
from support.metadata import GUEST, GUEST_MAC, SERVICE, WRAP, Client, body_of, frame, get, sent, stack_of

BIG = bytes(range(97, 123)).decode() * 8000  # 208,000 letters: three windows
DOCUMENT = {"foo": "bar", "big": BIG}


@pytest.fixture
def stack() -> Stack:
    return stack_of(DOCUMENT)


# -- frames --------------------------------------------------------------------------------------------------------


def arp(target: bytes = SERVICE, operation: int = 1, kind: int = 0x0800) -> bytes:
    body = struct.pack("!HHBBH6s4s6s4s", 1, kind, 6, 4, operation, GUEST_MAC, GUEST, bytes(6), target)
    return bytes(12) + b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + body


@pytest.mark.parametrize("padding", [0, 18])
def test_who_asks_for_the_address_learns_of_the_mac(stack: Stack, padding: int) -> None:
    stack.receive(arp() + bytes(padding), 0)
    reply = stack.transmit(0)
    assert reply is not None
    assert reply[12:26] == GUEST_MAC + packet.MAC + b"\x08\x06"
    *kind, sender_mac, sender, target_mac, target = struct.unpack("!HHBBH6s4s6s4s", reply[26:])
    assert kind == [1, 0x0800, 6, 4, 2]
    assert (sender_mac, sender, target_mac, target) == (packet.MAC, SERVICE, GUEST_MAC, GUEST)


@pytest.mark.parametrize("message", [arp(GUEST), arp(operation=2), arp(kind=0x86DD), arp()[:-1]])
def test_other_arp_packets_are_passed_over(stack: Stack, message: bytes) -> None:
    stack.receive(message, 0)
    assert stack.transmit(0) is None
    assert stack.counters["rx_accepted_err"] + stack.counters["rx_accepted_unusual"] == 1


def damaged(at: int, value: int, message: bytes | None = None) -> bytes:
    """A SYN with another byte at this offset from the Ethernet header's start."""
    changed = bytearray(frame(SYN) if message is None else message)
    changed[12 + at] = value
    return bytes(changed)


@pytest.mark.parametrize(
    ("message", "counter"),
    [
        (b"", "rx_bad_eth"),
        (bytes(12), "rx_bad_eth"),
        (bytes(25), "rx_bad_eth"),
        (damaged(12, 0x86), "rx_bad_eth"),
        (frame(SYN)[:40], "rx_accepted_err"),
        (frame(SYN)[:-1], "rx_accepted_err"),
        (damaged(14, 0x55), "rx_accepted_err"),  # IP version 5
        (damaged(14, 0x44), "rx_accepted_err"),  # a header of 16 bytes
        (damaged(14, 0x4F), "rx_accepted_err"),  # a header longer than the packet
        (damaged(17, 10), "rx_accepted_err"),  # a packet shorter than its header
        (damaged(22, 2), "rx_accepted_err"),  # IP checksum
        (damaged(46, 0x40), "rx_accepted_err"),  # a TCP header of 16 bytes
        (damaged(46, 0xF0), "rx_accepted_err"),  # a TCP header longer than the segment
        (damaged(38, 1), "rx_accepted_err"),  # TCP checksum
    ],
)
def test_what_is_broken_is_counted_and_dropped(stack: Stack, message: bytes, counter: str) -> None:
    stack.receive(message, 0)
    assert stack.transmit(0) is None
    assert stack.counters[counter] == 1
    assert stack.counters["rx_accepted"] == 1
    assert stack.counters["rx_count"] == len(stack) == 0


def of_ipv4(at: int, value: bytes) -> bytes:
    """A SYN whose IPv4 header has these bytes at this offset, and the right checksum."""
    changed = bytearray(frame(SYN))
    header = changed[26:46]
    header[at : at + len(value)] = value
    header[10:12] = b"\0\0"
    header[10:12] = packet.checksum(bytes(header)).to_bytes(2, "big")
    changed[26:46] = header
    return bytes(changed)


@pytest.mark.parametrize(
    ("message", "counter"),
    [
        (of_ipv4(9, b"\x11"), "rx_accepted_unusual"),  # UDP
        (of_ipv4(6, b"\x20\x00"), "rx_accepted_unusual"),  # more fragments follow
        (of_ipv4(6, b"\x00\x01"), "rx_accepted_unusual"),  # a later fragment
        (of_ipv4(16, b"\x08"), "rx_accepted_unusual"),  # another address
        (of_ipv4(2, b"\x00\x20"), "rx_accepted_err"),  # 12 bytes of TCP
    ],
)
def test_what_is_not_tcp_for_us_is_counted_and_dropped(stack: Stack, message: bytes, counter: str) -> None:
    stack.receive(message, 0)
    assert stack.transmit(0) is None
    assert stack.counters[counter] == 1


@pytest.mark.parametrize("flags", [1, 2])
def test_a_checksum_that_the_device_answers_for_is_not_looked_at(stack: Stack, flags: int) -> None:
    message = bytearray(damaged(50, 0xEE))
    message[0] = flags
    stack.receive(bytes(message), 0)
    assert [segment.flags for segment in sent(stack)] == [SYN | ACK]


def test_a_guest_of_any_size_of_segment_is_served(stack: Stack) -> None:
    sizes = [
        (1460, 1460),
        (8960, 8960),
        (None, DEFAULT_MSS),
        (1, MIN_MSS),
        (65535, MAX_MSS),
        (65496, MAX_MSS),
    ]
    for port, (mss, size) in enumerate(sizes):
        client = Client(stack, mss=mss, port=1000 + port)
        client.send(get("/big"))
        segments = sent(stack)
        assert {len(segment.payload) for segment in segments[:4]} == {size}
        client.stack.receive(frame(RST, client.next, port=client.port), 0)
        sent(stack)


@pytest.mark.parametrize(
    "options", [b"\x02\x04\x05", b"\x02\x00\x05\xb4", b"\x08\xff\x00\x00", b"\x01\x01\x01\x02"]
)
def test_options_that_make_no_sense_are_passed_over(options: bytes) -> None:
    assert packet._mss(options) == DEFAULT_MSS


@given(st.binary(max_size=70))
def test_a_checksum_is_the_complement_of_the_sum(data: bytes) -> None:
    total = 0
    for high, low in struct.iter_unpack("BB", data + bytes(len(data) % 2)):
        total += high << 8 | low
        total = (total & 0xFFFF) + (total >> 16)
    assert (packet.checksum(data) - (~total & 0xFFFF)) % 0xFFFF == 0


# -- connections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1000, WRAP - 1, WRAP - 30])
def test_a_document_arrives_whole(stack: Stack, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp.os, "urandom", lambda size: b"\xff" * size)
    client = Client(stack, first)
    assert body_of(client.fetch(get("/big"))) == BIG.encode()
    assert body_of(client.fetch(get("/foo"))) == b"bar"
    assert len(stack) == 1
    assert stack.deadline() is None


def test_no_more_is_sent_than_the_guest_has_room_for(stack: Stack) -> None:
    client = Client(stack, window=3000)
    client.send(get("/big"))
    segments = sent(stack)
    assert [len(segment.payload) for segment in segments] == [1460, 1460]
    client.take(segments)
    client.fetch(b"")
    assert body_of(client.body) == BIG.encode()


def test_a_request_may_come_in_pieces_and_two_in_one(stack: Stack) -> None:
    client = Client(stack)
    request = get("/foo")
    for byte in request[:-1]:
        client.send(bytes((byte,)))
        assert [segment.flags for segment in sent(stack)] == [ACK]
    assert body_of(client.fetch(request[-1:])) == b"bar"
    both = client.fetch(request + get("/"))
    assert both.count(b"HTTP/1.1 200 OK") == 2
    assert both.endswith(b"big\nfoo")


def test_requests_that_wait_close_the_window_and_their_answers_open_it(stack: Stack) -> None:
    client = Client(stack)
    request = get("/foo")
    client.send((request * ROOM)[:ROOM])
    (first,) = sent(stack)
    assert first.window == len(request)
    client.take([first])
    client.send()
    windows = []
    while segments := sent(stack):
        windows += [segment.window for segment in segments]
        client.take(segments)
        client.send()
    assert client.body.count(b"200 OK") == ROOM // len(request)
    assert windows == sorted(windows)
    assert windows[-1] > ROOM - len(request)


def test_an_acknowledgement_from_the_future_is_told_what_was_sent(stack: Stack) -> None:
    client = Client(stack)
    client.send()
    stack.receive(frame(ACK, client.next, client.expected + 1, get("/foo")), 0)
    (answer,) = sent(stack)
    assert (answer.flags, answer.seq, answer.ack) == (ACK, client.expected % WRAP, client.next)


def test_a_segment_out_of_order_is_dropped_and_what_is_expected_named(stack: Stack) -> None:
    client = Client(stack)
    client.send(b"ome more", seq=client.next + 1)
    (answer,) = sent(stack)
    assert (answer.flags, answer.ack, answer.payload) == (ACK, client.next, b"")
    assert stack.counters["rx_accepted_unusual"] == 1
    assert body_of(client.fetch(get("/foo"))) == b"bar"


def test_what_was_received_before_is_acknowledged_again_and_not_served_twice(stack: Stack) -> None:
    client = Client(stack)
    at = client.next
    request = get("/foo")
    assert body_of(client.fetch(request)) == b"bar"
    client.send(request, seq=at)
    (answer,) = sent(stack)
    assert (answer.flags, answer.ack) == (ACK, client.next)
    # Half of it is new.
    client.send(request[4:] + b"GET /", seq=at + 4)
    client.next += 5
    assert body_of(client.fetch(b"foo HTTP/1.1\r\n\r\n")) == b"bar"


def test_data_beyond_the_window_is_not_taken(stack: Stack) -> None:
    client = Client(stack)
    begin = b"GET /foo HTTP/1.1\r\nX: "
    client.send(begin + b"x" * 60000, seq=client.next)
    answer = sent(stack)[0]
    assert answer.ack == (client.next + ROOM) % WRAP
    # What was taken was no request; the answer says so and the connection ends.
    client.next += ROOM
    client.send()
    client.take([answer, *sent(stack)])
    assert b"400 Bad Request" in client.body
    assert client.closed


def test_an_answer_that_is_lost_is_sent_again_a_few_times(stack: Stack) -> None:
    client = Client(stack)
    client.send(get("/foo"))
    first = sent(stack)
    assert sent(stack) == []
    times = []
    while (deadline := stack.deadline()) is not None:
        stack.expire(deadline - 0.001)
        assert sent(stack, deadline) == []
        stack.expire(deadline)
        again = sent(stack, deadline)
        times.append(deadline)
        if again[0].flags & RST:
            break
        assert [s.payload for s in again] == [s.payload for s in first]
    assert len(times) == MAX_TRIES + 1
    assert all(later - earlier <= MAX_TIMEOUT_S for earlier, later in itertools.pairwise(times))
    assert len(stack) == 0
    assert stack.deadline() is None


def test_a_lost_answer_to_a_syn_is_sent_again(stack: Stack) -> None:
    stack.receive(frame(SYN, 7), 0)
    (first,) = sent(stack)
    stack.receive(frame(SYN, 7), 0.1)
    assert sent(stack, 0.1) == [first]
    deadline = stack.deadline()
    assert deadline is not None
    stack.expire(deadline)
    assert sent(stack, deadline) == [first]


def test_three_acknowledgements_of_the_same_byte_mean_a_loss(stack: Stack) -> None:
    client = Client(stack)
    client.send(get("/big"))
    segments = sent(stack)
    client.take(segments[:1])
    client.send()
    for _ in range(2):
        client.send()
        assert client.expected % WRAP not in [segment.seq for segment in sent(stack)]
    client.send()
    assert sent(stack)[0].seq == client.expected % WRAP


def test_a_guest_without_room_is_asked_again_and_not_given_up(stack: Stack) -> None:
    client = Client(stack, window=0)
    client.send(get("/foo"))
    sent(stack)
    for _ in range(3 * MAX_TRIES):
        deadline = stack.deadline()
        assert deadline is not None
        client.now = deadline
        stack.expire(deadline)
        (probe,) = sent(stack, deadline)
        assert len(probe.payload) == 1
        client.send()
    client.window = 65535
    client.fetch(b"")
    assert body_of(client.body) == b"bar"


def test_half_close_loses_nothing(stack: Stack) -> None:
    client = Client(stack)
    client.send(get("/big"), ACK | PSH | FIN)
    for _ in range(1000):
        client.take(sent(stack))
        client.send()
        if client.closed:
            break
    assert body_of(client.body) == BIG.encode()
    assert len(stack) == 0


@pytest.mark.parametrize("request_", [get("/foo", "Connection: close"), b"GET /foo HTTP/1.0\r\n\r\n"])
def test_a_connection_that_is_to_end_ends_after_the_answer(stack: Stack, request_: bytes) -> None:
    client = Client(stack)
    client.fetch(request_)
    assert client.closed
    assert body_of(client.body) == b"bar"
    assert len(stack) == 1
    client.send(b"", ACK | FIN)
    (answer,) = sent(stack)
    assert (answer.flags, answer.ack) == (ACK, client.next % WRAP)
    assert len(stack) == 0


def test_a_guest_that_never_closes_its_side_is_waited_for_only_so_long(stack: Stack) -> None:
    client = Client(stack)
    client.fetch(get("/foo", "Connection: close"))
    assert stack.deadline() == LINGER_S
    stack.expire(LINGER_S)
    assert len(stack) == 0


def test_an_idle_connection_waits_for_nothing(stack: Stack) -> None:
    client = Client(stack)
    client.send()
    assert sent(stack) == []
    assert stack.deadline() is None
    client.send(b"\0", seq=client.next - 1)  # a keep-alive
    (answer,) = sent(stack)
    assert (answer.flags, answer.ack) == (ACK, client.next)


def test_a_segment_of_no_connection_is_reset(stack: Stack) -> None:
    stack.receive(frame(ACK, 5, 77, b"abc"), 0)
    assert [(s.flags, s.seq) for s in sent(stack)] == [(RST, 77)]
    stack.receive(frame(FIN, 5, 0, b"abc"), 0)
    assert [(s.flags, s.seq, s.ack) for s in sent(stack)] == [(RST | ACK, 0, 9)]
    stack.receive(frame(SYN, WRAP - 1, to=81), 0)
    (reset,) = sent(stack)
    assert (reset.flags, reset.ack) == (RST | ACK, 0)
    stack.receive(frame(RST, 5), 0)
    assert sent(stack) == []
    assert len(stack) == 0


def test_only_a_reset_that_fits_exactly_ends_a_connection(stack: Stack) -> None:
    client = Client(stack)
    client.send()
    for seq, answers in [(client.next + 1, 1), (client.next - 1, 0), (client.next + 70000, 0)]:
        stack.receive(frame(RST, seq), 0)
        assert [segment.flags for segment in sent(stack)] == [ACK] * answers
        assert len(stack) == 1
    stack.receive(frame(RST, client.next), 0)
    assert len(stack) == 0
    assert stack.counters["connections_destroyed"] == 1


def test_a_guest_that_begins_anew_on_the_same_port_gets_through(stack: Stack) -> None:
    old = Client(stack)
    old.send()
    stack.receive(frame(SYN, 90000), 0)
    (challenge,) = sent(stack)
    assert (challenge.flags, challenge.ack) == (ACK, old.next)
    # What a TCP that knows of no such connection answers to it.
    stack.receive(frame(RST, challenge.ack), 0)
    assert body_of(Client(stack, 90000).fetch(get("/foo"))) == b"bar"


def test_an_acknowledgement_of_what_was_never_sent_does_not_open_a_connection(stack: Stack) -> None:
    stack.receive(frame(SYN, 7), 0)
    (answer,) = sent(stack)
    stack.receive(frame(ACK, 8, answer.seq + 2), 0)
    assert [(s.flags, s.seq) for s in sent(stack)] == [(RST, (answer.seq + 2) % WRAP)]
    assert len(stack) == 0


def test_there_are_only_so_many_connections_and_an_idle_one_makes_room(stack: Stack) -> None:
    clients = [Client(stack, port=1000 + i) for i in range(MAX_CONNECTIONS)]
    assert len(stack) == MAX_CONNECTIONS
    stack.receive(frame(SYN, port=999), EVICTABLE_AFTER_S - 1)
    assert [segment.flags for segment in sent(stack)] == [RST | ACK]
    clients[0].now = 5
    clients[0].send()
    stack.receive(frame(SYN, port=999), EVICTABLE_AFTER_S)
    evicted, answer = sent(stack, EVICTABLE_AFTER_S)
    assert (evicted.port, evicted.flags) == (1001, RST | ACK)
    assert (answer.port, answer.flags) == (999, SYN | ACK)
    assert len(stack) == MAX_CONNECTIONS
    assert stack.counters["connections_created"] == MAX_CONNECTIONS + 1
    assert stack.counters["connections_destroyed"] == 1


def test_connections_take_turns(stack: Stack) -> None:
    clients = [Client(stack, port=1000 + i) for i in range(3)]
    for client in clients:
        client.send(get("/big"))
    ports = [segment.port for segment in sent(stack)]
    assert ports[:6] == [1000, 1001, 1002] * 2


def losses(gaps: list[int]) -> Iterator[bool]:
    """Whether each frame in turn is lost: as many as a gap says, then one that is not; at last none."""
    for gap in gaps:
        yield from [True] * gap
        yield False
    while True:
        yield False


GAPS = st.lists(st.integers(0, 2), max_size=40)


@given(GAPS, st.lists(st.integers(0, 1), max_size=40), st.sampled_from([3000, 65535]))
def test_a_document_arrives_whole_over_a_link_that_loses_frames(
    outward: list[int], inward: list[int], window: int
) -> None:
    document = BIG[:20_000]
    stack = stack_of({"big": document})
    client = Client(stack, window=window)
    lost_out, lost_in = losses(outward), losses(inward)
    request, at = get("/big", "Connection: close"), client.next
    client.next += len(request)
    heard = False
    for _ in range(1000):
        if not next(lost_in):
            # What has been received, and the request until its arrival is known.
            client.send(b"" if heard else request, seq=None if heard else at)
        segments = [segment for segment in sent(stack, client.now) if not next(lost_out)]
        heard = heard or any(segment.ack == client.next for segment in segments)
        client.take(segments)
        if client.closed:
            break
        deadline = stack.deadline()
        if not any(segment.payload for segment in segments) and deadline is not None:
            client.now = deadline
            stack.expire(client.now)
    assert body_of(client.body) == document.encode()
