"""The two files of a snapshot: together or not at all, and found together again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.snapshot import pair
from crackle.snapshot.pair import Pair, find
from support.snapshots import fill, save_as

SIZE = 1 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(0, SIZE)]) as memory:
        yield memory


def number_in(directory: Path) -> int:
    """Which number the pair in `directory` has, as whoever loads it finds it."""
    _, fd = find(str(directory / "state"), str(directory / "memory"))
    try:
        pages = {os.pread(fd, 4096, page * 4096) for page in (0, 1, 7, 100, 255)}
    finally:
        os.close(fd)
    (page,) = pages
    return int.from_bytes(page[:8], "little")


def names(directory: Path) -> list[str]:
    return sorted(each.name for each in directory.iterdir())


def test_a_pair_is_found_again_and_the_memory_file_is_raw_and_sparse(
    tmp_path: Path, memory: GuestMemory
) -> None:
    fill(memory, 5)
    save_as(memory, tmp_path)
    assert names(tmp_path) == ["memory", "state"]
    content = (tmp_path / "memory").read_bytes()
    assert content == memory.read(0, SIZE)
    assert (tmp_path / "memory").stat().st_blocks * 512 <= 8 * 4096
    assert number_in(tmp_path) == 5


def test_a_pair_takes_the_place_of_another(tmp_path: Path, memory: GuestMemory) -> None:
    for number in (1, 2, 3):
        fill(memory, number)
        save_as(memory, tmp_path)
        assert number_in(tmp_path) == number
        assert names(tmp_path) == ["memory", "state"]


def test_files_keep_their_mode_and_links_lead_to_them(tmp_path: Path, memory: GuestMemory) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "memory").symlink_to(real / "memory")
    (tmp_path / "state").symlink_to("real/state")
    (real / "memory").touch(0o640)
    fill(memory, 1)
    save_as(memory, tmp_path)
    assert names(real) == ["memory", "state"]
    assert (real / "memory").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "memory").is_symlink()
    assert number_in(tmp_path) == 1


@pytest.mark.parametrize("call", ["fsync", "rename", "write", "ftruncate", "link"])
def test_whatever_the_host_refuses_the_old_pair_stays_and_nothing_else(
    tmp_path: Path, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    fill(memory, 1)
    save_as(memory, tmp_path)
    fill(memory, 2)
    # Every one of them in turn, until the new pair is there: what fails then is no failure.
    for allowed in range(10):
        with monkeypatch.context() as patch:
            patch.setattr(pair.os, call, Refusal(getattr(os, call), allowed))
            message = outcome(memory, tmp_path)
        if message is None:
            break
        assert "No space left on device (os error 28)" in message
        assert number_in(tmp_path) == 1
        assert names(tmp_path) == ["memory", "state"]
    assert number_in(tmp_path) == 2


class Refusal:
    """A call that fails when it has been made so many times."""

    def __init__(self, real: Callable[..., object], allowed: int) -> None:
        self._real, self._left = real, allowed

    def __call__(self, *arguments: object) -> object:
        self._left -= 1
        if self._left < 0:
            raise OSError(28, "No space left on device")
        return self._real(*arguments)


def outcome(memory: GuestMemory, directory: Path) -> str | None:
    """What is wrong with a snapshot's taking; None when nothing is."""
    try:
        save_as(memory, directory)
    except ConfigError as error:
        return str(error)
    return None


def test_a_full_disk_leaves_the_old_pair(tmp_path: Path, memory: GuestMemory) -> None:
    fill(memory, 1)
    save_as(memory, tmp_path)
    script = (
        "import resource, signal, sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from crackle.memory import GuestMemory\n"
        "from support.snapshots import fill, save_as\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "memory = GuestMemory([(0, 1 << 20)]); fill(memory, 2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n"
        "save_as(memory, Path('.'))\n"
    )
    for limit in (0, 4096, 500_000, SIZE - 1):
        done = subprocess.run(
            [sys.executable, "-c", script, str(limit), str(Path(__file__).parents[1])],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "ConfigError: Cannot" in done.stderr
        assert "File too large (os error 27)" in done.stderr
        assert names(tmp_path) == ["memory", "state"]
        assert number_in(tmp_path) == 1


WRITER = """
import sys; sys.path[:0] = sys.argv[1:]
from pathlib import Path
from crackle.memory import GuestMemory
from support.snapshots import fill, save_as
memory = GuestMemory([(0, 1 << 20)])
for number in range(1, 1 << 30):
    fill(memory, number)
    save_as(memory, Path("."))
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_pair(tmp_path: Path) -> None:
    """Thirty times, after some or no snapshots, and whatever the one before has left."""
    for round_number in range(30):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(Path(__file__).parents[1])],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        last = 1
        # Somewhere in the course of the next few.
        time.sleep(round_number * 0.0007)
        process.send_signal(signal.SIGKILL)
        rest, _ = process.communicate()
        if rest.split():
            last = int(rest.split()[-1])
        assert number_in(tmp_path) in (last, last + 1, last + 2)
        leftovers = [name for name in names(tmp_path) if name not in ("memory", "state")]
        assert len(leftovers) <= 3
        assert all(re.fullmatch(r"(memory|state)\.[0-9a-f]{32}", name) for name in leftovers)
    with GuestMemory([(0, SIZE)]) as memory:
        fill(memory, 7)
        save_as(memory, tmp_path)
    assert names(tmp_path) == ["memory", "state"]


def test_a_crash_between_the_two_names_loses_neither_pair(
    tmp_path: Path, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    fill(memory, 1)
    save_as(memory, tmp_path)
    old_state = (tmp_path / "state").read_bytes()
    fill(memory, 2)
    real = os.rename

    def rename(source: str, target: str) -> None:
        if target.endswith("memory"):
            raise Crash
        real(source, target)

    monkeypatch.setattr(pair.os, "rename", rename)
    monkeypatch.setattr(pair.Pair, "close", lambda _self: None)
    with pytest.raises(Crash):
        save_as(memory, tmp_path)
    monkeypatch.undo()
    # The state file is the new one, and finds its memory; so does the old one.
    assert number_in(tmp_path) == 2
    (tmp_path / "state").write_bytes(old_state)
    assert number_in(tmp_path) == 1


def test_one_that_begins_takes_away_what_crashes_have_left_but_the_memory_of_the_pair_that_counts(
    tmp_path: Path, memory: GuestMemory
) -> None:
    fill(memory, 1)
    save_as(memory, tmp_path)
    identifier = pair.read(str(tmp_path / "state")).id
    # As after a crash between the two names, and after two more before those.
    (tmp_path / "memory").rename(tmp_path / f"memory.{identifier}")
    for number in (3, 4):
        for name in ("memory", "state"):
            (tmp_path / f"{name}.{number:032x}").write_bytes(bytes(SIZE))
    with Pair(str(tmp_path / "state"), str(tmp_path / "memory"), SIZE) as begun:
        assert names(tmp_path) == sorted([f"memory.{begun.id}", f"memory.{identifier}", "state"])
    assert number_in(tmp_path) == 1


def test_what_another_process_is_writing_is_no_leftover(tmp_path: Path, memory: GuestMemory) -> None:
    fill(memory, 1)
    with Pair(str(tmp_path / "state"), str(tmp_path / "memory"), SIZE) as other:
        save_as(memory, tmp_path)
        assert f"memory.{other.id}" in names(tmp_path)
    assert names(tmp_path) == ["memory", "state"]


def test_files_of_two_snapshots_are_told_apart(tmp_path: Path, memory: GuestMemory) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for number, directory in ((1, first), (2, second)):
        directory.mkdir()
        fill(memory, number)
        save_as(memory, directory)
    with pytest.raises(ConfigError, match=r"the memory file is not this snapshot's; name the two files"):
        find(str(first / "state"), str(second / "memory"))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda path: os.truncate(path, SIZE - 1),
            "the memory file has 1048575 bytes, and the snapshot's memory 1048576",
        ),
        (lambda path: os.truncate(path, 0), "the memory file has 0 bytes"),
        (lambda path: path.write_bytes(bytes(SIZE)), "the memory file is not this snapshot's"),
        (lambda path: (path.unlink(), path.mkdir()), "the memory file is no regular file"),
        (lambda path: path.unlink(), r"No such file or directory \(os error 2\)"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "the memory file is no regular file"),
    ],
)
def test_a_memory_file_that_is_none_is_refused(
    tmp_path: Path, memory: GuestMemory, spoil: Callable[[Path], object], sentence: str
) -> None:
    fill(memory, 1)
    save_as(memory, tmp_path)
    spoil(tmp_path / "memory")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=sentence):
        find(str(tmp_path / "state"), str(tmp_path / "memory"))
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's rights are tried")
def test_a_memory_file_that_may_not_be_read_is_refused(memory: GuestMemory) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        fill(memory, 1)
        save_as(memory, directory)
        (directory / "memory").chmod(0o600)
        (directory / "state").chmod(0o644)
        os.seteuid(65534)
        try:
            with pytest.raises(ConfigError, match=r"from file: Permission denied .*: .*/memory"):
                find(str(directory / "state"), str(directory / "memory"))
        finally:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("state", "memory_name", "sentence"),
    [
        (
            "none/state",
            "memory",
            "Cannot perform open on the snapshot backing file: No such file or directory",
        ),
        ("state", "none/memory", "Cannot perform open on the memory backing file: No such file or directory"),
        ("directory", "memory", "Cannot perform open on the snapshot backing file: Is a directory"),
        ("state", "directory", "Cannot perform open on the memory backing file: Is a directory"),
        ("same", "same", "are the same file"),
        ("st\0te", "memory", "NUL byte"),
        ("state", "/dev/null", "It is no regular file"),
    ],
)
def test_a_place_that_takes_no_files_is_refused(
    tmp_path: Path, state: str, memory_name: str, sentence: str
) -> None:
    (tmp_path / "directory").mkdir()
    descriptors = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(ConfigError, match=sentence),
        Pair(str(tmp_path / state), str(tmp_path / memory_name), SIZE) as made,
    ):
        made.commit(b"state")
    assert names(tmp_path) == ["directory"]
    assert len(os.listdir("/proc/self/fd")) == descriptors
