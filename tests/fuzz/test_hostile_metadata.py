"""The metadata service under fire: no message of a guest's raises, none makes it keep or send more than its bounds."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from crackle.mmds.packet import ACK, FIN, RST, SYN, VNET_HEADER_SIZE
from crackle.mmds.stack import MAX_CONNECTIONS, Stack
from crackle.mmds.tcp import ROOM
from support.metadata import WRAP, Client, frame, get, stack_of

DOCUMENT = {"foo": "bar", "big": "x" * 100_000}

# Frames that one message may make it send: the replies that wait, and for each connection a window in small segments.
MOST_SENT = 100 + MAX_CONNECTIONS * 1100

NEAR = st.sampled_from([0, 1, -1, 2, 3, 100, ROOM, ROOM + 1, -ROOM, 65535, 65536, WRAP // 2, WRAP // 2 - 1])
FLAGS = st.sampled_from(
    [0, ACK, SYN, SYN | ACK, FIN, FIN | ACK, RST, RST | ACK, SYN | FIN, 0x1FF]
) | st.integers(0, 0x1FF)
PAYLOAD = st.sampled_from(
    [
        b"",
        b"",
        get("/foo"),
        get("/big"),
        get("/big") * 3,
        get("/foo", "Connection: close"),
        b"\r\n\r\n",
        b"x" * 60000,
    ]
) | st.binary(max_size=100)


def check_bounds(stack: Stack) -> None:
    """Nothing grows beyond what it may."""
    assert len(stack) <= MAX_CONNECTIONS
    assert len(stack._peers) == len(stack)
    assert set(stack._ready) <= set(stack._connections)
    for connection in stack._connections.values():
        assert len(connection._requests) <= ROOM
        assert 0 <= connection._unacked <= connection._sent
        assert connection._next <= connection._sent + 1


def drain(stack: Stack, now: float) -> int:
    """Take everything it has to send; how many frames."""
    count = 0
    while stack.transmit(now) is not None:
        count += 1
        assert count <= MOST_SENT
    return count


@given(st.lists(st.binary(max_size=120), max_size=20))
def test_no_bytes_at_all_disturb_it(messages: list[bytes]) -> None:
    stack = stack_of(DOCUMENT)
    for message in messages:
        stack.receive(message, 0)
        drain(stack, 0)
    check_bounds(stack)


@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from([SYN, ACK, FIN | ACK]))
def test_a_damaged_segment_disturbs_nothing(seed: int, changes: int, flags: int) -> None:
    stack = stack_of(DOCUMENT)
    client = Client(stack)
    chance = random.Random(seed)
    for _ in range(20):
        message = bytearray(frame(flags, client.next, client.expected, get("/foo"), mss=1460))
        message[0] = chance.randrange(4)  # with and without checksums to be checked
        for _ in range(changes):
            message[chance.randrange(VNET_HEADER_SIZE, len(message))] = chance.randrange(256)
        stack.receive(bytes(message[: chance.choice([len(message), chance.randrange(len(message) + 1)])]), 0)
        drain(stack, 0)
    check_bounds(stack)


@given(
    st.lists(
        st.tuples(FLAGS, NEAR, NEAR, PAYLOAD, st.sampled_from([0, 1, 500, 65535]), st.booleans()), max_size=40
    )
)
def test_a_peer_that_keeps_to_no_rule_disturbs_nothing(
    segments: list[tuple[int, int, int, bytes, int, bool]],
) -> None:
    stack = stack_of(DOCUMENT)
    client = Client(stack)
    now = 0.0
    for flags, seq, ack, payload, window, wait in segments:
        if not len(stack):
            client = Client(stack)
        (connection,) = stack._connections.values()
        # Around what the connection expects next and has sent last, which random numbers would never meet.
        expected = connection._peer_first + connection._received
        sent_to = connection._first + connection._sent
        stack.receive(
            frame(flags, expected + seq, sent_to + ack, payload, window=window, port=client.port), now
        )
        check_bounds(stack)
        drain(stack, now)
        deadline = stack.deadline()
        if wait and deadline is not None:
            now = max(now, deadline)
            stack.expire(now)
            drain(stack, now)
        check_bounds(stack)


@given(st.lists(st.integers(0, 65535), max_size=100), st.integers(0, 3))
def test_a_flood_of_connections_stays_within_bounds(ports: list[int], step: int) -> None:
    stack = stack_of(DOCUMENT)
    for count, port in enumerate(ports):
        stack.receive(frame(SYN, count, port=port, mss=1), count * step)
        check_bounds(stack)
    drain(stack, len(ports) * step)
    assert stack.counters["connections_created"] - stack.counters["connections_destroyed"] == len(stack)
