"""A thousand clones of one snapshot, alive at once: `make soak`."""

from __future__ import annotations

import gc
import os
import resource
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from crackle import MicroVM, Pool, Snapshot
from crackle.vmm.clones import stop_all

from .conftest import PATIENCE
from .test_own_process import gone

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1700)]

CLONES = int(os.environ.get("CRACKLE_SOAK_CLONES", "1000"))
MEMORY_MIB = 128


@pytest.fixture
def pipes() -> Iterator[list[tuple[tuple[int, int], tuple[int, int]]]]:
    """Two for each clone: what is typed, and what is said."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    made = [(os.pipe(), os.pipe()) for _ in range(CLONES)]
    yield made
    for pair in made:
        for fd in (*pair[0], *pair[1]):
            os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def line_of(fd: int) -> bytes:
    said = b""
    poll = select.poll()  # select(2) knows 1,024 descriptors
    poll.register(fd, select.POLLIN)
    while not said.endswith(b"\n"):
        assert poll.poll(10 * PATIENCE * 1000)
        said += os.read(fd, 4096)
    return said


@pytest.mark.parametrize("ahead", [False, True])
def test_a_thousand_run_at_once_each_for_itself_and_leave_nothing(
    guests: Path, tmp_path: Path, pipes: list[tuple[tuple[int, int], tuple[int, int]]], ahead: bool
) -> None:
    with MicroVM(guests / "echo.elf", boot_args="", memory=MEMORY_MIB) as vm:
        vm.console.expect("echo\n", PATIENCE)
        vm.snapshot(tmp_path / "s")
    gc.collect()  # what earlier tests have left to it
    descriptors = len(os.listdir("/proc/self/fd"))

    def console(index: int) -> tuple[int, int]:
        return pipes[index][0][0], pipes[index][1][1]

    with Snapshot(tmp_path / "s") as snapshot:
        if ahead:
            with Pool(snapshot, CLONES, limit=CLONES, console=console, instance_id="clone-{index}") as pool:
                pool.wait_ready(timeout=20 * PATIENCE)
                vms = pool.take_many(CLONES)
        else:
            vms = snapshot.clone(CLONES, console=console, instance_id="clone-{index}")
        try:
            numbers = [int(vm.instance_id.partition("-")[2]) for vm in vms]
            pids = {vm.pid for vm in vms}
            assert len(pids) == len(set(numbers)) == CLONES
            # All are there before the first is asked, and each has what was typed to it alone.
            for number in numbers:
                os.write(pipes[number][0][1], b"I am %d\n" % number)
            for number in numbers:
                assert line_of(pipes[number][1][0]) == b"I am %d\n" % number
            assert {vm.state for vm in vms} == {"Running"}
            unique = sum(private_kib(pid) for pid in pids)
            print(f"{CLONES} clones, made ahead: {ahead}; private memory of each: {unique // CLONES} KiB")
        finally:
            stop_all(vms)
    assert all(map(gone, pids))
    assert {vm.state for vm in vms} == {"Stopped"}
    # Nothing but the zygote's socket, which may have come only now.
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1


def private_kib(pid: int) -> int:
    """Private memory of a process, guest memory and all."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in rollup if line.startswith("Private_"))
