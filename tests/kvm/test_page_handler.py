"""`crackle snapshot serve`: memory for whoever loads a snapshot, and what is wanted first noted and read ahead."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crackle import MicroVM
from crackle.snapshot import workingset
from crackle.snapshot.inspect import rebase

from .conftest import PATIENCE
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
