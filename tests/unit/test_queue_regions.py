"""Queues and devices over guest memory whose regions come and go, and buffers that lie in two of them."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.virtio.block.device import Block
from crackle.virtio.queue import Virtqueue
from crackle.virtio.state import QueueState
from crackle.virtio.vhost_user.block import VhostUserBlock
from support.driver import F_VERSION_1, NEEDS_RESET, STATUS, Bench, Buffer, Ring, queue_for
from support.vhost_user import DAEMON, Impostor, StorageDaemon

PAGE = 4096
MIB = 1 << 20
RING, TABLE, DATA = 0x1000, 0x8000, 0x10000
READ, WRITE = 0, 1


def pieces(buffers: list[Buffer], edges: list[int]) -> list[tuple[int, int, bool]]:
    """The buffers, cut at the edges between regions."""
    found = []
    for gpa, size, writable in buffers:
        cuts = [gpa, *(edge for edge in edges if gpa < edge < gpa + size), gpa + size]
        found += [(a, b - a, writable) for a, b in pairwise(cuts) if a < b]
    return found


# -- buffers across regions ----------------------------------------------------------------------------------

EDGES = [DATA + PAGE * i for i in (0, 4, 5, 6, 12)]
END = EDGES[-1]


@pytest.fixture
def patchwork() -> Iterator[GuestMemory]:
    """Rings and tables in the first region; then four more without a gap."""
    places = [(0, DATA), *((a, b - a) for a, b in pairwise(EDGES))]
    with GuestMemory(places) as memory:
        yield memory


@given(
    parts=st.lists(
        st.tuples(st.integers(DATA - PAGE, END - 1), st.integers(1, 8 * PAGE)), min_size=1, max_size=8
    ),
    writable=st.integers(0, 8),
    direct=st.integers(0, 8),
)
def test_a_buffer_across_regions_is_one_piece_in_each(
    parts: list[tuple[int, int]], writable: int, direct: int
) -> None:
    places = [(0, DATA), *((a, b - a) for a, b in pairwise(EDGES))]
    with GuestMemory(places) as memory:
        ring = Ring(memory, RING, 8)
        queue = queue_for(ring)
        buffers = [Buffer(gpa, min(size, END - gpa), i >= writable) for i, (gpa, size) in enumerate(parts)]
        head = ring.add(buffers, direct=min(direct, len(buffers) if direct else 0) % 8, table=TABLE)
        ring.offer(head)
        assert queue.take() == (head, pieces(buffers, EDGES))


def test_a_buffer_that_ends_behind_the_last_of_adjacent_regions_breaks_the_queue(
    patchwork: GuestMemory,
) -> None:
    ring = Ring(patchwork, RING, 8)
    queue = queue_for(ring)
    ring.offer(ring.add([Buffer(END - PAGE, PAGE + 1)]))
    with pytest.raises(ValueError, match="outside guest memory"):
        queue.take()


def test_the_longest_chain_may_have_buffers_across_regions_too(patchwork: GuestMemory) -> None:
    ring = Ring(patchwork, RING, 256)
    queue = queue_for(ring)
    buffers = [Buffer(DATA + 64 * i, 64) for i in range(255)] + [Buffer(DATA, END - DATA, True)]
    head = ring.add(buffers)
    ring.offer(head)
    assert queue.take() == (head, pieces(buffers, EDGES))


@pytest.mark.parametrize("direct", [256, 0])
def test_a_chain_in_too_many_pieces_breaks_the_queue(patchwork: GuestMemory, direct: int) -> None:
    """Every buffer the same, across all the regions: no driver does that, and there is no room for it."""
    ring = Ring(patchwork, RING, 256)
    queue = queue_for(ring)
    buffers = [Buffer(DATA, END - DATA, True)] * 256
    ring.offer(ring.add(buffers, direct=direct, table=TABLE))
    with pytest.raises(ValueError, match="too many pieces"):
        queue.take()


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_a_ring_across_regions_is_refused(patchwork: GuestMemory, part: str) -> None:
    places = {"desc": RING, "avail": RING + 0x1000, "used": RING + 0x2000, part: EDGES[1] - 16}
    state = QueueState(size=16, ready=True, next_avail=0, next_used=0, **places)
    with pytest.raises(ValueError, match="outside guest memory"):
        Virtqueue(patchwork, 256).restore(state, event_idx=False, indirect=True)


# -- devices -------------------------------------------------------------------------------------------------


class Disk:
    """A disk with a driver: the ring at `base`, headers behind it."""

    def __init__(self, bench: Bench, base: int) -> None:
        self.bench, self.memory, self.base = bench, bench.memory, base
        self.start()

    def start(self) -> None:
        self.ring = self.bench.begin(self.base, 64, F_VERSION_1)

    def request(self, kind: int, sector: int, place: int, size: int) -> int:
        """The status, 0xff when the device did not answer."""
        header = self.base + 0x4000
        self.memory.write(header, struct.pack("<IIQ", kind, 0, sector) + b"\xff")
        data = Buffer(place, size, kind == READ)
        self.ring.offer(self.ring.add([Buffer(header, 16), data, Buffer(header + 16, 1, True)]))
        self.bench.notify()
        self.bench.settle()
        self.ring.reap()
        return self.memory.read(header + 16, 1)[0]

    @property
    def needs_reset(self) -> bool:
        return bool(self.bench.registers[STATUS] & NEEDS_RESET)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = os.urandom(MIB)
    (tmp_path / "disk").write_bytes(data)
    return data


@pytest.fixture(params=["Sync", "Async"])
def bench(request: pytest.FixtureRequest, tmp_path: Path, content: bytes) -> Iterator[Bench]:
    memory = GuestMemory([(0, MIB)])
    memory.track_dirty(True)
    with Bench(Block(memory, str(tmp_path / "disk"), engine=request.param)) as bench:
        yield bench


def test_a_disk_reads_and_writes_across_regions(bench: Bench, content: bytes, tmp_path: Path) -> None:
    memory = bench.memory
    disk = Disk(bench, RING)
    memory.add_region(MIB, MIB)
    place = MIB - 3 * PAGE - 512
    assert disk.request(READ, 8, place, 64 << 10) == 0
    assert memory.read(place, 64 << 10) == content[4096 : 4096 + (64 << 10)]
    bits = int.from_bytes(memory.take_dirty(1), "little")
    assert bits == (1 << 13) - 1, "the pages behind the edge are dirty"
    data = os.urandom(64 << 10)
    memory.write(place, data)
    assert disk.request(WRITE, 0, place, 64 << 10) == 0
    assert (tmp_path / "disk").read_bytes()[: 64 << 10] == data


def test_a_disk_whose_rings_go_waits_for_a_reset_and_works_after_it(bench: Bench, content: bytes) -> None:
    memory = bench.memory
    added = memory.add_region(64 * MIB, MIB)
    disk = Disk(bench, 64 * MIB)
    assert disk.request(READ, 0, DATA, 512) == 0
    bench.interrupts()
    memory.remove_region(added)
    assert disk.needs_reset
    assert bench.interrupts() == 1, "the driver is told"
    assert bench.device.fault == "the guest memory that the queue lies in was taken away"
    bench.notify()
    bench.settle()
    # The same memory again: the old rings are not looked at, a reset makes the device whole.
    memory.add_region(64 * MIB, MIB)
    assert disk.needs_reset
    disk.start()
    assert not disk.needs_reset
    assert disk.request(READ, 0, DATA, 512) == 0
    assert memory.read(DATA, 512) == content[:512]


def test_a_queue_that_was_set_up_before_its_memory_went_is_not_enabled(bench: Bench) -> None:
    memory = bench.memory
    added = memory.add_region(64 * MIB, MIB)
    bench.begin(64 * MIB, 64, F_VERSION_1, drive=False)
    memory.remove_region(added)
    assert not bench.device.queues[0].ready
    bench.registers.drive()
    bench.notify()
    bench.settle()
    disk = Disk(bench, RING)
    assert disk.request(READ, 0, DATA, 512) == 0


def test_memory_that_no_queue_lies_in_goes_unnoticed(bench: Bench, content: bytes) -> None:
    memory = bench.memory
    added = memory.add_region(64 * MIB, MIB)
    disk = Disk(bench, RING)
    assert disk.request(READ, 0, 64 * MIB, 4096) == 0
    assert memory.read(64 * MIB, 4096) == content[:4096]
    memory.remove_region(added)
    assert not disk.needs_reset
    assert disk.request(READ, 0, DATA, 4096) == 0
    assert disk.request(READ, 0, 64 * MIB, 4096) == 0xFF, "a buffer there is one outside guest memory now"
    assert disk.needs_reset


def test_regions_come_and_go_while_a_disk_works(bench: Bench, content: bytes) -> None:
    """The I/O thread fills buffers beside and inside what is taken away under it; under AddressSanitizer this finds
    whoever looks too late.
    """
    memory = bench.memory
    disk = Disk(bench, RING)
    stop = threading.Event()
    failures: list[BaseException] = []

    def change() -> None:
        try:
            while not stop.is_set():
                added = [memory.add_region(64 * MIB + i * MIB, MIB) for i in range(3)]
                for each in (added[1], added[0], added[2]):
                    memory.remove_region(each)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        served = lost = 0
        for i in range(300):
            place = 64 * MIB + i % 3 * MIB - 2048 if i % 3 == 2 else DATA
            header = RING + 0x4000
            memory.write(header, struct.pack("<IIQ", READ, 0, i % 64) + b"\xff")
            head = disk.ring.add(
                [Buffer(header, 16), Buffer(place, 4096, True), Buffer(header + 16, 1, True)]
            )
            disk.ring.offer(head)
            bench.notify()
            bench.settle()
            if memory.read(header + 16, 1) == b"\0":
                served += 1
                if place == DATA:
                    assert memory.read(DATA, 4096) == content[i % 64 * 512 :][:4096]
                disk.ring.reap()
            else:
                assert place != DATA
                assert disk.needs_reset
                lost += 1
                disk.start()
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert served >= 200


# -- vhost-user ----------------------------------------------------------------------------------------------


def regions_told(backend: Impostor) -> list[list[int]]:
    """The guest addresses of each memory table that the back end was given."""
    tables = [payload for name, payload in backend.told if name == "SET_MEM_TABLE"]
    return [
        [struct.unpack_from("<Q", table, 8 + 32 * i)[0] for i in range(struct.unpack_from("<I", table)[0])]
        for table in tables
    ]


@pytest.fixture
def shared() -> Iterator[GuestMemory]:
    with GuestMemory([(0, MIB)], backing="memfd") as memory:
        yield memory


@pytest.mark.parametrize("acknowledges", [True, False])
def test_a_back_end_is_told_of_each_change(shared: GuestMemory, tmp_path: Path, acknowledges: bool) -> None:
    backend = Impostor(tmp_path / "socket", protocol=1 << 9 | acknowledges << 3)
    try:
        with Bench(VhostUserBlock(shared, backend.path)) as bench:
            bench.begin(RING, 64)
            added = shared.add_region(64 * MIB, MIB)
            shared.remove_region(added)
            assert regions_told(backend) == [[0], [0, 64 * MIB], [0]]
            assert not bench.registers[STATUS] & NEEDS_RESET
            with pytest.raises(ConfigError, match="memory that is not shared"):
                shared.add_region(64 * MIB, MIB, backing="anonymous")
            for i in range(7):
                shared.add_region((100 + i) * MIB, MIB)
            with pytest.raises(ConfigError, match="8 regions of guest memory at most"):
                shared.add_region(64 * MIB, MIB)
            assert len(shared.regions) == 8
            assert not bench.registers[STATUS] & NEEDS_RESET, "what is refused beforehand costs nothing"
            shared.remove_region(shared.regions[0])
            assert "GET_VRING_BASE" in backend.names(), "the ring is taken from it before its memory goes"
            assert bench.registers[STATUS] & NEEDS_RESET
    finally:
        backend.close()


def test_a_back_end_that_refuses_new_memory_undoes_it_and_is_of_no_use(
    shared: GuestMemory, tmp_path: Path
) -> None:
    backend = Impostor(tmp_path / "socket")
    try:
        with Bench(VhostUserBlock(shared, backend.path)) as bench:
            bench.begin(RING, 64)
            backend.answers["SET_MEM_TABLE"] = None
            with pytest.raises(ConfigError, match="SET_MEM_TABLE"):
                shared.add_region(64 * MIB, MIB)
            assert len(shared.regions) == 1
            assert bench.registers[STATUS] & NEEDS_RESET
    finally:
        backend.close()


@pytest.mark.skipif(DAEMON is None, reason="no qemu-storage-daemon")
def test_a_real_back_end_fills_memory_that_came_later(
    shared: GuestMemory, tmp_path: Path, content: bytes
) -> None:
    backend = StorageDaemon(tmp_path / "disk", tmp_path)
    try:
        with Bench(VhostUserBlock(shared, str(backend.socket))) as bench:
            disk = Disk(bench, RING)
            added = shared.add_region(64 * MIB, MIB)
            assert disk.request(READ, 16, 64 * MIB, 8192) == 0
            assert shared.read(64 * MIB, 8192) == content[8192:16384]
            shared.remove_region(added)
            assert disk.request(READ, 0, DATA, 512) == 0
            assert shared.read(DATA, 512) == content[:512]
    finally:
        backend.close()
