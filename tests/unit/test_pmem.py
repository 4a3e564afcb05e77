"""virtio-pmem as a driver finds it: its memory, flushes, limits, wrong chains, saved state (virtio 1.2, 5.19)."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.schema.rate_limiter import RateLimiter, TokenBucket
from crackle.virtio.pmem.device import Pmem, PmemState
from crackle.vmm.places import Spans
from support.driver import DEVICE_ID, F_VERSION_1, NEEDS_RESET, STATUS, Bench, Buffer, through_a_file

RINGS, DATA, ANSWERS, SIZE = 0x0, 0x10000, 0x20000, 1 << 20
MIB = 1 << 20
GPA = 256 << 30
HOUR_MS = 3_600_000
CONFIG = 0x100
DONE, FAILED = b"\0\0\0\0", b"\xff\xff\xff\xff"


class Guest(Bench):
    """A driver of the device, initialised."""

    def __init__(self, path: Path, *, read_only: bool = False, limiter: RateLimiter | None = None) -> None:
        with path.open("rb" if read_only else "r+b") as file:
            length = os.fstat(file.fileno()).st_size
            memory = GuestMemory(((0, SIZE),))
            super().__init__(Pmem(memory, file.fileno(), length, read_only=read_only, limiter=limiter))
        self.pmem.place(GPA)
        self.ring = self.begin(RINGS, 64, F_VERSION_1)

    @property
    def pmem(self) -> Pmem:
        assert isinstance(self.device, Pmem)
        return self.device

    def ask(self, *requests: bytes) -> list[bytes]:
        """What each request that is answered got."""
        heads = []
        for index, request in enumerate(requests):
            self.memory.write(DATA + 16 * index, request)
            chain = [Buffer(DATA + 16 * index, len(request)), Buffer(ANSWERS + 16 * index, 4, True)]
            heads.append(self.ring.add(chain))
        self.ring.offer(*heads)
        return [self.memory.read(ANSWERS + 16 * heads.index(head), 4) for head, _ in self.answers()]

    def answers(self) -> list[tuple[int, int]]:
        self.notify()
        self.settle()
        return self.ring.reap()

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.pmem.counters()
        return found


FLUSH = struct.pack("<I", 0)

Make = Callable[..., Guest]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"kept" * 1024 + b"the end")
    return path


@pytest.fixture
def guest(file: Path) -> Iterator[Guest]:
    with Guest(file) as guest:
        yield guest


def test_it_says_where_its_memory_is(guest: Guest) -> None:
    assert guest.registers[DEVICE_ID] == 27
    assert len(guest.device.queues) == 1
    words = [guest.registers[CONFIG + 4 * index] for index in range(4)]
    assert struct.unpack("<QQ", struct.pack("<4I", *words)) == (GPA, 2 * MIB)


def test_its_memory_is_the_file_and_what_follows_is_nobodys(guest: Guest, file: Path) -> None:
    pmem = guest.pmem
    assert pmem.own_memory == (pmem.hva, 2 * MIB, False)
    assert ctypes.string_at(pmem.hva, pmem.length) == file.read_bytes()
    assert ctypes.string_at(pmem.hva + 2 * mmap.PAGESIZE, mmap.PAGESIZE) == bytes(mmap.PAGESIZE)
    ctypes.memmove(pmem.hva, b"new!", 4)
    ctypes.memmove(pmem.hva + 2 * mmap.PAGESIZE, b"lost", 4)
    assert guest.ask(FLUSH) == [DONE]
    assert file.read_bytes()[:8] == b"new!kept"
    assert file.stat().st_size == pmem.length


def test_what_is_read_only_is_mapped_so(file: Path) -> None:
    file.chmod(0o400)
    with Guest(file, read_only=True) as guest:
        hva, size, read_only = guest.pmem.own_memory or (0, 0, False)
        assert read_only
        with open("/proc/self/maps") as maps:
            found = [line.split()[1] for line in maps if hva <= int(line.split("-")[0], 16) < hva + size]
        assert found == ["r--s", "r--p"]
        assert guest.ask(FLUSH) == [DONE]


def test_many_flushes_are_all_answered(guest: Guest) -> None:
    assert guest.ask(*[FLUSH] * 30) == [DONE] * 30
    assert guest.pmem.flushes == 30
    assert guest.interrupts() >= 1


def test_what_is_no_flush_fails_and_is_counted(guest: Guest) -> None:
    assert guest.ask(struct.pack("<I", 1), FLUSH) == [FAILED, DONE]
    assert guest.counters()["event_fails"] == 1


@pytest.mark.parametrize(
    "chain",
    [
        [Buffer(DATA, 4)],
        [Buffer(ANSWERS, 4, True)],
        [Buffer(DATA, 3), Buffer(ANSWERS, 4, True)],
        [Buffer(DATA, 4), Buffer(ANSWERS, 3, True)],
        [Buffer(DATA, 4), Buffer(ANSWERS, 5, True)],
    ],
)
def test_a_chain_that_is_no_request_is_given_back_and_counted(guest: Guest, chain: list[Buffer]) -> None:
    guest.memory.write(ANSWERS, b"untouched")
    guest.ring.offer(guest.ring.add(chain))
    assert [written for _, written in guest.answers()] == [0]
    assert guest.memory.read(ANSWERS, 9) == b"untouched"
    assert guest.counters()["event_fails"] == 1
    assert guest.ask(FLUSH) == [DONE]


def test_scattered_requests_are_put_together(guest: Guest) -> None:
    parts = [Buffer(DATA, 1), Buffer(DATA + 8, 3), Buffer(ANSWERS, 2, True), Buffer(ANSWERS + 8, 2, True)]
    guest.memory.write(ANSWERS, b"\xff" * 16)
    guest.ring.offer(guest.ring.add(parts))
    assert [written for _, written in guest.answers()] == [4]
    assert guest.memory.read(ANSWERS, 10) == b"\0\0" + b"\xff" * 6 + b"\0\0"


def test_a_queue_outside_memory_breaks_the_device_and_nothing_else(guest: Guest) -> None:
    guest.ring.offer(guest.ring.add([Buffer(SIZE, 4), Buffer(ANSWERS, 4, True)]))
    assert guest.answers() == []
    assert guest.registers[STATUS] & NEEDS_RESET


def test_a_limit_of_operations_holds_flushes_back(file: Path) -> None:
    with Guest(file, limiter=RateLimiter(ops=TokenBucket(2, HOUR_MS))) as guest:
        assert guest.ask(FLUSH, FLUSH, FLUSH) == [DONE, DONE]
        assert guest.counters()["rate_limiter_throttled_events"] >= 1
        guest.device.update_limiter(0, RateLimiter(ops=TokenBucket(0, 0)))
        deadline = time.monotonic() + 10
        while guest.pmem.flushes < 3:
            guest.settle()
            assert time.monotonic() < deadline


def test_a_limit_of_bytes_counts_the_whole_file_for_each_flush(file: Path) -> None:
    length = file.stat().st_size
    with Guest(file, limiter=RateLimiter(bandwidth=TokenBucket(2 * length, HOUR_MS))) as guest:
        assert guest.ask(FLUSH, FLUSH, FLUSH) == [DONE, DONE]


def test_it_is_saved_with_its_place_and_restored_over_a_file_as_large(file: Path, tmp_path: Path) -> None:
    limiter = RateLimiter(ops=TokenBucket(2, HOUR_MS))
    with Guest(file, limiter=limiter) as guest:
        assert guest.ask(FLUSH) == [DONE]
        state = through_a_file(guest.transport.save())
    with Guest(file, limiter=limiter) as again:
        own = msgspec.convert(state.device.own, PmemState)
        assert (own.start, own.size) == (GPA, 2 * MIB)
        again.pmem.restore_own(own)
        with pytest.raises(ConfigError, match=r"Restored pmem size 4194304 does not match .* 2097152"):
            again.pmem.restore_own(msgspec.structs.replace(own, size=4 * MIB))
        assert again.ask(FLUSH, FLUSH) == [DONE]


def test_an_empty_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Error backing file size is 0"):
        Guest(tmp_path / "file")


def test_what_it_has_mapped_is_gone_when_it_is_closed(file: Path) -> None:
    with Guest(file) as guest:
        place = f"{guest.pmem.hva:x}-"
        assert place in Path("/proc/self/maps").read_text()
    assert place not in Path("/proc/self/maps").read_text()


def test_places_are_taken_where_they_fit() -> None:
    spans = Spans("room", 100, 200)
    assert [spans.take(30), spans.take(10), spans.take(20)] == [100, 130, 140]
    spans.release(130)
    assert spans.take(20) == 160
    assert spans.take(10) == 130
    with pytest.raises(ConfigError, match="no room for 0x15 bytes of room"):
        spans.take(21)
    with pytest.raises(ConfigError, match="no room"):
        spans.claim(139, 1)
    with pytest.raises(ConfigError, match="no room"):
        spans.claim(99, 1)
    assert spans.claim(199, 1) == 199
