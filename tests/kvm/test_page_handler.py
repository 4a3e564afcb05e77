"""`crackle snapshot serve`: memory for whoever loads a snapshot, and what is wanted first noted and read ahead."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crackle import ConfigError, MicroVM, PageHandler, Snapshot, StateError
from crackle.snapshot import workingset
from crackle.snapshot.inspect import rebase

from .conftest import PATIENCE
from .test_own_process import gone
from .test_page_faults import contents

MIB = 1 << 20


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Starts a handler of the snapshot in `tmp_path`/s; the socket's path."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> Path:
        path = tmp_path / f"socket{len(started)}"
        command = "from crackle.cli.main import main; main()"
        started.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    command,
                    "snapshot",
                    "serve",
                    str(tmp_path / "s"),
                    "--socket",
                    str(path),
                    *arguments,
                ]
            )
        )
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            assert time.monotonic() < deadline
            assert started[-1].poll() is None
            time.sleep(0.01)
        return path

    yield start
    for each in started:
        each.terminate()
        each.wait(PATIENCE)


def test_guests_go_on_from_memory_that_is_served_and_what_they_want_is_noted(
    serve: Callable[..., Path], guests: Path, tmp_path: Path
) -> None:
    memory = tmp_path / "s" / "memory"
    with MicroVM(guests / "count.elf", boot_args="touch=4", memory=64) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        vm.pause()
        for page in range(1 << 13, 1 << 14, 48):
            vm._machine().memory.write(page << 12, page.to_bytes(8, "little") * 512)
        vm.snapshot(tmp_path / "s")
        expected = contents(vm)
    path = serve()
    with MicroVM.restore(tmp_path / "s", handler=path, resume=False) as vm:
        # Every page, those of holes and in the middle of a window that has come already among them.
        assert contents(vm)[1 * MIB :] == expected[1 * MIB :]
    noted = Path(workingset.path_beside(str(memory)))
    deadline = time.monotonic() + PATIENCE
    while not noted.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with memory.open("rb") as file:
        order = workingset.read(str(memory), file.fileno(), 65536)
    assert len(order) == 64 * MIB // 65536
    for _ in range(2):
        with MicroVM.restore(tmp_path / "s", handler=path) as vm:
            vm.console.expect("count 4\n", timeout=PATIENCE)
            vm.snapshot(tmp_path / "s2", tmp_path / "diff", differential=True)
    rebase(str(memory), str(tmp_path / "diff"))
    with MicroVM.restore(tmp_path / "s2", memory) as vm:
        vm.console.expect("count 6\n", timeout=PATIENCE)


def test_a_working_set_is_that_of_its_memory_file_or_none(tmp_path: Path) -> None:
    path = str(tmp_path / "m")
    memory = tmp_path / "m"
    memory.write_bytes(bytes(range(256)) * 4096)
    with memory.open("r+b") as file:
        fd = file.fileno()
        assert workingset.read(path, fd, 65536) == []
        workingset.write(path, fd, 65536, [3, 1, 2])
        noted = Path(workingset.path_beside(path))
        whole = noted.read_bytes()
        assert workingset.read(path, fd, 65536) == [3, 1, 2]
        assert workingset.read(path, fd, 2 << 20) == []
        for bad in (whole[:-1], whole[:20], b"", whole[:-5] + b"?" + whole[-4:], b"X" + whole[1:]):
            noted.write_bytes(bad)
            assert workingset.read(path, fd, 65536) == []
        noted.write_bytes(whole)
        file.seek(1 * 65536)
        file.write(b"changed")
        file.flush()
        assert workingset.read(path, fd, 65536) == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m", "m.working-set"]


def test_a_snapshot_is_warmed_by_a_clone_whose_writes_go_nowhere(guests: Path, tmp_path: Path) -> None:
    disk, memory = tmp_path / "disk", tmp_path / "s" / "memory"
    disk.write_bytes(bytes(MIB))
    with MicroVM(guests / "count.elf", boot_args="touch=4", memory=64, drives=[disk]) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        vm.snapshot(tmp_path / "s")
    command = [sys.executable, "-m", "crackle.cli.main", "snapshot", "warm", str(tmp_path / "s")]
    done = subprocess.run([*command, "--seconds", "0.5"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    noted = workingset.path_beside(str(memory))
    with memory.open("rb") as file:
        order = workingset.read(str(memory), file.fileno(), 65536)
    assert done.stdout == f"{len(order) / 16:.1f} MiB are read ahead from now on: {noted}\n"
    # The four megabytes that the guest touches, and not all that it has.
    assert 64 <= len(order) < 512


def test_what_cannot_be_warmed_is_told(guests: Path, tmp_path: Path) -> None:
    with MicroVM(guests / "idle.elf", boot_args="tick=100 beats=1 ticks=3", memory=32) as vm:
        vm.console.expect("beat 1\n", timeout=PATIENCE)
        vm.snapshot(tmp_path / "s")
    noted = Path(workingset.path_beside(str(tmp_path / "s" / "memory")))
    with Snapshot(tmp_path / "s") as snapshot:
        with pytest.raises(ConfigError, match="the snapshot has no 'eth0', only none"):
            snapshot.warm(interfaces={"eth0": "tap{index}"})
        with pytest.raises(ConfigError, match="for some seconds, not 0"):
            snapshot.warm(0)
        with pytest.raises(ConfigError, match="in_process: a snapshot is warmed by a handler here"):
            snapshot.warm(in_process=True)
        # A guest that ends before its time is up has wanted what it has wanted.
        assert snapshot.warm(PATIENCE) > 0
        noted.unlink()
        noted.mkdir()
        with pytest.raises(ConfigError, match="Cannot note what a microVM wants: Is a directory"):
            snapshot.warm(0.2)


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_program_has_a_handler_of_its_own(guests: Path, tmp_path: Path) -> None:
    with MicroVM(guests / "count.elf", boot_args="touch=4", memory=64) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        vm.snapshot(tmp_path / "s")
    with PageHandler(tmp_path / "s") as handler, Snapshot(tmp_path / "s") as snapshot:
        here = MicroVM.restore(tmp_path / "s", handler=handler)
        elsewhere = snapshot.clone(2, handler=handler)
        pid = handler.pid
    # Who is served goes on to be when nobody else is.
    with pytest.raises(StateError, match="has been closed"):
        MicroVM.restore(tmp_path / "s", handler=handler)
    assert not Path(handler.path).parent.exists()
    for vm in (here, *elsewhere):
        vm.console.expect("count 5\n", timeout=PATIENCE)
        assert alive(pid)
        vm.stop()
    assert gone(pid)
    with pytest.raises(ConfigError, match="Cannot open the memory file: No such file"):
        PageHandler(tmp_path / "nothing")


def test_a_handler_ends_with_its_program(tmp_path: Path) -> None:
    (tmp_path / "memory").write_bytes(bytes(MIB))
    program = (
        "import os, sys, crackle\n"
        "handler = crackle.PageHandler(sys.argv[1])\n"
        "print(handler.pid, handler.path, flush=True)\n"
        "if not os.fork(): sys.stdin.read(); os._exit(0)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        number, path = process.stdout.readline().split()
        pid = int(number)
        assert alive(pid)
        assert Path(path).exists()
        process.kill()
        # The forked child that lives on has nothing of the handler.
        assert gone(pid)
        assert not Path(path).parent.exists()
        process.stdin.close()
