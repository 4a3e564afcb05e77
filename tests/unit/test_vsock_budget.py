"""What a guest, or a stranger with access to the socket, can make a vsock device hold, and for how long."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from crackle.runtime.descriptors import measure_descriptors
from support.driver import Buffer
from support.vsock import (
    REQUEST,
    RST,
    RW,
    SHUT_BOTH,
    SHUTDOWN,
    TX,
    Guest,
    Packet,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LEAST_ROOM, MOST_ROOM, SHARED_ROOM = 2 << 10, 256 << 10, 16 << 20
MAX_CONNECTIONS, MAX_GREETINGS = 8192, 256
SIOCOUTQ = 0x5411


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "v.sock")


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Sets how many descriptors the process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, hard), hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def many_files(limit: Callable[[int], None]) -> None:
    limit(1 << 20)


class Streams:
    """A guest's connections to a host program that accepts them, one a port, and what it was told of each."""

    def __init__(self, guest: Guest, port: int = 80) -> None:
        self.guest, self.port = guest, port
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(f"{guest.vsock.uds_path}_{port}")
        self.server.listen(4096)
        self.server.setblocking(False)
        self.hosts: list[socket.socket] = []
        self.room: dict[int, int] = {}
        self.edge: dict[int, int] = {}
        self.sent: dict[int, int] = {}
        self.ended: set[int] = set()
        self.posted = 0

    def post(self, packet: Packet) -> None:
        self.guest.post(packet)
        self.posted += 1
        if self.posted % 50 == 0:
            self.hear()

    def open(self, count: int) -> None:
        first = 1000 + len(self.sent)
        for src in range(first, first + count):
            self.sent[src] = 0
            self.post(Packet(op=REQUEST, src_port=src, dst_port=self.port))
        self.hear()

    def hear(self) -> None:
        for packet in self.guest.collect():
            src = packet.dst_port
            if packet.op == RST:
                self.ended.add(src)
                continue
            assert LEAST_ROOM <= packet.buf_alloc <= MOST_ROOM
            edge = packet.fwd_cnt + packet.buf_alloc
            assert edge >= self.edge.get(src, 0), "what the guest was told it may send was taken back"
            self.room[src], self.edge[src] = packet.buf_alloc, edge
        with suppress(BlockingIOError):
            while True:
                self.hosts.append(self.server.accept()[0])

    def send(self, src: int, most: int = 32 << 10) -> int:
        """As much as may be, up to `most` bytes."""
        size = min(self.edge[src] - self.sent[src], most)
        if size > 0 and src not in self.ended:
            self.sent[src] += size
            self.post(Packet(op=RW, src_port=src, dst_port=self.port, len=size, data=bytes(size)))
            return size
        return 0

    def fill(self) -> None:
        """Send until the host program's silence stops every connection."""
        moved = True
        while moved:
            moved = False
            for src in self.sent:
                moved |= self.send(src) > 0
            self.hear()

    def close(self) -> None:
        for host in (*self.hosts, self.server):
            host.close()


@pytest.fixture
def guest(path: str) -> Iterator[Guest]:
    with Guest(path, buffers=200) as guest:
        yield guest


@pytest.fixture
def streams(guest: Guest) -> Iterator[Streams]:
    found = Streams(guest)
    yield found
    found.close()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def queued_in_sockets() -> int:
    """Bytes, with what the kernel needs for them, that this process has sent into sockets and nobody has read."""
    total, value = 0, array.array("i", [0])
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                fcntl.ioctl(int(name), SIOCOUTQ, value)
                total += value[0]
    return total


# -- credit and memory ---------------------------------------------------------------------------------------


def test_few_connections_have_much_room_and_many_have_less_and_none_has_none(
    streams: Streams, many_files: None
) -> None:
    streams.open(1)
    assert set(streams.room.values()) == {MOST_ROOM}
    streams.open(2000)
    rooms = list(streams.room.values())
    assert rooms == sorted(rooms, reverse=True)
    assert rooms[-1] == LEAST_ROOM
    assert sum(room - LEAST_ROOM for room in rooms) == streams.guest.vsock.streams.pool.rooms <= SHARED_ROOM
    assert not streams.ended


def test_a_connection_that_is_used_gets_more_room_and_gives_it_back(
    streams: Streams, many_files: None
) -> None:
    """And is never told less than it was told before: `Streams.hear` asserts it."""
    streams.open(100)
    late = max(streams.room)
    begun = streams.room[late]
    assert begun < 64 << 10

    def pump(sources: list[int], rounds: int) -> None:
        for _ in range(rounds):
            for src in sources:
                streams.send(src, 16 << 10)
            streams.hear()
            for host in streams.hosts:
                with suppress(BlockingIOError):
                    while len(host.recv(1 << 20, socket.MSG_DONTWAIT)) == 1 << 20:
                        pass

    pump([late], 100)
    assert streams.room[late] >= 4 * begun
    alone = streams.room[late]
    streams.open(400)
    pump(list(streams.room), 40)
    assert streams.room[late] < alone
    assert max(streams.room.values()) <= 2 * SHARED_ROOM // 500
    assert streams.guest.vsock.streams.pool.rooms <= SHARED_ROOM
    for src in streams.sent:
        streams.post(Packet(op=SHUTDOWN, src_port=src, dst_port=80, flags=SHUT_BOTH))
    streams.hear()
    assert streams.guest.vsock.connections == 0
    assert streams.guest.vsock.streams.pool.rooms == 0


def test_the_room_is_kept_to_the_byte(streams: Streams) -> None:
    streams.open(2)
    for src in streams.sent:
        while streams.send(src, 60_000):
            pass
    streams.guest.settle()
    within, beyond = streams.sent
    assert not streams.ended
    size = streams.edge[beyond] - streams.sent[beyond]
    streams.hear()
    # What the sockets took has been told meanwhile; up to there, and not a byte beyond.
    for src, more in ((within, 0), (beyond, 1)):
        while streams.edge[src] - streams.sent[src] > 60_000:
            streams.send(src, 60_000)
            streams.hear()
        size = streams.edge[src] - streams.sent[src] + more
        if size:
            streams.guest.post(Packet(op=RW, src_port=src, dst_port=80, len=size, data=bytes(size)))
        streams.guest.settle()
        assert streams.guest.vsock.connections == (2 if src == within else 1)


def test_eight_thousand_connections_to_a_program_that_does_not_read_hold_little(
    path: str, many_files: None, record_property: Callable[[str, object], None]
) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The program's ends are this process's too.
    count = min(MAX_CONNECTIONS, (soft - 400) // 2)
    with Guest(path, buffers=200) as guest:
        streams = Streams(guest)
        try:
            before = resident()
            descriptors = len(os.listdir("/proc/self/fd"))
            streams.open(count)
            assert guest.vsock.connections == count
            streams.fill()
            assert not streams.ended
            held, queued = resident() - before, queued_in_sockets()
            descriptors = len(os.listdir("/proc/self/fd")) - descriptors - len(streams.hosts)
            print(
                f"{count} connections: {descriptors} descriptors, {held / (1 << 20):.0f} MiB resident, "
                f"{queued / (1 << 20):.0f} MiB in socket buffers, {sum(streams.sent.values()) >> 20} MiB sent"
            )
            assert descriptors == count
            # The rooms, the connections themselves, and what the test remembers of them.
            assert held <= SHARED_ROOM + MAX_CONNECTIONS * LEAST_ROOM + (24 << 20)
            # Half a buffer more than the buffer, or two of the smallest pieces that the kernel makes.
            assert queued <= 3 * SHARED_ROOM // 2 + MAX_CONNECTIONS * (10 << 10)
        finally:
            streams.close()


def test_a_packet_beyond_the_credit_is_not_written_however_large(streams: Streams) -> None:
    """Its buffers are the same 4 MiB a hundred times over."""
    streams.open(1)
    guest = streams.guest
    header = Packet(op=RW, src_port=1000, dst_port=80, len=100 * (4 << 20)).encode()
    guest.memory.write(0x3800000, header)
    part = Buffer(0x2000000, 4 << 20)
    guest.tx.offer(guest.tx.add([Buffer(0x3800000, len(header)), *[part] * 100]))
    guest.notify(TX)
    streams.hear()
    assert streams.ended == {1000}
    assert streams.hosts[0].recv(1) == b""


def test_connections_that_come_and_go_leave_nothing(guest: Guest, many_files: None) -> None:
    """Without a receive buffer, too: what the guest is still to be told is bounded by the table, and holds it up."""
    streams = Streams(guest)
    before = len(os.listdir("/proc/self/fd"))
    guest.collect(refill=False)
    for round_ in range(20):
        for src in range(1000):
            guest.post(Packet(op=REQUEST, src_port=1000 * round_ + src, dst_port=80))
            guest.post(Packet(op=RST, src_port=1000 * round_ + src, dst_port=80))
            if src % 50 == 49:
                guest.settle()
                guest.tx.reap()
        with suppress(BlockingIOError):
            while True:
                streams.server.accept()[0].close()
    assert guest.vsock.connections <= MAX_CONNECTIONS
    streams.close()
    guest.registers[0x70] = 0
    assert guest.vsock.connections == 0
    assert len(os.listdir("/proc/self/fd")) <= before
    assert guest.vsock.streams.pool.rooms == 0


# -- descriptors ---------------------------------------------------------------------------------------------


def test_guests_leave_the_process_a_reserve_of_descriptors(path: str, limit: Callable[[int], None]) -> None:
    limit(len(os.listdir("/proc/self/fd")) + 400)
    with Guest(path, buffers=200) as guest:
        streams = Streams(guest)
        most = guest.vsock.max_connections
        assert 200 < most <= 400 - 128
        # The host programs' ends, which are this process's too here, shall not count.
        limit(1 << 20)
        streams.open(most + 50)
        assert guest.vsock.connections == most
        assert len(streams.ended) == 50
        streams.close()


@pytest.mark.parametrize("left", [0, 1, 20])
def test_a_low_limit_is_shared_in_halves(path: str, limit: Callable[[int], None], left: int) -> None:
    # The device itself has eight descriptors, and more are open while it is made.
    limit(len(os.listdir("/proc/self/fd")) + 20 + left)
    with Guest(path) as guest:
        most = guest.vsock.max_connections
        assert 0 <= most <= 10 + left
        limit(1 << 20)
        streams = Streams(guest)
        streams.open(most + 2)
        assert (guest.vsock.connections, len(streams.ended)) == (most, 2)
        streams.close()


def test_a_program_that_comes_when_there_is_no_descriptor_is_served_when_there_is_one(
    path: str, limit: Callable[[int], None]
) -> None:
    limit(len(os.listdir("/proc/self/fd")) + 100)
    with Guest(path, buffers=200) as guest:
        streams = Streams(guest)
        limit(1 << 20)
        streams.open(guest.vsock.max_connections)
        assert not streams.ended
        program = socket.socket(socket.AF_UNIX)
        program.settimeout(10)
        program.connect(path)
        program.sendall(b"CONNECT 52\n")
        guest.settle()
        before = guest.io.wakeups
        time.sleep(0.5)
        assert guest.io.wakeups - before <= 15, "the listener is looked at all the time"
        assert guest.quiet()
        guest.send(RST, 1000, 80)
        assert guest.packet(REQUEST).dst_port == 52
        program.close()
        streams.close()


def test_the_microvms_of_a_process_share_its_descriptors(
    tmp_path: Path, limit: Callable[[int], None]
) -> None:
    limit(len(os.listdir("/proc/self/fd")) + 300)
    with Guest(str(tmp_path / "a"), buffers=200) as first:
        one = Streams(first)
        limit(1 << 20)
        one.open(first.vsock.max_connections)
        assert not one.ended
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 200, hard))
        with Guest(str(tmp_path / "b"), buffers=200) as second:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            other = Streams(second)
            left = second.vsock.max_connections - first.vsock.connections
            assert 0 < left < 200
            other.open(left)
            assert not other.ended
            other.open(1)
            assert len(other.ended) == 1
            other.close()
        one.close()


def test_the_budget_is_found_without_a_list_of_descriptors(
    monkeypatch: pytest.MonkeyPatch, limit: Callable[[int], None]
) -> None:
    limit(1000)
    exact = measure_descriptors()

    def none(_path: str) -> list[str]:
        raise FileNotFoundError

    monkeypatch.setattr(os, "listdir", none)
    assert abs(measure_descriptors() - exact) < 100


# -- strangers -----------------------------------------------------------------------------------------------


def test_silent_programs_give_way_to_one_that_speaks(guest: Guest, many_files: None) -> None:
    begin = time.monotonic()
    silent = []
    for _ in range(MAX_GREETINGS):
        program = socket.socket(socket.AF_UNIX)
        program.connect(guest.vsock.uds_path)
        silent.append(program)
    guest.settle()
    assert guest.vsock.connections == MAX_GREETINGS
    late = socket.socket(socket.AF_UNIX)
    late.connect(guest.vsock.uds_path)
    late.sendall(b"CONNECT 52\n")
    assert guest.packet(REQUEST, within=10).dst_port == 52
    assert time.monotonic() - begin >= 1.9
    silent[0].settimeout(5)
    assert silent[0].recv(1) == b""
    # The guest was not kept from its own connections meanwhile, nor are the others ended.
    silent[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        silent[1].recv(1)
    for program in (*silent, late):
        program.close()


def test_programs_that_connect_in_a_loop_keep_nobody_from_the_io_thread(guest: Guest) -> None:
    streams = Streams(guest)
    streams.open(1)
    done = threading.Event()
    made = [0]

    def hammer() -> None:
        while not done.is_set():
            with socket.socket(socket.AF_UNIX) as program:
                program.setblocking(False)
                with suppress(OSError):
                    program.connect(guest.vsock.uds_path)
                    made[0] += 1

    thread = threading.Thread(target=hammer)
    thread.start()
    try:
        served = 0
        deadline = time.monotonic() + 30
        while (served < 50 or made[0] <= 50) and time.monotonic() < deadline:
            guest.post(Packet(op=RW, src_port=1000, dst_port=80, len=5, data=b"hello"))
            streams.hosts[0].settimeout(10)
            assert streams.hosts[0].recv(5) == b"hello"
            guest.tx.reap()
            served += 1
    finally:
        done.set()
        thread.join()
        streams.close()
    assert served >= 50
    assert made[0] > 50


def test_a_backlog_that_stays_full_costs_no_cpu_however_many_wait_for_it(path: str, many_files: None) -> None:
    with Guest(path, buffers=200) as guest:
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{path}_80")
        server.listen(0)
        for src in range(3000):
            guest.post(Packet(op=REQUEST, src_port=src, dst_port=80))
            if src % 100 == 99:
                guest.settle()
                guest.tx.reap()
        before = guest.io.wakeups
        time.sleep(0.5)
        # At most a batch of them each millisecond.
        assert guest.io.wakeups - before < 700
        ended = 0
        deadline = time.monotonic() + 30
        while ended < 2900 and time.monotonic() < deadline:
            ended += sum(packet.op == RST for packet in guest.collect())
        assert ended >= 2900
        server.close()


def test_a_greeting_is_counted_once_however_it_ends(guest: Guest) -> None:
    """Those that speak, that hang up and that talk nonsense leave their places to others."""
    for n in range(3 * MAX_GREETINGS):
        with socket.socket(socket.AF_UNIX) as program:
            program.connect(guest.vsock.uds_path)
            program.sendall((b"CONNECT 9\n", b"nonsense\n", b"")[n % 3])
        if n % 32 == 0:
            guest.collect()
    program = socket.socket(socket.AF_UNIX)
    program.connect(guest.vsock.uds_path)
    program.sendall(b"CONNECT 77\n")
    while guest.packet().dst_port != 77:
        pass
    program.close()


def test_a_driver_that_never_stops_leaves_others_their_turn(tmp_path: Path) -> None:
    """A queue that is never empty, on the thread that serves another device too."""
    with Guest(str(tmp_path / "a"), buffers=200) as other:
        streams = Streams(other)
        streams.open(1)
        streams.hosts[0].settimeout(10)
        flood = Guest(str(tmp_path / "b"), io=other.io)
        reset = Packet(op=RST, src_port=1, dst_port=1).encode()
        flood.memory.write(0x2000000, reset)
        ring = flood.tx
        for slot in range(ring.size):
            ring.write_descriptor(slot, 0x2000000, len(reset), 0, 0)
            flood.memory.write(ring.avail + 4 + 2 * slot, struct.pack("<H", slot))
        done = threading.Event()

        def refill() -> None:
            while not done.is_set():
                most = (ring.used_idx + ring.size) & 0xFFFF
                flood.memory.write(ring.avail + 2, struct.pack("<H", most))
                flood.notify(TX)

        thread = threading.Thread(target=refill)
        thread.start()
        rounds, deadline = 0, time.monotonic() + 30
        try:
            while rounds < 20 or flood.vsock.mux.tx_packets <= 10_000:
                assert time.monotonic() < deadline
                rounds += 1
                other.post(Packet(op=RW, src_port=1000, dst_port=80, len=5, data=b"hello"))
                assert streams.hosts[0].recv(5) == b"hello"
        finally:
            done.set()
            thread.join()
        assert not flood.device.broken_queues
        streams.close()
        other.io.close()
        flood.device.close()
        flood.memory.close()
