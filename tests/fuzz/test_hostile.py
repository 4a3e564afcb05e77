"""Guests that break every rule: hostile rings, registers and requests against the native devices.

Nothing here knows what the right answer is, only what must never happen: a crash, a hang, a byte touched
outside guest memory, a device that cannot be used again after a reset. `test_asan.py` runs this under
AddressSanitizer as well.
"""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import crackle.virtio.queue
from crackle.devices.serial import Serial
from crackle.kvm.bus import Bus
from crackle.memory import GuestMemory
from crackle.virtio.block import Block
from crackle.virtio.queue import Virtqueue
from crackle.virtio.state import QueueState
from support import driver
from support.driver import F_EVENT_IDX, F_INDIRECT, F_VERSION_1, NEEDS_RESET, STATUS, Bench, Buffer, Ring
from support.fence import SANITIZED, Fenced

GPA, SIZE = 0x10000, 0x10000
"""The memory neither begins at address 0 nor ends where an address space does."""
END = GPA + SIZE
RING, HEADERS, TABLES, DATA = GPA, GPA + 0x3000, GPA + 0x4000, GPA + 0x8000
SECTORS = 16

edges = [0, 1, GPA - 16, GPA - 1, GPA, END - 17, END - 16, END - 1, END, END + 1, 1 << 32, (1 << 64) - 1]
words = st.integers(0, (1 << 64) - 1)
widths = st.sampled_from([1, 2, 4, 8])
addresses = st.sampled_from(edges) | st.integers(GPA, END) | words
sizes = st.sampled_from([0, 1, 15, 16, 17, 32, 512, SIZE - 1, SIZE, SIZE + 1, 1 << 31, (1 << 32) - 1])
lengths = sizes | st.integers(0, 64) | st.integers(0, (1 << 32) - 1)
flags = st.integers(0, 7) | st.integers(0, 0xFFFF)
indices = st.integers(0, 9) | st.integers(0, 0xFFFF)
descriptors = st.tuples(addresses, lengths, flags, indices)
seeds = st.integers(0, (1 << 32) - 1)


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    fenced = Fenced(GPA, SIZE)
    yield fenced.memory
    fenced.close()


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "disk"
    path.write_bytes(bytes(SECTORS * 512))
    return path


class Guest(Bench):
    """A disk over memory that outlives it."""

    def __init__(self, memory: GuestMemory, disk: Path, **options: bool) -> None:
        memory.write(GPA, bytes(SIZE))
        super().__init__(Block(memory, str(disk), **options))

    def close(self) -> None:
        self.io.close()
        self.device.close()

    def prove_alive(self) -> None:
        """After a reset, a driver that behaves is served."""
        self.memory.write(GPA, bytes(SIZE))
        ring = self.begin(RING, 16, F_VERSION_1)
        self.memory.write(HEADERS, (8).to_bytes(16, "little"))
        ring.offer(ring.add([Buffer(HEADERS, 16), Buffer(DATA, 21, True)]))
        self.notify()
        self.settle()
        assert [written for _, written in ring.reap()] == [21]
        assert not self.registers[STATUS] & NEEDS_RESET


def test_the_core_under_test_is_the_one_that_was_asked_for() -> None:
    assert (Path("build/asan") in [Path(*Path(crackle.virtio.queue.__file__).parts[-6:-4])]) == SANITIZED


def drain(queue: Virtqueue) -> None:
    """Take and give back whatever there is, and check each chain."""
    for _ in range(1000):
        try:
            found = queue.take()
        except ValueError:
            break
        if found is None:
            break
        head, buffers = found
        assert head < queue.size
        assert len(buffers) <= queue.size
        assert sorted(buffers, key=lambda buffer: buffer[2]) == buffers
        for gpa, size, _ in buffers:
            assert size > 0
            assert GPA <= gpa < gpa + size <= END
        queue.give(head, len(buffers))


@given(
    seed=seeds,
    order=st.integers(0, 8),
    places=st.tuples(*[st.integers(GPA, END)] * 3),
    start=st.integers(0, 0xFFFF),
    event_idx=st.booleans(),
    sparse=st.booleans(),
)
def test_noise_for_a_ring(
    memory: GuestMemory,
    seed: int,
    order: int,
    places: tuple[int, int, int],
    start: int,
    event_idx: bool,
    sparse: bool,
) -> None:
    """Rings anywhere, over one another too, in memory full of random bytes."""
    noise = random.Random(seed)
    content = bytearray(noise.randbytes(SIZE))
    if sparse:  # small numbers are more often valid
        for i in range(SIZE):
            if i % 16 not in (0, 1, 2, 8, 12, 14):
                content[i] = 0
    memory.write(GPA, content)
    desc, avail, used = places
    state = QueueState(
        size=1 << order,
        ready=True,
        desc=desc & ~15,
        avail=avail & ~1,
        used=used & ~3,
        next_avail=start,
        next_used=start,
    )
    queue = Virtqueue(memory, 256)
    try:
        queue.restore(state, event_idx=event_idx, indirect=True)
    except ValueError:
        return
    for offered in (1, noise.randrange(1 << order) + 1, 0x8000):
        idx = memory.read(state.avail + 2, 2)
        memory.write(state.avail + 2, struct.pack("<H", (int.from_bytes(idx, "little") + offered) & 0xFFFF))
        drain(queue)
    memory.write(state.avail + 2, struct.pack("<H", (start + 1) & 0xFFFF))
    drain(queue)


@given(
    order=st.integers(0, 3),
    table=st.lists(descriptors, min_size=1, max_size=8),
    indirect=st.lists(descriptors, max_size=8),
    heads=st.lists(indices, min_size=1, max_size=8),
    where=st.sampled_from([TABLES, END - 128, END - 16]),
)
def test_descriptors_made_to_hurt(
    memory: GuestMemory,
    order: int,
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads: list[int],
    where: int,
) -> None:
    """Buffers at every edge, loops, tables in tables, lengths that overflow."""
    memory.write(GPA, bytes(SIZE))
    ring = Ring(memory, RING, 1 << order)
    for i, fields in enumerate(indirect[: (END - where) // 16]):
        ring.write_descriptor(i, *fields, table=where)
    for i, (gpa, size, bits, following) in enumerate(table[: ring.size]):
        if bits & driver.INDIRECT and i % 2:
            gpa, size = where, 16 * len(indirect)
        ring.write_descriptor(i, gpa, size, bits, following)
    queue = Virtqueue(memory, 256)
    state = QueueState(
        size=ring.size,
        ready=True,
        desc=ring.desc,
        avail=ring.avail,
        used=ring.used,
        next_avail=0,
        next_used=0,
    )
    queue.restore(state, event_idx=False, indirect=True)
    ring.offer(*heads[: ring.size])
    drain(queue)


requests = st.tuples(
    st.integers(0, 11) | st.integers(0, (1 << 32) - 1),
    st.integers(0, SECTORS + 1) | st.sampled_from([1 << 55, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1),
)
actions = st.one_of(
    st.tuples(st.just("descriptor"), st.integers(0, 15), descriptors),
    st.tuples(st.just("indirect"), st.integers(0, 15), descriptors),
    st.tuples(st.just("header"), st.integers(0, 15), requests),
    st.tuples(st.just("chain"), st.integers(0, 15), st.lists(st.integers(0, 600), min_size=1, max_size=5)),
    st.tuples(st.just("offer"), st.lists(indices, max_size=16), st.none()),
    st.tuples(st.just("notify"), st.none(), st.none()),
    st.tuples(st.just("register"), st.integers(0, 0x45).map(lambda n: 4 * n), st.integers(0, (1 << 32) - 1)),
    st.tuples(st.just("register"), st.just(STATUS), st.sampled_from([0, 1, 3, 11, 15, 128])),
    st.tuples(st.just("access"), st.integers(0, 0x1000), widths),
)


@given(
    script=st.lists(actions, max_size=25), features=st.sampled_from([0, F_INDIRECT, F_INDIRECT | F_EVENT_IDX])
)
def test_a_disk_whose_driver_is_mad(
    memory: GuestMemory, disk: Path, script: list[tuple[str, object, object]], features: int
) -> None:
    """Requests that are nearly right and registers at random, while the device serves."""
    with Guest(memory, disk, writeback=True) as guest:
        ring = guest.begin(RING, 16, F_VERSION_1 | features)
        for action, first, second in script:
            play(guest, ring, action, first, second)
        guest.notify()
        guest.settle()
        guest.prove_alive()
    assert disk.stat().st_size == SECTORS * 512


def play(guest: Guest, ring: Ring, action: str, first: object, second: object) -> None:
    """One step of a script."""
    if action == "descriptor":
        ring.write_descriptor(first, *second)
    elif action == "indirect":
        ring.write_descriptor(first, *second, table=TABLES)
    elif action == "header":
        kind, sector = second
        guest.memory.write(HEADERS + 16 * first, struct.pack("<IIQ", kind, 0, sector))
    elif action == "chain":
        # A request as it should be, but for its sizes.
        buffers = [Buffer(HEADERS + 16 * first, 16)]
        buffers += [Buffer(DATA + 600 * i, size, True) for i, size in enumerate(second)]
        ring.free = list(range(16))
        ring.offer(ring.add(buffers))
    elif action == "offer":
        ring.offer(*first)
    elif action == "notify":
        guest.notify()
    elif action == "register":
        guest.registers[first] = second
    else:
        guest.bus.read(guest.ADDRESS + first, second)
        guest.bus.write(guest.ADDRESS + first, second, 0x5A5A5A5A5A5A5A5A)


@given(writes=st.lists(st.tuples(st.integers(0, 0xFFC), widths, words)))
def test_registers_at_random(memory: GuestMemory, disk: Path, writes: list[tuple[int, int, int]]) -> None:
    with Guest(memory, disk) as guest:
        for offset, size, value in writes:
            guest.bus.write(guest.ADDRESS + offset, size, value)
            guest.bus.read(guest.ADDRESS + offset, size)
        guest.settle()
        guest.prove_alive()


@given(writes=st.lists(st.tuples(st.integers(0, 7), widths, words)))
def test_a_serial_port_at_random(writes: list[tuple[int, int, int]]) -> None:
    bus, null = Bus("pio"), os.open("/dev/null", os.O_WRONLY)
    port = Serial(-1, null)
    port.attach(bus)
    for offset, size, value in writes:
        bus.write(0x3F8 + offset, size, value)
        bus.read(0x3F8 + offset, size)
        port.feed(value.to_bytes(8, "little") * 3)
    port.restore(port.save())
    os.close(null)


@pytest.mark.parametrize("seed", range(3))
def test_a_guest_that_changes_its_rings_while_they_are_read(
    memory: GuestMemory, disk: Path, seed: int
) -> None:
    """What was checked must be what is used: another CPU rewrites descriptors and headers meanwhile."""
    noise = random.Random(seed)
    good = struct.pack("<QIHH", HEADERS, 16, driver.NEXT, 1)
    bad = [
        struct.pack("<QIHH", gpa, size, bits, following)
        for gpa in (END - 8, END, 0, HEADERS, TABLES)
        for size in (16, 8, 0xFFFFFFF0)
        for bits in (0, 1, 2, 3, 4)
        for following in (0, 1, 15, 0xFFFF)
    ]
    with Guest(memory, disk) as guest:
        for _ in range(30):
            memory.write(GPA, bytes(SIZE))
            ring = guest.begin(RING, 16, F_VERSION_1 | F_INDIRECT)
            for i in range(16):
                ring.write_descriptor(i, DATA + 512 * i, 512, 3 if i < 15 else 2, i + 1)
            done = threading.Event()

            def rewrite(ring: Ring = ring, done: threading.Event = done) -> None:
                while not done.is_set():
                    memory.write(ring.desc + 16 * noise.randrange(16), noise.choice(bad))
                    memory.write(ring.desc, good)
                    memory.write(
                        HEADERS, struct.pack("<IIQ", noise.choice((0, 1, 8)), 0, noise.randrange(20))
                    )

            thread = threading.Thread(target=rewrite)
            thread.start()
            for _ in range(30):
                ring.offer(0, 0, 0, 0)
                guest.notify()
                guest.settle()
            done.set()
            thread.join()
        guest.prove_alive()


def test_a_driver_that_resets_the_device_while_it_is_served(memory: GuestMemory, disk: Path) -> None:
    with Guest(memory, disk) as guest:
        for n in range(300):
            ring = guest.begin(RING, 16, F_VERSION_1)
            memory.write(HEADERS, struct.pack("<IIQ", 0, 0, 0))
            for i in range(5):
                chain = [Buffer(HEADERS, 16), Buffer(DATA, SECTORS * 512, True), Buffer(TABLES + i, 1, True)]
                ring.offer(ring.add(chain))
                guest.notify()
            if n % 2:
                guest.registers[STATUS] = 0
        guest.prove_alive()
