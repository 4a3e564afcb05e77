"""A disk whose writes go to an overlay: what the guest reads, whatever it did; and what is left after a crash."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crackle.disk import make
from crackle.disk.overlay import MAP_AT, MAX_DEPTH, read_header
from crackle.errors import ConfigError
from crackle.schema.drive import Overlay
from crackle.virtio.block.device import Block
from support.disk import IOERR, OK, SECTOR, Disk
from support.overlays import OverlaidDisk, opened

BLOCK = 4096
SIZE = 37 * BLOCK + 3 * SECTOR
"""Of a base whose last block is no whole one."""


@pytest.fixture(scope="module", params=["Sync", "Async"], autouse=True)
def engine(request: pytest.FixtureRequest) -> str:
    Disk.engine = request.param
    return request.param


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "base"
    contents = os.urandom(SIZE)
    path.write_bytes(contents)
    yield path
    assert path.read_bytes() == contents, "the base was written to"


def map_in(path: Path) -> bytes:
    """The map as it is in the file."""
    with path.open("rb") as file:
        header = read_header(file.fileno(), str(path))
        return os.pread(file.fileno(), header.map_size, MAP_AT)


def test_the_guest_reads_the_base_and_what_it_has_written(base: Path, tmp_path: Path) -> None:
    expected = bytearray(base.read_bytes())
    with OverlaidDisk(base, tmp_path / "o") as disk:
        assert disk.device.size == SIZE
        assert disk.read() == expected
        assert disk.write(5 * SECTOR, b"a" * SECTOR) == OK
        expected[5 * SECTOR : 6 * SECTOR] = b"a" * SECTOR
        assert disk.read() == expected
    with OverlaidDisk(base, tmp_path / "o") as disk:
        assert disk.read() == expected
    with OverlaidDisk(base, tmp_path / "other") as disk:
        assert disk.read() == base.read_bytes()


def test_a_block_that_was_touched_takes_one_block_of_the_file(base: Path, tmp_path: Path) -> None:
    with OverlaidDisk(base, tmp_path / "o") as disk:
        before = (tmp_path / "o").stat().st_blocks
        assert disk.write(2 * BLOCK + SECTOR, bytes(SECTOR)) == OK
        assert disk.write(2 * BLOCK, bytes(BLOCK)) == OK
        assert (tmp_path / "o").stat().st_blocks - before <= 2 * BLOCK // 512


def test_what_is_discarded_reads_as_zeroes_and_takes_no_room(base: Path, tmp_path: Path) -> None:
    expected = bytearray(base.read_bytes())
    with OverlaidDisk(base, tmp_path / "o") as disk:
        assert disk.write(0, b"x" * 8 * BLOCK) == OK
        full = (tmp_path / "o").stat().st_blocks
        assert disk.discard(0, 8 * BLOCK) == OK
        assert (tmp_path / "o").stat().st_blocks <= full - 8 * BLOCK // 512
        expected[: 8 * BLOCK] = bytes(8 * BLOCK)
        # And of blocks that the base has, in part.
        assert disk.discard(10 * BLOCK + SECTOR, 3 * BLOCK) == OK
        expected[10 * BLOCK + SECTOR : 13 * BLOCK + SECTOR] = bytes(3 * BLOCK)
        assert disk.write_zeroes(SIZE - SECTOR, SECTOR, unmap=False) == OK
        expected[-SECTOR:] = bytes(SECTOR)
        assert disk.read() == expected


Ranges = st.integers(0, SIZE // SECTOR - 1).flatmap(
    lambda first: st.tuples(st.just(first * SECTOR), st.integers(1, min(40, SIZE // SECTOR - first)))
)
Steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["write", "write", "read", "discard", "zeroes", "unmap", "flush", "reopen", "layer", "crash"]
        ),
        Ranges,
        st.integers(1, 255),
    ),
    max_size=16,
)


class Model:
    """What each sector may hold: the last is what it does, the others what it held since the last flush."""

    def __init__(self, contents: bytes) -> None:
        self.now = bytearray(contents)
        self.history = [{contents[at : at + SECTOR]} for at in range(0, len(contents), SECTOR)]

    def write(self, offset: int, data: bytes) -> None:
        self.now[offset : offset + len(data)] = data
        for at in range(offset, offset + len(data), SECTOR):
            self.history[at // SECTOR].add(bytes(self.now[at : at + SECTOR]))

    def flushed(self) -> None:
        self.__init__(bytes(self.now))  # type: ignore[misc]

    def may_be(self, contents: bytes) -> bool:
        return all(contents[n * SECTOR : (n + 1) * SECTOR] in held for n, held in enumerate(self.history))


@pytest.mark.parametrize("writeback", [False, True])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=Steps)
def test_whatever_the_guest_does_it_reads_what_a_plain_disk_would_give(
    base: Path, tmp_path: Path, writeback: bool, steps: list[tuple[str, tuple[int, int], int]]
) -> None:
    """Discards, layers on top, closing and being killed included; a crash may lose what was not flushed."""
    model = Model(base.read_bytes())
    path = tmp_path / os.urandom(8).hex()
    disk = OverlaidDisk(base, path, writeback=writeback)
    try:
        for step, (offset, sectors), value in steps:
            size = sectors * SECTOR
            if step == "write":
                assert disk.write(offset, bytes([value]) * size) == OK
                model.write(offset, bytes([value]) * size)
            elif step == "discard":
                assert disk.discard(offset, size) == OK
                model.write(offset, bytes(size))
            elif step in ("zeroes", "unmap"):
                assert disk.write_zeroes(offset, size, unmap=step == "unmap") == OK
                model.write(offset, bytes(size))
            elif step == "flush":
                assert disk.flush() == OK
                model.flushed()
            elif step == "reopen":
                disk.close()
                disk = OverlaidDisk(base, path, writeback=writeback)
                assert disk.read() == model.now
            elif step == "layer":
                disk.close()
                path, under = tmp_path / os.urandom(8).hex(), path
                with contextlib.suppress(ConfigError):  # one too many
                    make(str(path), over=str(under))
                disk = OverlaidDisk(base, path if path.exists() else under, writeback=writeback)
                path = path if path.exists() else under
            elif step == "crash":
                left = tmp_path / os.urandom(8).hex()
                shutil.copy(path, left)
                disk.close()
                path = left
                disk = OverlaidDisk(base, path, writeback=writeback)
                found = disk.read()
                assert model.may_be(found)
                assert writeback or found == model.now
                model = Model(found)
            else:
                assert disk.read(offset, size) == model.now[offset : offset + size]
        assert disk.read() == model.now
    finally:
        disk.close()


def test_the_map_goes_to_the_file_with_the_flush_and_not_before(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "o"
    with OverlaidDisk(base, path, writeback=True) as disk:
        assert disk.write(BLOCK, b"a" * BLOCK) == OK
        assert map_in(path)[:8] == bytes(8)
        assert disk.flush() == OK
        assert map_in(path)[:8] == b"\x02" + bytes(7)
        assert disk.write(0, b"b" * SECTOR) == OK
        assert map_in(path)[:8] == b"\x02" + bytes(7)
    assert map_in(path)[:8] == b"\x03" + bytes(7)


def test_without_flush_the_map_is_there_at_once(base: Path, tmp_path: Path) -> None:
    with OverlaidDisk(base, tmp_path / "o") as disk:
        assert disk.write(BLOCK, b"a" * BLOCK) == OK
        assert map_in(tmp_path / "o")[:8] == b"\x02" + bytes(7)


VICTIM = """
import sys
sys.path[:0] = sys.argv[4:]
from pathlib import Path
from support.overlays import OverlaidDisk
disk = OverlaidDisk(Path(sys.argv[1]), sys.argv[2], writeback=True, engine=sys.argv[3])
print(flush=True)
n = 0
while True:
    n += 1
    for block in (n % 36, n * 7 % 36, n * 5 % 36):
        assert disk.write(block * 4096 + 512 * (n % 8), bytes([n % 256]) * (512 if n % 3 else 2048)) == 0
    assert disk.flush() == 0
    print(n, flush=True)
"""


def after_rounds(contents: bytes, rounds: int) -> bytes:
    """What the victim has on its disk after so many rounds."""
    disk = bytearray(contents)
    for n in range(1, rounds + 1):
        for block in (n % 36, n * 7 % 36, n * 5 % 36):
            data = bytes([n % 256]) * (512 if n % 3 else 2048)
            at = block * 4096 + 512 * (n % 8)
            disk[at : at + len(data)] = data
    return bytes(disk)


def test_what_was_flushed_outlives_a_kill_at_any_moment(base: Path, tmp_path: Path, engine: str) -> None:
    for attempt in range(3):
        path = tmp_path / f"killed{attempt}"
        words = [sys.executable, "-c", VICTIM, str(base), str(path), engine, *sys.path]
        victim = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert victim.stdout is not None
        for _ in range(2 + 17 * attempt):
            victim.stdout.readline()
        victim.send_signal(signal.SIGKILL)
        lines = victim.stdout.read().split()
        victim.stdout.close()
        victim.wait()
        rounds = int(lines[-1]) if lines else 1 + 17 * attempt
        with OverlaidDisk(base, path) as disk:
            found = disk.read()
        flushed, after = (after_rounds(base.read_bytes(), n) for n in (rounds, rounds + 1))
        for at in range(0, SIZE, SECTOR):
            assert found[at : at + SECTOR] in (flushed[at : at + SECTOR], after[at : at + SECTOR])


def test_no_more_is_taken_than_the_limit_allows(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "o"
    make(str(path), base=str(base))
    # Until then the file system may not have decided what it takes.
    with open(path, "rb") as made:
        os.fsync(made.fileno())
    limit = path.stat().st_blocks * 512 + 8 * BLOCK
    with OverlaidDisk(base, Overlay(str(path), size_limit=limit)) as disk:
        before = disk.read()
        statuses = [disk.write(n * BLOCK, b"n" * BLOCK) for n in range(20)]
        assert statuses[0] == OK
        assert statuses[-1] == IOERR
        assert statuses == sorted(statuses)
        assert path.stat().st_blocks * 512 <= limit
        kept = statuses.count(OK)
        assert disk.read() == b"n" * BLOCK * kept + before[BLOCK * kept :]
        # What is there may be written again, and what is given back may be used again.
        assert disk.write(0, b"m" * BLOCK) == OK
        assert disk.discard(0, 2 * BLOCK) == OK
        assert disk.write(30 * BLOCK, b"o" * BLOCK) == OK
        assert path.stat().st_blocks * 512 <= limit


def test_a_file_system_that_is_full_is_an_error_and_loses_nothing(base: Path, tmp_path: Path) -> None:
    """As the size of files is limited: the write that does not fit ends in the middle of a block."""
    path = tmp_path / "o"
    with OverlaidDisk(base, path) as disk:
        assert disk.write(0, b"a" * SECTOR) == OK
        expected = disk.read()
    with path.open("rb") as file:
        begin = read_header(file.fileno(), str(path)).data_at
    program = (
        "import resource, signal, sys; sys.path[:0] = sys.argv[5:]; from pathlib import Path;"
        "from support.overlays import OverlaidDisk;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "disk = OverlaidDisk(Path(sys.argv[1]), sys.argv[2], engine=sys.argv[3]);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), -1));"
        "print(disk.write(4096, b'b' * 16384), disk.write(8192, b'c' * 512), disk.write(4096, b'd' * 4096))"
    )
    words = [sys.executable, "-c", program, str(base), str(path), Disk.engine, str(begin + 2 * BLOCK + 1024)]
    done = subprocess.run([*words, *sys.path], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["1", "1", "0"]
    expected = expected[:BLOCK] + b"d" * BLOCK + expected[2 * BLOCK :]
    with OverlaidDisk(base, path) as disk:
        assert disk.read() == expected


def test_an_overlay_in_memory_goes_with_the_disk(base: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with OverlaidDisk(base, Overlay(memory=True), writeback=True) as disk:
        assert disk.write(BLOCK, b"a" * BLOCK) == OK
        assert disk.flush() == OK
        assert disk.read(BLOCK, BLOCK) == b"a" * BLOCK
    assert len(os.listdir("/proc/self/fd")) == before
    with OverlaidDisk(base, Overlay(memory=True)) as disk:
        assert disk.read() == base.read_bytes()


def test_layers_may_lie_one_over_the_other_up_to_a_bound(base: Path, tmp_path: Path) -> None:
    expected = bytearray(base.read_bytes())
    before = ""
    for n in range(MAX_DEPTH):
        path = tmp_path / str(n)
        with OverlaidDisk(base, Overlay(str(path), over=before or None)) as disk:
            assert disk.read() == expected
            assert disk.write(n * BLOCK + SECTOR, bytes([n + 1]) * 2 * BLOCK) == OK
            expected[n * BLOCK + SECTOR :][: 2 * BLOCK] = b""
            expected[n * BLOCK + SECTOR : n * BLOCK + SECTOR] = b""
        with OverlaidDisk(base, path) as disk:
            expected = bytearray(disk.read())
            assert expected[n * BLOCK + SECTOR :][: 2 * BLOCK] == bytes([n + 1]) * 2 * BLOCK
        before = str(path)
    with pytest.raises(ConfigError, match="has 16 overlays one over the other, and 16 are the most"):
        opened(base, Overlay(str(tmp_path / "more"), over=before))
    assert not (tmp_path / "more").exists()


def test_a_disk_of_layers_is_told_of_its_descriptors_when_it_goes(
    base: Path, tmp_path: Path, engine: str
) -> None:
    make(str(tmp_path / "a"), base=str(base))
    make(str(tmp_path / "b"), over=str(tmp_path / "a"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with OverlaidDisk(base, tmp_path / "b"):
            pass
        assert len(os.listdir("/proc/self/fd")) == before
    backing = opened(base, tmp_path / "b")
    disk = OverlaidDisk(base, Overlay(memory=True))
    assert isinstance(disk.device, Block)
    disk.device.update(str(base), backing)
    backing.close()
    disk.close()
    assert len(os.listdir("/proc/self/fd")) == before
