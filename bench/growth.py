"""growth.*: how saving, cloning and forking grow with a guest's memory, vCPUs and disks, and with the clones alive.

Medians in milliseconds, of a guest that has written to 16 MiB and never rests. `save`: a full snapshot. `clone`: until
a clone that a pool has ready, in a process of its own, has said something. `cold`: the same with nothing made ahead but
the zygote. `fork`: the call of `MicroVM.fork` for one clone, which runs when it returns.
"""

from __future__ import annotations

import resource
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.clone import GUEST_MIB, PATIENCE, READY, Consoles, first_output, taken
from bench.rows import GUESTS, Bench, Row, absolute
from crackle import Drive, MicroVM, Snapshot
from crackle.vmm.clones import stop_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROUNDS = 20
MEMORY_MIB = (128, 512, 2048, 8192)
VCPUS = (1, 2, 4, 8, 16)
DISKS = (1, 2, 4, 8, 16)
ALIVE = (1, 10, 100, 1000)
TOUCHED_MIB = 16


def rows(bench: Bench) -> Iterator[Row]:
    """Milliseconds, from one row to the next with one thing more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for mib in MEMORY_MIB:
        yield from _grown(bench, f"memory_{mib}", memory=mib)
    for vcpus in VCPUS:
        yield from _grown(bench, f"vcpus_{vcpus}", cpus=vcpus)
    for disks in DISKS:
        yield from _grown(bench, f"disks_{disks}", drives=_disks(bench.scratch, disks))
    yield from _beside(bench)


def _disks(scratch: Path, count: int) -> list[Drive]:
    drives = []
    for number in range(count):
        path = scratch / f"disk{number}"
        with path.open("wb") as file:
            file.truncate(1 << 20)
        drives.append(Drive(path.name, path_on_host=str(path), is_root_device=False, is_read_only=True))
    return drives


def _grown(bench: Bench, name: str, **options: Any) -> Iterator[Row]:
    path = bench.scratch / name
    saves, forks = [], []
    with _guest(**options) as vm:
        for number in range(bench.times(ROUNDS)):
            begin = time.perf_counter()
            vm.snapshot(path)
            # The first is of files that are not there yet.
            saves += [_since(begin)] if number else []
            begin = time.perf_counter()
            clones = vm.fork(1, console=lambda _index: (-1, -1))
            forks.append(_since(begin))
            stop_all(clones)
    yield absolute(f"growth.{name}.save", median(saves), "ms")
    _, outputs = taken(path, bench.times(ROUNDS), False, first_output)
    yield absolute(f"growth.{name}.clone", median(outputs), "ms")
    yield absolute(f"growth.{name}.cold", median(_cold(path, bench.times(ROUNDS))), "ms")
    yield absolute(f"growth.{name}.fork", median(forks), "ms")
    path.joinpath("memory").unlink()


def _guest(**options: Any) -> MicroVM:
    given = {"memory": GUEST_MIB, **options}
    vm = MicroVM(
        GUESTS / "idle.elf",
        boot_args=f"touch={TOUCHED_MIB} spin=2000",
        own_process=True,
        console_limit=4096,
        **given,
    )
    vm.start()
    vm.console.expect(r"\.\.\.", PATIENCE)
    return vm


def _cold(path: Path, times: int) -> list[float]:
    found = []
    consoles = Consoles(1)
    with Snapshot(path) as snapshot:
        for _ in range(times):
            begin = time.perf_counter()
            (vm,) = snapshot.clone(console=consoles)
            first_output(consoles)
            found.append(_since(begin))
            vm.stop()
            consoles.empty()
    consoles.close()
    return found


def _beside(bench: Bench) -> Iterator[Row]:
    """Clones with so many that rest beside them."""
    path = bench.scratch / "beside"
    with MicroVM(GUESTS / "idle.elf", boot_args=f"touch={TOUCHED_MIB}", memory=GUEST_MIB) as vm:
        vm.console.expect("idle\n", PATIENCE)
        vm.snapshot(path)
    talking = bench.scratch / "beside-talking"
    with _guest() as vm:
        vm.snapshot(talking)
    resting: list[MicroVM] = []
    try:
        with Snapshot(path) as snapshot:
            for count in ALIVE[:3] if bench.quick else ALIVE:
                while len(resting) < count:
                    more = min(READY, count - len(resting))
                    resting += snapshot.clone(more, console=lambda _index: (-1, -1))
                _, outputs = taken(talking, bench.times(ROUNDS), False, first_output)
                yield absolute(f"growth.alive_{count}.clone", median(outputs), "ms")
                yield absolute(
                    f"growth.alive_{count}.cold", median(_cold(talking, bench.times(ROUNDS))), "ms"
                )
    finally:
        stop_all(resting)


def _since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1000
