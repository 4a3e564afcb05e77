"""virtio-block's DISCARD and WRITE_ZEROES (virtio 1.2, 5.2.6.2)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.disk import DISCARD, FEATURES, IOERR, OK, SECTOR, UNSUPP, WRITE_ZEROES, Disk
from support.driver import CONFIG, F_VERSION_1, Bench

F_DISCARD, F_WRITE_ZEROES = 1 << 13, 1 << 14
BOTH = F_DISCARD | F_WRITE_ZEROES
UNMAP = 1
MIB = 1 << 20
SIZE = 4 * MIB
MAX_DISCARD, MAX_DISCARD_SEGMENTS, ALIGNMENT = CONFIG + 36, CONFIG + 40, CONFIG + 44
MAX_ZEROES, MAX_ZEROES_SEGMENTS, MAY_UNMAP = CONFIG + 48, CONFIG + 52, CONFIG + 56


@pytest.fixture(scope="module", params=["Sync", "Async"], autouse=True)
def engine(request: pytest.FixtureRequest) -> str:
    Disk.engine = request.param
    return request.param


@pytest.fixture(params=["/var/tmp", "/dev/shm"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file with every block allocated, on a file system that can zero a range, and on one that can only drop it."""
    path = Path(request.param) / f"crackle-test-{os.getpid()}"
    path.write_bytes(os.urandom(SIZE))
    yield path
    path.unlink()


@pytest.fixture
def disk(place: Path) -> Iterator[Disk]:
    with Disk(place, features=FEATURES | BOTH) as disk:
        yield disk


def allocated(disk: Disk) -> int:
    return os.stat(disk.path).st_blocks * 512


def ranges(*given: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *one) for one in given)


def test_the_limits_are_told(disk: Disk) -> None:
    registers = disk.registers
    assert registers[MAX_DISCARD] == registers[MAX_ZEROES] == (1 << 30) // SECTOR
    assert registers[MAX_DISCARD_SEGMENTS] == registers[MAX_ZEROES_SEGMENTS] == 1
    assert registers[ALIGNMENT] == max(os.stat(disk.path).st_blksize // SECTOR, 1)
    assert registers[MAY_UNMAP] & 0xFF == 1


def test_what_is_discarded_takes_no_room(disk: Disk) -> None:
    before = disk.contents
    assert disk.request(DISCARD, data=ranges((2048, 4096, 0))) == (OK, b"", 1)
    assert allocated(disk) == SIZE - 2 * MIB
    assert disk.contents == before[:MIB] + bytes(2 * MIB) + before[3 * MIB :]
    assert disk.device.counters()["discard_count"] == 1
    assert disk.device.counters()["discard_count"] == 1


def test_zeroes_keep_their_room_unless_the_driver_lets_it_go(disk: Disk) -> None:
    before = disk.contents
    assert disk.request(WRITE_ZEROES, data=ranges((0, 2048, UNMAP))).status == OK
    assert allocated(disk) == SIZE - MIB
    assert disk.request(WRITE_ZEROES, data=ranges((3, 1, 0))).status == OK
    assert disk.request(WRITE_ZEROES, data=ranges((4096, 2048, 0))).status == OK
    # A file system without ranges of zeroes has only holes to offer.
    kept = 0 if str(disk.path).startswith("/dev/shm") else MIB
    assert allocated(disk) in range(SIZE - 2 * MIB + kept, SIZE - 2 * MIB + kept + 65536)
    assert disk.contents == bytes(MIB) + before[MIB : 2 * MIB] + bytes(MIB) + before[3 * MIB :]
    assert disk.device.counters()["write_zeroes_count"] == 3


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize(
    ("payload", "status"),
    [
        (ranges((SIZE // SECTOR, 1, 0)), IOERR),
        (ranges((SIZE // SECTOR - 1, 2, 0)), IOERR),
        (ranges(((1 << 64) - 1, 2, 0)), IOERR),
        (ranges((1 << 55, 2, 0)), IOERR),
        (ranges((0, (1 << 32) - 1, 0)), IOERR),
        (b"", IOERR),
        (ranges((0, 1, 0))[:-1], IOERR),
        (ranges((0, 1, 2)), UNSUPP),
        (ranges((0, 1, 0), (1, 1, 0)), UNSUPP),
        (ranges((5, 0, 0)), OK),
    ],
)
def test_a_range_that_is_none_changes_nothing(disk: Disk, kind: int, payload: bytes, status: int) -> None:
    before = disk.contents
    assert disk.request(kind, data=payload).status == status
    assert disk.contents == before


def test_a_discard_with_the_flag_of_write_zeroes_is_unsupported(disk: Disk) -> None:
    assert disk.request(DISCARD, data=ranges((0, 1, UNMAP))).status == UNSUPP


def test_a_driver_that_did_not_ask_for_it_gets_none(place: Path) -> None:
    with Disk(place) as disk:
        assert disk.registers.offered() & BOTH == BOTH
        for kind in (DISCARD, WRITE_ZEROES):
            assert disk.request(kind, data=ranges((0, 1, 0))).status == UNSUPP


def test_a_read_only_disk_offers_neither(place: Path) -> None:
    with Disk(place, read_only=True) as disk:
        assert not disk.registers.offered() & BOTH


def test_a_host_that_cannot_discard_says_so_to_a_driver_that_was_promised_it(place: Path) -> None:
    """A microVM restored where the file system is another one."""
    with Disk(place, features=FEATURES | BOTH) as disk:
        disk.io.pause()
        state = disk.transport.save()
        disk.io.resume()
    with Disk(place, read_only=True) as poorer:
        poorer.io.pause()
        poorer.transport.restore(state)
        assert poorer.device.driver_features == F_VERSION_1 | FEATURES | BOTH
        assert isinstance(poorer, Bench)
        poorer.io.resume()
