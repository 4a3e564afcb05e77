"""Guests that break every rule of a vsock device, while host programs come and go; see `test_hostile.py`."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crackle.memory import GuestMemory
from crackle.virtio.vsock.device import Vsock
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
from support.vsock import CID, HEADER, HOST, REQUEST, RESPONSE, RST, RW, RX, SHUTDOWN, TX, Packet, decode

GPA, SIZE = 0x10000, 0x40000
END = GPA + SIZE
RINGS, TABLES, DATA = (GPA, GPA + 0x1000, GPA + 0x2000), GPA + 0x4000, GPA + 0x8000
SLOT = 0x2000
PORT = 80

queues = st.sampled_from([0, 1, 2])
# Few ports, so that packets meet connections; -1 stands for the port that a host program was given last.
ports = st.sampled_from([PORT, PORT, -1, -1, 1, 0xFFFFFFFF])
words = st.integers(0, 0xFFFFFFFF) | st.sampled_from([0, 1, 100, 1 << 18, 0xFFFFFFFF])

packets = st.tuples(
    st.just("packet"),
    st.tuples(
        st.integers(0, 9) | st.sampled_from([REQUEST, RESPONSE, RW, SHUTDOWN]), st.integers(0, 3), ports
    ),
    st.tuples(
        st.integers(0, 5000),  # bytes of data
        st.just(0) | st.sampled_from([-1, 1, -44, 1 << 31]),  # and how many more are announced
        st.sampled_from([0, 1, 2, 3, 0xFFFFFFFF]),
        words,
        words,
        st.sampled_from([(CID, HOST, 1)] * 8 + [(0, HOST, 1), (CID, 7, 1), (CID, HOST, 2)]),
    ),
)
programs = st.tuples(
    st.just("program"),
    st.integers(0, 3),
    st.sampled_from(
        ["connect", "connect", "garbage", "accept", "accept", "write", "write", "read", "finish", "close"]
    ),
)
ordinary = st.one_of(
    packets,
    packets,
    programs,
    programs,
    st.tuples(
        st.just("room"),
        slots,
        st.lists(st.sampled_from([1, 43, 44, 45, 300, 4140, 8000]), min_size=1, max_size=3),
    ),
    st.tuples(st.just("room"), slots, st.just([4140])),
    st.tuples(st.just("notify"), queues, st.none()),
)
breaches = broken(queues, GPA, SIZE, HEADER.size, [43, 44, 45, 100, 4096, 65580])
breaches |= st.just(("restore", None, None))
scripts = st.lists(ordinary, min_size=3, max_size=40) | st.lists(ordinary | breaches, min_size=3, max_size=40)


def data_packet(announced: int) -> tuple[str, Any, Any]:
    """Five bytes on the connection that the guest has opened."""
    return "packet", (RW, 1, PORT), (5, announced - 5, 0, 1 << 16, 0, (CID, HOST, 1))


class Guest(HostileGuest):
    """A vsock device, and the host programs about it."""

    tables = TABLES

    def __init__(self, memory: GuestMemory, directory: Path) -> None:
        memory.write(GPA, bytes(SIZE))
        self.path = str(directory / "v")
        super().__init__(Vsock(memory, CID, self.path))
        self.server = socket.socket(socket.AF_UNIX)
        Path(f"{self.path}_{PORT}").unlink(missing_ok=True)
        self.server.bind(f"{self.path}_{PORT}")
        self.server.listen(2)
        self.server.setblocking(False)
        self.programs: dict[int, socket.socket] = {}
        self.next_slot = 0

    @property
    def vsock(self) -> Vsock:
        assert isinstance(self.device, Vsock)
        return self.device

    def close(self) -> None:
        for program in (*self.programs.values(), self.server):
            program.close()
        super().close()

    def begin_all(self, features: int) -> None:
        self.rings = self.begin_queues(RINGS, ENTRIES, F_VERSION_1 | features)

    def play(self, action: str, first: Any, second: Any) -> None:
        if action == "packet":
            self.send(first, second)
        elif action == "program":
            self.act(first, second)
        elif action == "room":
            ring = self.rings[RX]
            ring.free = list(range(ENTRIES))
            ring.offer(ring.add([Buffer(DATA + SLOT * first, size, True) for size in second]))
            self.notify(RX)
        elif action == "restore":
            self.settle()
            state = self.transport.save()
            with suppress(ValueError):
                self.transport.restore(state)
        else:
            super().play(action, first, second)

    def send(self, what: tuple[int, int, int], rest: tuple[Any, ...]) -> None:
        op, src, dst = what
        size, more, bits, room, count, (src_cid, dst_cid, kind) = rest
        dst = self.vsock.host.last_port if dst == -1 else dst
        length = max(size + more, 0) & 0xFFFFFFFF
        packet = Packet(src_cid, dst_cid, src, dst, length, kind, op, bits, room, count, bytes(size))
        self.next_slot = (self.next_slot + 1) % 12
        self.memory.write(DATA + SLOT * self.next_slot, packet.encode())
        ring = self.rings[TX]
        ring.free = list(range(ENTRIES))
        ring.offer(ring.add([Buffer(DATA + SLOT * self.next_slot, 44 + size)]))
        self.notify(TX)

    def act(self, number: int, what: str) -> None:
        """Something that host program `number` does."""
        with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError, OSError):
            if what in ("connect", "garbage", "accept") and number in self.programs:
                self.programs.pop(number).close()
            if what in ("connect", "garbage"):
                program = self.programs[number] = socket.socket(socket.AF_UNIX)
                program.setblocking(False)
                program.connect(self.path)
                program.send(b"CONNECT %d\nabc" % number if what == "connect" else b"\0" * 40)
            elif what == "accept":
                self.programs[number], _ = self.server.accept()
                self.programs[number].setblocking(False)
            elif number in self.programs:
                program = self.programs[number]
                if what == "write":
                    program.send(bytes(20_000))
                elif what == "read":
                    program.recv(1 << 16)
                elif what == "finish":
                    program.shutdown(socket.SHUT_WR)
                else:
                    self.programs.pop(number).close()

    def open_streams(self) -> None:
        """A connection each way, with room for what comes."""
        well = (0, 0, 0, 1 << 16, 0, (CID, HOST, 1))
        for slot in range(8):
            self.play("room", slot, [4140])
        self.send((REQUEST, 1, PORT), well)
        self.settle()
        self.act(1, "accept")
        self.act(2, "connect")
        self.settle()
        self.send((RESPONSE, 2, -1), well)
        self.settle()

    def stale_programs(self) -> bool:
        """Whether there are some that connected while no driver was there."""
        self.settle()
        return self.vsock.connections > 0

    def prove_alive(self) -> None:
        """After a reset, a driver that behaves connects and is answered."""
        for program in self.programs.values():
            program.close()
        self.programs.clear()
        self.settle()
        self.memory.write(GPA, bytes(SIZE))
        while self.begin_all(0) or self.stale_programs():
            self.registers[STATUS] = 0
            assert self.vsock.connections == 0
        with suppress(BlockingIOError):
            while True:
                self.server.accept()[0].close()
        rx, tx = self.rings[RX], self.rings[TX]
        places = {rx.add([Buffer(DATA + SLOT * n, SLOT, True)]): DATA + SLOT * n for n in range(12)}
        rx.offer(*places)
        for packet in (
            Packet(op=REQUEST, src_port=5, dst_port=PORT),
            Packet(op=RW, src_port=5, dst_port=PORT, len=5, data=b"alive"),
        ):
            self.memory.write(DATA + 12 * SLOT, packet.encode())
            tx.offer(tx.add([Buffer(DATA + 12 * SLOT, len(packet.encode()))]))
            self.notify(TX)
            self.settle()
            assert len(tx.reap()) == 1
        [(head, written)] = rx.reap()
        assert decode(self.memory.read(places[head], written)).op == RESPONSE
        program, _ = self.server.accept()
        with program:
            assert program.recv(99) == b"alive"
            self.registers[STATUS] = 0
            assert program.recv(99) == b""
        assert not self.registers[STATUS] & NEEDS_RESET


def test_a_device_whose_driver_is_mad(memory: GuestMemory, tmp_path: Path) -> None:
    reached: Counter[str] = Counter()

    @given(script=scripts, features=st.sets(st.sampled_from([F_EVENT_IDX, F_INDIRECT])), begun=st.booleans())
    # Data each way, less of it than was announced, a program that does not greet, a broken ring.
    @example(script=[("program", 1, "write")], features=set(), begun=True)
    @example(script=[data_packet(announced=5)], features=set(), begun=True)
    @example(script=[data_packet(announced=6)], features=set(), begun=True)
    @example(script=[("program", 1, "garbage")], features=set(), begun=False)
    @example(
        script=[("descriptor", (TX, 0), (1 << 60, 44, 0, 0)), ("offer", TX, [0])], features=set(), begun=False
    )
    def attack(script: list[tuple[str, Any, Any]], features: set[int], begun: bool) -> None:
        with Guest(memory, tmp_path) as guest:
            guest.begin_all(sum(features))
            if begun:
                guest.open_streams()
            for step in script:
                guest.play(*step)
            for queue in range(3):
                guest.notify(queue)
            guest.settle()
            for name, count in guest.vsock.counters().items():
                reached[name] += count
            reached["broken"] += guest.device.broken_queues
            guest.prove_alive()

    attack()
    missing = {"rx_bytes_count", "tx_bytes_count", "conns_killed", "conn_event_fails", "broken"} - set(
        +reached
    )
    assert not missing, reached


@pytest.mark.parametrize("seed", range(3))
def test_a_guest_that_changes_its_rings_while_they_are_read(
    memory: GuestMemory, tmp_path: Path, seed: int
) -> None:
    """What was checked must be what is used: another CPU rewrites descriptors and headers meanwhile."""
    noise = random.Random(seed)
    bad = [
        struct.pack("<QIHH", gpa, size, bits, following)
        for gpa in (END - 8, END, 0, DATA, TABLES)
        for size in (16, 8, 72, 70000, 0xFFFFFFF0)
        for bits in (0, NEXT, WRITE, NEXT | WRITE, 4)
        for following in (0, 1, 15, 0xFFFF)
    ]
    with Guest(memory, tmp_path) as guest:
        for _ in range(20):
            memory.write(GPA, bytes(SIZE))
            guest.begin_all(F_INDIRECT)
            for queue, ring in enumerate(guest.rings):
                for i in range(ENTRIES):
                    flag = WRITE if queue != TX else 0
                    ring.write_descriptor(i, DATA + 4096 * i, 4096, flag | (NEXT if i % 4 else 0), i ^ 1)
            done = threading.Event()

            def rewrite(done: threading.Event = done) -> None:
                while not done.is_set():
                    ring = guest.rings[noise.randrange(3)]
                    memory.write(ring.desc + 16 * noise.randrange(ENTRIES), noise.choice(bad))
                    packet = Packet(
                        op=noise.randrange(9),
                        src_port=noise.randrange(3),
                        dst_port=PORT,
                        len=noise.randrange(9000),
                    )
                    memory.write(DATA + 4096 * noise.randrange(16), packet.encode())

            thread = threading.Thread(target=rewrite)
            thread.start()
            for n in range(20):
                for queue, ring in enumerate(guest.rings):
                    ring.offer(*(noise.randrange(ENTRIES) for _ in range(4)))
                    guest.notify(queue)
                guest.act(n % 4, noise.choice(["connect", "accept", "write", "read", "close"]))
                guest.settle()
            done.set()
            thread.join()
        guest.prove_alive()


def test_a_driver_that_resets_the_device_while_connections_come_and_go(
    memory: GuestMemory, tmp_path: Path
) -> None:
    with Guest(memory, tmp_path) as guest:
        for n in range(200):
            guest.begin_all(0)
            guest.play("room", 0, [4000])
            guest.act(n % 4, ("connect", "write", "accept", "close")[n % 5 % 4])
            guest.send((REQUEST if n % 3 else RST, n % 4, PORT), (100, 0, 0, 1 << 16, 0, (CID, HOST, 1)))
            if n % 2:
                guest.registers[STATUS] = 0
        guest.prove_alive()
