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
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import crackle.virtio.queue
from crackle.devices.serial import Serial
from crackle.kvm.bus import Bus
from crackle.memory import GuestMemory
from crackle.virtio.block.device import Block
from crackle.virtio.queue import Virtqueue
from crackle.virtio.state import QueueState
from support import driver
from support.driver import F_EVENT_IDX, F_INDIRECT, F_VERSION_1, NEEDS_RESET, STATUS, Bench, Buffer, Ring
from support.fence import SANITIZED

F_ALLOCATE = 1 << 13 | 1 << 14  # discard and write zeroes
GPA, SIZE = 0x10000, 0x10000
"""The memory neither begins at address 0 nor ends where an address space does."""
END = GPA + SIZE
RING, HEADERS, TABLES, DATA = GPA, GPA + 0x3000, GPA + 0x4000, GPA + 0x8000
SECTORS = 16

EDGES = [0, 1, GPA - 16, GPA - 1, GPA, END - 17, END - 16, END - 1, END, END + 1, 1 << 32, (1 << 64) - 1]
LENGTHS = [0, 1, 15, 16, 17, 512, SIZE - 1, SIZE, SIZE + 1, 1 << 31, (1 << 32) - 1]

words = st.integers(0, (1 << 64) - 1)
widths = st.sampled_from([1, 2, 4, 8])
inside = st.integers(GPA, END - 64)
addresses = inside | inside | st.sampled_from(EDGES) | words
sizes = st.integers(0, 64) | st.integers(0, 64) | st.sampled_from(LENGTHS) | st.integers(0, (1 << 32) - 1)
flags = st.integers(0, 15).map(lambda n: n & 3 if n < 12 else (4, 4, 7, 0xFFFF)[n & 3])
indices = st.integers(0, 63).map(lambda n: n & 7 if n < 60 else (8, 255, 0x8000, 0xFFFF)[n & 3])
descriptors = st.tuples(addresses, sizes, flags, indices)
seeds = st.integers(0, (1 << 32) - 1)
# What is tried depends on the constants in the modules that are loaded: enough to reach everything with any of them.
thorough = settings(max_examples=max(settings.default.max_examples, 300))


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "disk"
    path.write_bytes(bytes(SECTORS * 512))
    return path


class Guest(Bench):
    """A disk over memory that outlives it."""

    def __init__(self, memory: GuestMemory, disk: Path, **options: Any) -> None:
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


def drain(queue: Virtqueue, reached: Counter[str]) -> None:
    """Take and give back whatever there is, and check each chain."""
    for _ in range(1000):
        try:
            found = queue.take()
        except ValueError as error:
            reached[str(error)] += 1
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
        reached["chain"] += 1
        queue.give(head, len(buffers))


def descriptor_noise(noise: random.Random) -> bytes:
    """Guest memory full of descriptors that are often nearly right."""
    found = []
    for _ in range(SIZE // 16):
        kind = noise.random()
        gpa = noise.randrange(GPA, END) if kind < 0.9 else noise.choice(EDGES)
        size = noise.randrange(64) if kind < 0.8 else noise.choice(LENGTHS)
        bits = noise.choice((0, 0, 1, 2, 2, 3, 4)) if kind > 0.02 else noise.randrange(1 << 16)
        if bits == 4:
            size = 16 * noise.randrange(20)
        found.append(struct.pack("<QIHH", gpa, size, bits, noise.randrange(noise.choice((4, 256, 1 << 16)))))
    return b"".join(found)


def test_rings_anywhere_in_memory_full_of_descriptors(memory: GuestMemory) -> None:
    """Each part of the queue may lie over another."""
    reached: Counter[str] = Counter()

    @thorough
    @given(
        seed=seeds,
        order=st.integers(0, 8),
        places=st.tuples(*[st.integers(GPA, END)] * 3),
        start=st.integers(0, 0xFFFF),
        event_idx=st.booleans(),
    )
    def attack(seed: int, order: int, places: tuple[int, int, int], start: int, event_idx: bool) -> None:
        noise, size = random.Random(seed), 1 << order
        desc, avail, used = places[0] & ~15, places[1] & ~1, places[2] & ~3
        memory.write(GPA, descriptor_noise(noise))
        queue = Virtqueue(memory, 256)
        parts = {"desc": desc, "avail": avail, "used": used}
        state = QueueState(size=size, ready=True, next_avail=start, next_used=start, **parts)
        try:
            queue.restore(state, event_idx=event_idx, indirect=True)
        except ValueError:
            assert desc + 16 * size > END or avail + 6 + 2 * size > END or used + 6 + 8 * size > END
            return
        heads = [noise.randrange(size + (noise.random() < 0.05)) for _ in range(size)]
        memory.write(avail + 4, struct.pack(f"<{size}H", *heads))
        for ahead in (1, noise.randrange(size) + 1, size, size + 1, 0x8000):
            memory.write(avail + 2, struct.pack("<H", (queue.save().next_avail + ahead) & 0xFFFF))
            drain(queue, reached)

    attack()
    assert reached["chain"] > 100
    assert len(reached) > 5, reached


def test_descriptors_made_to_hurt(memory: GuestMemory) -> None:
    """Buffers at every edge, loops, tables in tables, lengths that overflow."""
    reached: Counter[str] = Counter()

    @thorough
    @given(
        order=st.integers(0, 3),
        table=st.lists(descriptors, min_size=1, max_size=8),
        indirect=st.lists(descriptors, max_size=8),
        heads=st.lists(indices, min_size=1, max_size=8),
        where=st.sampled_from([TABLES, END - 128, END - 16]),
    )
    # An index beyond the table, a buffer outside memory, a loop, a table of a wrong size, outside memory, in a table.
    @example(order=0, table=[(DATA, 16, 0, 0)], indirect=[], heads=[255], where=TABLES)
    @example(order=0, table=[(END, 16, 0, 0)], indirect=[], heads=[0], where=TABLES)
    @example(order=0, table=[(DATA, 16, driver.NEXT, 0)], indirect=[], heads=[0], where=TABLES)
    @example(order=0, table=[(TABLES, 17, driver.INDIRECT, 0)], indirect=[], heads=[0], where=TABLES)
    @example(order=0, table=[(END, 16, driver.INDIRECT, 0)], indirect=[], heads=[0], where=TABLES)
    @example(
        order=0,
        table=[(TABLES, 16, driver.INDIRECT, 0)],
        indirect=[(TABLES, 16, driver.INDIRECT, 0)],
        heads=[0],
        where=TABLES,
    )
    def attack(
        order: int,
        table: list[tuple[int, int, int, int]],
        indirect: list[tuple[int, int, int, int]],
        heads: list[int],
        where: int,
    ) -> None:
        memory.write(GPA, bytes(SIZE))
        ring = Ring(memory, RING, 1 << order)
        for i, fields in enumerate(indirect[: (END - where) // 16]):
            ring.write_descriptor(i, *fields, table=where)
        for i, (gpa, size, bits, following) in enumerate(table[: ring.size]):
            if bits & driver.INDIRECT and i % 2:
                gpa, size = where, 16 * len(indirect)
            ring.write_descriptor(i, gpa, size, bits, following % ring.size if following < 8 else following)
        queue = Virtqueue(memory, 256)
        parts = {"desc": ring.desc, "avail": ring.avail, "used": ring.used}
        state = QueueState(size=ring.size, ready=True, next_avail=0, next_used=0, **parts)
        queue.restore(state, event_idx=False, indirect=True)
        ring.offer(*[head % ring.size if head < 8 else head for head in heads[: ring.size]])
        drain(queue, reached)

    attack()
    assert reached["chain"] > 20
    assert len(reached) > 6, reached


blocks = st.lists(st.tuples(st.just(512), st.booleans()), max_size=3)
pieces = st.lists(st.tuples(st.sampled_from([0, 1, 511, 512, 513]), st.booleans()), max_size=4)
kinds = st.sampled_from([0, 4, 1, 8, 11, 0, 4, 1, 13])
good = st.tuples(kinds, st.integers(0, SECTORS - 3), blocks)
bad = st.tuples(kinds | st.integers(0, (1 << 32) - 1), st.sampled_from([0, SECTORS, 1 << 55]) | words, pieces)
slots = st.integers(0, 15)
registers = st.one_of(
    st.tuples(st.just("register"), st.integers(0, 0x45).map(lambda n: 4 * n), st.integers(0, (1 << 32) - 1)),
    st.tuples(st.just("register"), st.just(STATUS), st.sampled_from([0, 1, 3, 11, 15, 128])),
    st.tuples(st.just("access"), st.integers(0, 0x1000), widths),
)
rings = st.one_of(
    st.tuples(st.just("descriptor"), slots, descriptors),
    st.tuples(st.just("indirect"), slots, descriptors),
    st.tuples(st.just("offer"), st.lists(indices, max_size=16), st.none()),
)
requests = st.one_of(
    st.tuples(st.just("chain"), slots, good),
    st.tuples(st.just("chain"), slots, bad),
    st.tuples(st.just("notify"), st.none(), st.none()),
)
# Only some of the guests break their rings or play with the registers: a device that waits for a reset does nothing.
scripts = st.lists(requests, max_size=25) | st.lists(requests | rings, max_size=25)
scripts |= st.lists(st.one_of(requests, rings, registers), max_size=25)


@pytest.mark.parametrize("engine", ["Sync", "Async"])
def test_a_disk_whose_driver_is_mad(memory: GuestMemory, disk: Path, engine: str) -> None:
    """Requests that are nearly right and registers at random, while the device serves."""
    reached: Counter[str] = Counter()

    @given(
        script=scripts,
        features=st.sampled_from([0, F_EVENT_IDX, F_INDIRECT, F_INDIRECT | F_EVENT_IDX]),
    )
    # One that reads, one that writes, one that flushes, one that asks for nothing known, one with a broken ring.
    @example(script=[("chain", 1, (0, 0, [(512, True)]))], features=0)
    @example(script=[("chain", 1, (1, 0, [(512, False)]))], features=0)
    @example(script=[("chain", 1, (4, 0, []))], features=0)
    @example(script=[("chain", 1, (99, 0, []))], features=0)
    @example(script=[("descriptor", 0, (1 << 60, 16, 0, 0)), ("offer", [0], None)], features=0)
    def attack(script: list[tuple[str, object, object]], features: int) -> None:
        with Guest(memory, disk, writeback=True, engine=engine) as guest:
            ring = guest.begin(RING, 16, F_VERSION_1 | F_ALLOCATE | features)
            for action, first, second in script:
                play(guest, ring, action, first, second)
            guest.notify()
            guest.settle()
            counters = guest.device.counters()
            for counter in ("read_count", "write_count", "flush_count", "invalid_reqs_count", "event_fails"):
                reached[counter] += counters[counter]
            guest.prove_alive()

    attack()
    assert disk.stat().st_size == SECTORS * 512
    assert len(+reached) == 5, reached


def play(guest: Guest, ring: Ring, action: str, first: object, second: object) -> None:
    """One step of a script."""
    if action == "descriptor":
        ring.write_descriptor(first, *second)
    elif action == "indirect":
        ring.write_descriptor(first, *second, table=TABLES)
    elif action == "chain":
        # A request as it should be, but for its numbers and sizes; often with a byte for its status.
        kind, sector, found = second
        guest.memory.write(HEADERS + 16 * first, struct.pack("<IIQ", kind, 0, sector))
        buffers = [Buffer(HEADERS + 16 * first, 16)]
        for i, (size, device) in enumerate(sorted(found, key=lambda piece: piece[1])):
            buffers.append(Buffer(DATA + 600 * i, size, device))
        if first % 4:
            buffers.append(Buffer(DATA, 1, True))
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
    port.attach(bus, 0x3F8)
    for offset, size, value in writes:
        bus.write(0x3F8 + offset, size, value)
        bus.read(0x3F8 + offset, size)
        port.feed(value.to_bytes(8, "little") * 3)
    port.restore(port.save())
    os.close(null)


@pytest.mark.parametrize("engine", ["Sync", "Async"])
@pytest.mark.parametrize("seed", range(3))
def test_a_guest_that_changes_its_rings_while_they_are_read(
    memory: GuestMemory, disk: Path, seed: int, engine: str
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
    with Guest(memory, disk, engine=engine) as guest:
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


@pytest.mark.parametrize("engine", ["Sync", "Async"])
def test_a_driver_that_resets_the_device_while_it_is_served(
    memory: GuestMemory, disk: Path, engine: str
) -> None:
    with Guest(memory, disk, engine=engine) as guest:
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
