"""Guests that break every rule of a network interface, while frames come for them; see `test_hostile.py`."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crackle.memory import GuestMemory
from crackle.schema.rate_limiter import RateLimiter, TokenBucket
from crackle.virtio.net.device import Net
from support.card import F_MRG, HEADER, MAC, frame
from support.driver import (
    F_EVENT_IDX,
    F_INDIRECT,
    F_VERSION_1,
    NEEDS_RESET,
    NEXT,
    STATUS,
    WRITE,
    Buffer,
)
from support.hostile import ENTRIES, HostileGuest, broken, slots

RX, TX = 0, 1
GPA, SIZE = 0x10000, 0x20000
END = GPA + SIZE
RINGS, TABLES, DATA = (GPA, GPA + 0x1000), GPA + 0x4000, GPA + 0x8000
SERVICE = bytes((169, 254, 169, 254))
F_GUEST_CSUM, F_TSO4 = 1 << 1, 1 << 7

LENGTHS = [9, 10, 11, 12, 13, 26, 53, 66, 1526, 16384, 65562]

queues = st.sampled_from([RX, TX])
sizes = st.integers(0, 80) | st.sampled_from(LENGTHS)

frames = st.one_of(
    # Chains as they should be but for their sizes, in as many pieces.
    st.tuples(st.just("room"), slots, st.lists(sizes, min_size=1, max_size=5)),
    st.tuples(st.just("room"), slots, st.lists(st.sampled_from([1600, 9000, 65562]), min_size=1, max_size=3)),
    st.tuples(st.just("send"), slots, st.lists(st.integers(0, 11), min_size=1, max_size=1)),
    st.tuples(st.just("send"), slots, st.lists(st.integers(0, 70), min_size=1, max_size=5)),
    st.tuples(st.just("come"), st.none(), st.integers(0, 3000) | st.sampled_from([65562, 70000])),
    st.tuples(st.just("come"), st.none(), st.integers(12, 3000)),
    st.tuples(st.just("notify"), queues, st.none()),
)
breaches = broken(queues, GPA, SIZE, HEADER, LENGTHS) | st.just(("save", None, None))
FROM_SERVICE = FROM_HOST = ("come", None, 60)  # in turn
BROKEN_RING = [("descriptor", (TX, 0), (1 << 60, 60, 0, 0)), ("offer", TX, [0])]
scripts = st.lists(frames, min_size=3, max_size=25) | st.lists(frames | breaches, min_size=3, max_size=25)


class Guest(HostileGuest):
    """An interface; both its TAP and its wire are sockets."""

    tables = TABLES

    def __init__(self, memory: GuestMemory, **options: Any) -> None:
        memory.write(GPA, bytes(SIZE))
        (tap, self.host), (wire, self.service) = (
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)
        )
        for each in (tap, wire, self.host, self.service):
            each.setblocking(False)
        device = Net(memory, tap.detach(), mac=MAC, **options)
        device.detour(wire.detach(), SERVICE)
        super().__init__(device)
        self.device: Net
        self.wire_next = False

    def close(self) -> None:
        super().close()
        self.host.close()
        self.service.close()

    def begin_both(self, features: int) -> None:
        self.rings = self.begin_queues(RINGS, ENTRIES, F_VERSION_1 | features)

    def play(self, action: str, first: Any, second: Any) -> None:
        if action in ("room", "send"):
            ring = self.rings[RX if action == "room" else TX]
            ring.free = list(range(ENTRIES))
            place, writable = DATA + 1500 * first, ring is self.rings[RX]
            ring.offer(ring.add([Buffer(place + 90 * n, size, writable) for n, size in enumerate(second)]))
            self.memory.write(place, bytes(12) + b"\xff" * 6 + MAC + b"\x08\x00" + bytes(16) + SERVICE)
        elif action == "come":
            self.wire_next = not self.wire_next
            with suppress(BlockingIOError):
                (self.service if self.wire_next else self.host).send(bytes(second))
        elif action == "save":
            self.settle()
            self.transport.save()
        else:
            super().play(action, first, second)

    def take_away(self) -> None:
        """Whatever came out."""
        for end in (self.host, self.service):
            with suppress(BlockingIOError):
                while end.recv(1 << 17):
                    pass

    def prove_alive(self) -> None:
        """After a reset, a driver that behaves sends and receives."""
        self.memory.write(GPA, bytes(SIZE))
        self.begin_both(F_MRG)
        self.settle()
        self.take_away()
        rx, tx = self.rings
        sent = bytes(12) + frame(60)
        self.memory.write(DATA, sent)
        tx.offer(tx.add([Buffer(DATA, 72)]))
        self.notify(TX)
        self.settle()
        assert self.host.recv(1 << 17) == sent
        for _ in range(20):
            while len(rx.free) > 1:
                rx.offer(rx.add([Buffer(DATA + 0x1000 + 5000 * len(rx.free), 5000, True)]))
            # What came before and waited comes first.
            with suppress(BlockingIOError):
                self.host.send(sent)
            self.notify(RX)
            self.settle()
            if any(written == 72 for _, written in rx.reap()):
                break
        else:
            raise AssertionError("no frame arrives")
        assert not self.registers[STATUS] & NEEDS_RESET


def test_an_interface_whose_driver_is_mad(memory: GuestMemory) -> None:
    reached: Counter[str] = Counter()
    limits = [None, RateLimiter(TokenBucket(2000, 1), TokenBucket(10, 1))]

    @given(
        script=scripts,
        features=st.sets(st.sampled_from([F_MRG, F_EVENT_IDX, F_INDIRECT, F_GUEST_CSUM | F_TSO4])),
        limit=st.sampled_from(limits),
        drop=st.booleans(),
    )
    # Frames to the host and to the service, frames of both with room and without, one too short, a room too small for
    # any, a broken ring.
    @example(script=[("send", 1, [46])], features=set(), limit=None, drop=False)
    @example(script=[("send", 1, [40])], features=set(), limit=None, drop=False)
    @example(script=[("room", 1, [9000]), FROM_SERVICE], features=set(), limit=None, drop=False)
    @example(script=[("room", 1, [9000]), FROM_SERVICE, FROM_HOST], features=set(), limit=None, drop=False)
    @example(script=[FROM_SERVICE, FROM_HOST], features=set(), limit=None, drop=False)
    @example(script=[("send", 1, [11])], features=set(), limit=None, drop=False)
    @example(script=[("room", 1, [5]), FROM_SERVICE], features=set(), limit=None, drop=False)
    @example(script=BROKEN_RING, features=set(), limit=None, drop=False)
    def attack(script: list[tuple[str, Any, Any]], features: set[int], limit: Any, drop: bool) -> None:
        with Guest(memory, rx_limiter=limit, tx_limiter=limit, drop_spoofed=drop) as guest:
            guest.begin_both(sum(features))
            for step in script:
                guest.play(*step)
            for queue in (RX, TX):
                guest.notify(queue)
            guest.settle()
            for name in COUNTERS:
                reached[name] += getattr(guest.device, name)
            for limiter in (RX, TX):
                guest.device.update_limiter(limiter, RateLimiter(TokenBucket(0, 0), TokenBucket(0, 0)))
            guest.prove_alive()

    attack()
    assert len(+reached) == len(COUNTERS), reached


COUNTERS = (
    "rx_frames",
    "tx_frames",
    "wire_sent",
    "wire_received",
    "tx_malformed",
    "rx_fails",
    "no_rx_buffer",
    "broken_queues",
)


@pytest.mark.parametrize("seed", range(3))
def test_a_guest_that_changes_its_rings_while_they_are_read(memory: GuestMemory, seed: int) -> None:
    """What was checked must be what is used: another CPU rewrites descriptors and frames meanwhile."""
    noise = random.Random(seed)
    bad = [
        struct.pack("<QIHH", gpa, size, bits, following)
        for gpa in (END - 8, END, 0, DATA, TABLES)
        for size in (16, 8, 72, 70000, 0xFFFFFFF0)
        for bits in (0, NEXT, WRITE, NEXT | WRITE, 4)
        for following in (0, 1, 15, 0xFFFF)
    ]
    with Guest(memory, drop_spoofed=True) as guest:
        for _ in range(20):
            memory.write(GPA, bytes(SIZE))
            guest.begin_both(F_INDIRECT | F_MRG)
            for queue, ring in enumerate(guest.rings):
                for i in range(ENTRIES):
                    flag = WRITE if queue == RX else 0
                    ring.write_descriptor(i, DATA + 4096 * i, 4096, flag | (NEXT if i % 4 else 0), i ^ 1)
            done = threading.Event()

            def rewrite(done: threading.Event = done) -> None:
                while not done.is_set():
                    ring = guest.rings[noise.randrange(2)]
                    memory.write(ring.desc + 16 * noise.randrange(ENTRIES), noise.choice(bad))
                    memory.write(DATA + 4096 * noise.randrange(16), noise.randbytes(64))

            thread = threading.Thread(target=rewrite)
            thread.start()
            for _ in range(20):
                for queue, ring in enumerate(guest.rings):
                    ring.offer(*(noise.randrange(ENTRIES) for _ in range(4)))
                    with suppress(BlockingIOError):
                        guest.host.send(bytes(noise.randrange(12, 9000)))
                    guest.notify(queue)
                guest.take_away()
                guest.settle()
            done.set()
            thread.join()
        guest.prove_alive()


def test_a_driver_that_resets_the_interface_while_frames_come(memory: GuestMemory) -> None:
    with Guest(memory) as guest:
        for n in range(200):
            guest.begin_both(F_MRG)
            rx, tx = guest.rings
            rx.offer(*(rx.add([Buffer(DATA + 6000 * i, 6000, True)]) for i in range(12)))
            tx.offer(*(tx.add([Buffer(DATA, 100)]) for _ in range(5)))
            for queue in (RX, TX):
                guest.notify(queue)
            with suppress(BlockingIOError):
                guest.host.send(bytes(1000))
            if n % 2:
                guest.registers[STATUS] = 0
            guest.take_away()
        guest.prove_alive()
