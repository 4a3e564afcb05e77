"""`core_scheduling=True` and `--core-scheduling`: the process that is the microVM asks for cores of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crackle import ConfigError, MicroVM, Snapshot

from .conftest import PATIENCE

STRACE = shutil.which("strace")
pytestmark = pytest.mark.skipif(STRACE is None, reason="looks at system calls: needs strace")

PROGRAM = """
import sys
from crackle import MicroVM, Snapshot
kernel, saved = sys.argv[1:]
def counted(vm):
    vm.console.expect(r"count \\d+\\n", 60)
    print(vm.pid)
with MicroVM(kernel, boot_args="", memory=32, core_scheduling=True) as vm:
    counted(vm)
    (clone,) = vm.fork(1)
    with clone:
        counted(clone)
    vm.snapshot(saved)
with Snapshot(saved) as snapshot:
    for options in ({"core_scheduling": True}, {}):
        with snapshot.clone(1, **options)[0] as vm:
            counted(vm)
"""


def asked(path: Path, *command: str | Path) -> tuple[str, set[int]]:
    """What a command prints, and which processes asked for cores of their own."""
    assert STRACE is not None
    done = subprocess.run(
        [STRACE, "-f", "-qq", "-e", "trace=prctl", "-e", "signal=none", "-o", path, *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    # PR_SCHED_CORE_CREATE for a thread group (<linux/prctl.h>), with names or without.
    call = r"^(\d+) +prctl\((?:PR_SCHED_CORE|0x3e)[^,]*, (?:PR_SCHED_CORE_CREATE|0x1)[^,]*, 0, (?:\w*_THREAD_GROUP|0x1)"
    return done.stdout, {int(pid) for pid in re.findall(call, path.read_text(), re.MULTILINE)}


def test_a_programs_microvms_their_forks_and_clones_have_it(guests: Path, tmp_path: Path) -> None:
    said, processes = asked(
        tmp_path / "calls", sys.executable, "-c", PROGRAM, guests / "count.elf", tmp_path / "s"
    )
    pids = [int(word) for word in said.split()]
    # All but the last.
    assert len(pids) == 4
    assert processes == set(pids[:3])


@pytest.mark.parametrize("jail", [(), ("--jail", "64900")], ids=["free", "jailed"])
def test_crackle_run_has_it(guests: Path, tmp_path: Path, jail: tuple[str, ...]) -> None:
    command = (sys.executable, "-m", "crackle.cli.main", "run", guests / "hello.elf", *jail)
    said, processes = asked(tmp_path / "calls", *command, "--core-scheduling")
    assert "hello" in said
    assert len(processes) == 1
    if not jail:
        assert asked(tmp_path / "calls", *command)[1] == set()


def test_it_is_for_processes_that_are_a_microvms(guests: Path, echoing: Path) -> None:
    with (
        Snapshot(echoing) as snapshot,
        pytest.raises(ConfigError, match="core_scheduling is for a microVM in"),
    ):
        snapshot.clone(1, core_scheduling=True, in_process=True)
    with pytest.raises(ConfigError, match="core_scheduling must be True or False, not 1"):
        MicroVM(guests / "count.elf", core_scheduling=1)  # type: ignore[arg-type]
