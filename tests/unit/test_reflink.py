"""Overlays where the file system shares blocks between files: a clone is a file of its own, and copies nothing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crackle.disk import clone
from support.disk import OK
from support.mounts import with_mounts
from support.overlays import OverlaidDisk

MIB = 1 << 20
BLOCK = 4096
SIZE = 8 * MIB
FILLED = 4 * MIB
PIECE = 32 << 10
_MAKE = {"xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"), "btrfs": ("mkfs.btrfs", "-q")}
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


@pytest.fixture(params=["xfs", "btrfs"])
def sharing(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The beginning of a command line for which `tmp_path`/shared is such a file system, and for nobody else."""
    kind = request.param
    # The smallest that there is.
    with open(tmp_path / "image", "wb") as image:
        image.truncate(320 * MIB)
    if kind not in Path("/proc/filesystems").read_text() or not os.path.exists("/dev/loop-control"):
        pytest.skip(f"this kernel mounts no {kind}, or no files")
    subprocess.run(
        [*_MAKE[kind], str(tmp_path / "image")],
        check=True,
        env={**os.environ, "PATH": PATH},
    )
    (tmp_path / "shared").mkdir()
    return with_mounts(f"mount -o loop {tmp_path}/image {tmp_path}/shared || exit 77")


def run(sharing: list[str], *words: object) -> str:
    """What this Python says, given these arguments."""
    command = [*sharing, sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2])
    if done.returncode == 77:
        pytest.skip("this kernel mounts no image of it")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_clone_is_a_file_of_its_own_and_takes_no_room(sharing: list[str], tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}; from unit.test_reflink import clones; clones(sys.argv[1])"
    )
    taken, written = map(int, run(sharing, "-c", program, tmp_path / "shared").split())
    # The map of each of twenty, which is its own, and what the file system notes; not four megabytes for each.
    assert taken < 6 * MIB
    assert written >= 8 * BLOCK


def clones(directory: str) -> None:
    """Prints by how much twenty clones have made their file system fuller, and what eight of them wrote then."""
    home = Path(directory)
    base, first = home / "base", home / "first"
    base.write_bytes(bytes(SIZE))
    chance = random.Random(1)
    with OverlaidDisk(base, first) as disk:
        for at in range(0, FILLED, PIECE):
            assert disk.write(at, chance.randbytes(PIECE)) == OK
        expected = contents(disk)
    before = free(home)
    for number in range(20):
        clone(str(first), str(home / f"clone{number}"))
    taken = before - free(home)
    # It needs the base, and not the overlay that it was made of.
    os.unlink(first)
    before = free(home)
    for number in range(8):
        with OverlaidDisk(base, home / f"clone{number}") as disk:
            assert contents(disk) == expected
            assert disk.write(number * PIECE, bytes([number]) * BLOCK) == OK
    for number in range(8):
        with OverlaidDisk(base, home / f"clone{number}") as disk:
            at = number * PIECE
            assert contents(disk) == expected[:at] + bytes([number]) * BLOCK + expected[at + BLOCK :]
    print(taken, before - free(home))


def contents(disk: OverlaidDisk) -> bytes:
    return b"".join(disk.read(at, PIECE) for at in range(0, FILLED, PIECE))


def free(directory: Path) -> int:
    # Btrfs counts what it has written.
    subprocess.run(["sync", "-f", directory], check=True)
    return shutil.disk_usage(directory).free


def test_what_a_clone_promises_it_keeps_there_too(sharing: list[str], tmp_path: Path) -> None:
    tests = ["-k", "clone", Path(__file__).with_name("test_disk_tools.py")]
    said = run(
        sharing,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        tmp_path / "shared" / "t",
        *tests,
    )
    assert "2 passed" in said
