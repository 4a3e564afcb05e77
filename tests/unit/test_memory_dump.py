"""Guest memory in a memory file: complete, sparse, and mapped again without being read."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.memory.dump import Scan, copy_data, resident_pages, write_pages

PAGE = 4096
LAYOUT = [(0, 4 << 20), (1 << 32, 2 << 20)]
SIZE = 6 << 20


def file_of(path: Path, size: int = SIZE) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.ftruncate(fd, size)
    return fd


def contents(memory: GuestMemory) -> bytes:
    return b"".join(memory.read(region.gpa, region.size) for region in memory.regions)


def allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def scribble(memory: GuestMemory, seed: int) -> None:
    random.seed(seed)
    for _ in range(100):
        region = random.choice(memory.regions)
        size = random.randrange(1, 9000)
        memory.write(region.gpa + random.randrange(region.size - size), random.randbytes(size))


@pytest.mark.parametrize("backing", ["anonymous", "transparent"])
def test_what_is_in_memory_is_in_the_file(tmp_path: Path, backing: str) -> None:
    with GuestMemory(LAYOUT, backing=backing) as memory:
        scribble(memory, 1)
        fd = file_of(tmp_path / "m")
        scan = Scan(memory, fd)
        assert (tmp_path / "m").read_bytes() == contents(memory)
        assert allocated(fd) <= scan.pages * PAGE + (1 << 16)
        os.close(fd)


def test_pages_of_zeros_are_holes(tmp_path: Path) -> None:
    with GuestMemory(LAYOUT) as memory:
        memory.write(0, bytes(4 << 20))
        memory.write(2 << 20, b"x")
        fd = file_of(tmp_path / "m")
        assert Scan(memory, fd).pages == 1
        assert allocated(fd) == PAGE
        os.close(fd)


def test_a_file_is_mapped_and_changes_stay_in_memory(tmp_path: Path) -> None:
    with GuestMemory(LAYOUT) as memory:
        scribble(memory, 2)
        fd = file_of(tmp_path / "m")
        Scan(memory, fd)
        before = contents(memory)
    with GuestMemory(LAYOUT) as memory:
        memory.write(0, b"this goes")
        memory.map_file(fd)
        os.close(fd)
        assert contents(memory) == before
        memory.write(1 << 32, b"changed")
        assert contents(memory) != before
        assert (tmp_path / "m").read_bytes() == before


@pytest.mark.parametrize("rounds", [1, 5])
def test_a_snapshot_of_a_snapshot_is_complete(tmp_path: Path, rounds: int) -> None:
    """What was changed, what was cleared, and what is as it was."""
    with GuestMemory(LAYOUT) as memory:
        scribble(memory, 3)
        fd = file_of(tmp_path / "m0")
        Scan(memory, fd)
        os.close(fd)
    for number in range(rounds):
        with GuestMemory(LAYOUT) as memory:
            fd = os.open(tmp_path / f"m{number}", os.O_RDONLY)
            memory.map_file(fd)
            os.close(fd)
            random.seed(number)
            memory.write(random.randrange(1 << 20), random.randbytes(5000))
            memory.write(random.randrange(1 << 20) & ~(PAGE - 1), bytes(3 * PAGE))
            memory.read(2 << 20, 1 << 20)
            fd = file_of(tmp_path / f"m{number + 1}")
            Scan(memory, fd)
            os.close(fd)
            assert (tmp_path / f"m{number + 1}").read_bytes() == contents(memory)


def test_without_a_memory_map_of_the_process_it_is_as_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a jail, where there is no /proc."""
    script = (
        "import os, sys, random\n"
        "from crackle.memory import GuestMemory\n"
        "from crackle.memory.dump import Scan\n"
        "memory = GuestMemory([(0, 4 << 20)]); memory.write(12345, b'hello' * 5000)\n"
        "fd = os.open('m', os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 4 << 20)\n"
        "os.chroot('.')\n"
        "Scan(memory, fd)\n"
        "other = GuestMemory([(0, 4 << 20)]); other.map_file(fd); other.write(1 << 20, b'x')\n"
        "new = os.open('n', os.O_RDWR | os.O_CREAT); os.ftruncate(new, 4 << 20)\n"
        "assert Scan(other, new).pages == 8\n"
        "assert os.pread(fd, 4 << 20, 0) == memory.read(0, 4 << 20)\n"
        "assert os.pread(new, 4 << 20, 0) == other.read(0, 4 << 20)\n"
    )
    import subprocess
    import sys

    if os.getuid():
        pytest.skip("only root may change its root directory")
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_samples_are_of_pages_with_contents_and_spread(tmp_path: Path) -> None:
    with GuestMemory(LAYOUT) as memory:
        assert Scan(memory).samples == []
        for page in range(0, 1536, 3):
            gpa = page * PAGE if page < 1024 else (1 << 32) + (page - 1024) * PAGE
            memory.write(gpa, b"x")
        samples = Scan(memory).samples
        assert 16 <= len(samples) <= 32
        assert all(offset // PAGE % 3 == 0 for offset in samples)
        assert samples[0] == 0
        assert samples[-1] > 5 << 20


def test_marked_pages_are_written_zeros_included(tmp_path: Path) -> None:
    with GuestMemory(LAYOUT) as memory:
        memory.write(0, b"\xff" * (4 << 20))
        fd = file_of(tmp_path / "m")
        os.pwrite(fd, b"\xee" * SIZE, 0)
        memory.write(8 * PAGE, bytes(PAGE))
        marks = [bytearray(128), bytearray(64)]
        for page in (0, 8, 9, 63, 64, 1023):
            marks[0][page >> 3] |= 1 << (page & 7)
        marks[1][0] = 1
        assert write_pages(memory, fd, [bytes(mark) for mark in marks]) == 7
        content = (tmp_path / "m").read_bytes()
        for page in range(1536):
            expected = b"\xff" if page in (0, 9, 63, 64, 1023) else b"\0" if page in (8, 1024) else b"\xee"
            assert content[page * PAGE : (page + 1) * PAGE] == expected * PAGE, page
        with pytest.raises(ValueError, match="too few"):
            write_pages(memory, fd, [b"", b""])
        os.close(fd)


def test_what_is_the_guests_own_after_a_restore(tmp_path: Path) -> None:
    with GuestMemory(LAYOUT) as memory:
        scribble(memory, 5)
        fd = file_of(tmp_path / "m")
        Scan(memory, fd)
        memory.map_file(fd)
        os.close(fd)
        memory.read(0, 1 << 20)
        assert not any(b"".join(resident_pages(memory)))
        memory.write(5 * PAGE, b"x")
        memory.write(1 << 32, b"x")
        low, high = resident_pages(memory)
        assert int.from_bytes(low, "little") == 1 << 5
        assert int.from_bytes(high, "little") == 1


def test_data_is_copied_and_holes_are_not(tmp_path: Path) -> None:
    source, target = file_of(tmp_path / "a"), file_of(tmp_path / "b")
    os.pwrite(source, b"x" * PAGE, 1 << 20)
    os.pwrite(source, b"y" * PAGE, 5 << 20)
    copy_data(source, target, SIZE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert allocated(target) == 2 * PAGE


def test_what_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    fd = file_of(tmp_path / "m", SIZE - 1)
    with GuestMemory(LAYOUT) as memory:
        memory.write(0, b"stays")
        with pytest.raises(ConfigError, match=f"has {SIZE - 1} bytes, {SIZE} are needed"):
            memory.map_file(fd)
        assert memory.read(0, 5) == b"stays"
    with (
        GuestMemory(LAYOUT, backing="memfd") as memory,
        pytest.raises(ConfigError, match="cannot be mapped over memfd memory"),
    ):
        memory.map_file(fd)
    os.close(fd)


def test_a_file_that_takes_no_more_is_told(tmp_path: Path) -> None:
    with GuestMemory(LAYOUT) as memory:
        memory.write(0, b"x")
        fd = os.open("/dev/full", os.O_WRONLY)
        with pytest.raises(OSError, match="No space left"):
            Scan(memory, fd)
        os.close(fd)
