"""What the two engines of virtio-block promise when much is in flight, and when the device is stopped meanwhile."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.virtio.block.backing import open_backing
from crackle.virtio.block.device import Block
from support.disk import (
    ARENA,
    FEATURES,
    FLUSH,
    HIGH,
    IN,
    LOW,
    OK,
    PAGE,
    RING,
    SECTOR,
    SECTORS,
    TABLE,
    Disk,
    submit_reads,
    submit_writes,
)
from support.driver import F_EVENT_IDX, F_INDIRECT, F_VERSION_1, STATUS, Bench, Buffer, Ring

BIG = 4096
COUNT = 200


@pytest.fixture(scope="module", params=["Sync", "Async"], autouse=True)
def engine(request: pytest.FixtureRequest) -> str:
    Disk.engine = request.param
    return request.param


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Disk]:
    """A disk with room for COUNT writes of BIG bytes."""
    (tmp_path / "disk").write_bytes(bytes(COUNT * BIG))
    with Disk(tmp_path / "disk", writeback=True, features=FEATURES | F_EVENT_IDX) as disk:
        yield disk


def expected(count: int, size: int = BIG) -> bytes:
    return b"".join(bytes([n % 255 + 1]) * size for n in range(count))


def test_a_whole_queue_of_writes_arrives(large: Disk) -> None:
    for turn in range(3):
        heads = submit_writes(large, COUNT, BIG)
        large.notify()
        large.settle()
        assert sorted(head for head, _ in large.ring.reap()) == sorted(heads)
        assert large.contents == expected(COUNT)
        assert large.device.counters()["write_count"] == COUNT * (turn + 1)
        large.path.write_bytes(bytes(COUNT * BIG))


def test_a_flush_is_answered_after_the_writes_that_were_submitted_before_it(large: Disk) -> None:
    """Twenty writes and a flush, ten times over, all at once."""
    writes = submit_writes(large, COUNT, BIG, offer=False)
    large.memory.write(TABLE, struct.pack("<IIQ", FLUSH, 0, 0))
    order: list[int] = []
    flushes: list[int] = []
    for n in range(0, COUNT, 20):
        flushes.append(large.ring.add([Buffer(TABLE, 16), Buffer(TABLE + 16 + n, 1, True)]))
        order += [*writes[n : n + 20], flushes[-1]]
    large.ring.offer(*order)
    large.notify()
    large.settle()
    answered = [head for head, _ in large.ring.reap()]
    assert sorted(answered) == sorted(order)
    for flush in flushes:
        assert set(answered[: answered.index(flush)]) >= set(writes[: order.index(flush)]) & set(
            writes
        ) - set(order[order.index(flush) :])
    assert large.device.counters()["flush_count"] == len(flushes)
    assert large.contents == expected(COUNT)


def test_requests_of_many_buffers_may_all_be_in_flight(tmp_path: Path) -> None:
    with Disk(tmp_path / "disk") as disk:
        heads = []
        for n in range(60):
            disk.memory.write(ARENA + 16 * n, struct.pack("<IIQ", 0, 0, n))
            pieces = [Buffer(HIGH + n * PAGE + 3 * piece, 2, True) for piece in range(200)]
            rest = Buffer(HIGH + n * PAGE + 1000, SECTOR - 400, True)
            chain = [Buffer(ARENA + 16 * n, 16), *pieces, rest, Buffer(ARENA + PAGE + n, 1, True)]
            heads.append(disk.ring.add(chain, direct=0, table=0x20000 + 16 * 256 * n))
        disk.ring.offer(*heads)
        disk.notify()
        disk.settle()
        assert len(disk.ring.reap()) == 60
        for n in range(60):
            page = disk.memory.read(HIGH + n * PAGE, PAGE)
            found = b"".join(page[3 * piece : 3 * piece + 2] for piece in range(200)) + page[1000:1112]
            assert found == disk.contents[n * SECTOR :][:SECTOR]


def test_more_requests_than_can_be_in_flight_are_all_answered(large: Disk) -> None:
    """A driver may make chains available again that the device has not used yet: bad manners, but no harm."""
    heads = submit_writes(large, COUNT, BIG)
    large.notify()
    for _ in range(20):
        large.ring.offer(*heads[: 256 - COUNT])
        large.notify()
        large.settle()
    # Each settled: as many as were offered, less those of the queue's limit.
    assert large.device.counters()["write_count"] >= COUNT
    assert large.ring.used_idx == large.device.counters()["write_count"] & 0xFFFF
    assert large.contents == expected(COUNT)


def test_a_reset_waits_for_what_is_in_flight(large: Disk) -> None:
    for _ in range(20):
        large.path.write_bytes(os.urandom(COUNT * BIG))
        with large.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        submit_reads(large, 80)
        large.notify()
        large.registers[STATUS] = 0
        assert large.registers[STATUS] == 0
        # From here on memory is the driver's.
        large.memory.write(HIGH, bytes(COUNT * PAGE))
        large.ring = large.begin(RING, 256, FEATURES)
        large.settle()
        assert large.memory.read(HIGH, COUNT * PAGE) == bytes(COUNT * PAGE)
        assert large.ring.used_idx == 0
    assert large.request(0, 5, room=SECTOR).data == large.contents[5 * SECTOR : 6 * SECTOR]


def test_nothing_is_lost_when_it_is_closed_with_much_in_flight(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        (tmp_path / "disk").write_bytes(bytes(COUNT * BIG))
        with Disk(tmp_path / "disk") as disk:
            submit_writes(disk, COUNT, BIG)
            disk.notify()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_device_that_nobody_closes_goes_with_everything_it_had(tmp_path: Path, engine: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(SECTOR))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        Block(GuestMemory([(0, LOW)]), str(tmp_path / "disk"), engine=engine)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_io_uring_does_not_take_leaves_the_old_one(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(1 << 20))
    with Disk(tmp_path / "disk", engine="Async") as disk:
        before = disk.path.read_bytes()
        backing = open_backing(str(other), False)
        # Only a name of the file: the kernel registers none of these.
        path_only = os.open(other, os.O_PATH)
        os.dup2(path_only, backing.fd)
        os.close(path_only)
        with pytest.raises(ConfigError, match="io_uring does not take the new file: Bad file descriptor"):
            disk.device.update(str(other), backing)
        backing.close()
        assert (disk.device.path, disk.device.size) == (str(disk.path), len(before))
        assert (disk.device.updates, disk.device.update_fails) == (0, 1)
        answer = disk.request(IN, 3, room=SECTOR)
        assert (answer.status, answer.data) == (OK, before[3 * SECTOR : 4 * SECTOR])
        disk.device.update(str(other))
        assert disk.request(IN, 3, room=SECTOR).data == bytes(SECTOR)


def test_the_file_changes_between_requests_not_within_one(large: Disk, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for _ in range(10):
        large.device.update(str(large.path))
        large.path.write_bytes(bytes(COUNT * BIG))
        other.write_bytes(bytes(COUNT * BIG))
        submit_writes(large, COUNT, BIG)
        large.notify()
        large.device.update(str(other))
        large.settle()
        assert len(large.ring.reap()) == COUNT
        both = [large.contents, other.read_bytes()]
        for n in range(COUNT):
            found = [image[n * BIG : (n + 1) * BIG] for image in both]
            assert sorted(found) == [bytes(BIG), bytes([n % 255 + 1]) * BIG]


def test_requests_go_on_after_each_pause(large: Disk) -> None:
    for n in range(50):
        submit_writes(large, COUNT if n % 2 else 1, BIG)
        large.notify()
        large.settle()
        assert large.ring.reap()
    assert large.request(FLUSH).status == OK


def test_an_engine_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(SECTOR))
    with pytest.raises(ConfigError, match="there is no io_engine 'Turbo'; there are Sync and Async"):
        Block(GuestMemory([(0, LOW)]), str(tmp_path / "disk"), engine="Turbo")


def test_a_host_that_has_no_ring_to_give_is_told_of(tmp_path: Path, engine: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(SECTOR))
    memory = GuestMemory([(0, LOW)])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    made: list[Block] = []

    def take_all() -> None:
        while True:
            made.append(Block(memory, str(tmp_path / "disk"), engine=engine))

    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, limits[1]))
    try:
        with pytest.raises(ConfigError, match="Too many open files"):
            take_all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_only_the_async_engine_loads_liburing(tmp_path: Path, engine: str) -> None:
    (tmp_path / "disk").write_bytes(bytes(SECTOR * SECTORS))
    program = (
        "import sys; from crackle.memory import GuestMemory; from crackle.virtio.block.device import Block;"
        "Block(GuestMemory([(0, 1 << 20)]), sys.argv[1], engine=sys.argv[2]);"
        "print('liburing' in open('/proc/self/maps').read())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "disk"), engine]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == str(engine == "Async")


PARTS, PART = 253, 4 << 20


def submit_gigabyte(bench: Bench, ring: Ring) -> int:
    """One read of nearly 1 GiB, into the same 4 MiB again and again."""
    table, header, status, data = 0x20000, 0x30000, 0x30100, 0x400000
    bench.memory.write(header, bytes(16))
    buffers = [
        Buffer(header, 16),
        *(Buffer(data, PART, True) for _ in range(PARTS)),
        Buffer(status, 1, True),
    ]
    head = ring.add(buffers, direct=0, table=table)
    ring.offer(head)
    return head


def test_a_request_that_is_only_begun_is_saved_and_begun_anew_elsewhere(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    features = F_VERSION_1 | F_INDIRECT

    def bench() -> Bench:
        return Bench(Block(GuestMemory([(0, 16 << 20)]), str(path), engine=engine))

    with bench() as first, bench() as second:
        ring = first.begin(RING, 256, features)
        head = submit_gigabyte(first, ring)
        first.notify()
        for _ in range(10_000):
            first.io.pause()
            assert first.device.drain()
            state = first.transport.save()
            if state.device.queues[0].in_flight:
                break
            assert ring.used_idx == 0, "a gigabyte was read in one turn"
            first.io.resume()
        assert state.device.queues[0].in_flight == (head,)
        image = first.memory.read(0, 1 << 20)
        first.io.resume()
        second.io.pause()
        second.memory.write(0, image)
        second.transport.restore(state)
        second.device.kick()
        second.io.resume()
        # Each of the two does it, once.
        for machine in (first, second):
            ring.memory = machine.memory
            end = time.monotonic() + 60
            while ring.used_idx == 0:
                assert time.monotonic() < end
                time.sleep(0.01)
            machine.settle()
            assert ring.used_idx == 1
            counters = machine.device.counters()
            assert (counters["read_count"], counters["read_bytes"]) == (1, PARTS * PART)
