"""clone.*: microVMs that go on from a snapshot, each with a process of its own or in this one, made ahead or not.

Three clocks, of which each row names one: `call`, until the call has returned; `output`, until the guest's first byte,
which it writes within ten microseconds of its first instruction; `answer`, until the first byte of a guest that sleeps
has come back to who typed it. p50 and p99 over as many rounds as there are. Nothing is compared: nobody else does it.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess
import sys
import time
from statistics import quantiles
from typing import TYPE_CHECKING

from bench.memory import overhead_kib
from bench.rows import GUESTS, Bench, Row, absolute
from crackle import MicroVM, Pool, Snapshot
from crackle.vmm.clones import stop_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

GUEST_MIB = 128
PATIENCE = 120.0
# Ready at a time, and the pause between two takers.
READY, BETWEEN_S = 4, 0.02
CROWD, THOUSAND = 60, 1000
SETTLED_S = 3.0
PROCESSORS = f"{os.cpu_count()} processors"

# How many clones say something, in a process of its own: it has many descriptors and little else.
_THOUSAND = """
import sys
from bench.clone import thousand
print(thousand(sys.argv[1], int(sys.argv[2])))
"""


def rows(bench: Bench) -> Iterator[Row]:
    """Milliseconds; guests of 128 MiB with one vCPU and no devices."""
    talking = _saved(bench.scratch / "talking", "idle", "spin=2000", r"\.\.\.")
    echoing = _saved(bench.scratch / "echoing", "echo", "", "echo\n")
    quiet = _saved(bench.scratch / "quiet", "idle", "", "idle\n")
    times = bench.times(200)
    for name, in_process, goals in (
        ("own", False, ("<= 0.5", "<= 1.5")),
        ("in_process", True, ("<= 0.25", "<= 0.6")),
    ):
        call, output = taken(talking, times, in_process, first_output)
        yield from _percentiles(f"clone.{name}.call", call)
        yield from _percentiles(f"clone.{name}.output", output, goals)
        _, answer = taken(echoing, times, in_process, _answer)
        yield from _percentiles(f"clone.{name}.answer", answer)
        yield from _percentiles(f"clone.{name}.cold_output", _cold(talking, bench.times(60), in_process))
        goal = "<= 200" if in_process else "<= 540"
        yield absolute(f"clone.{name}.pss", _memory(quiet, in_process), f"KiB each of {CROWD}", goal)
    count = 100 if bench.quick else THOUSAND
    done = subprocess.run(
        [sys.executable, "-c", _THOUSAND, talking, str(count)], capture_output=True, text=True, check=True
    )
    goal = None if bench.quick else "<= 0.8"
    yield absolute("clone.own.thousand", float(done.stdout), f"s for {count} on {PROCESSORS}", goal)


def _saved(path: Path, guest: str, boot_args: str, said: str) -> Path:
    with MicroVM(GUESTS / f"{guest}.elf", boot_args=boot_args, memory=GUEST_MIB) as vm:
        vm.console.expect(said, PATIENCE)
        vm.snapshot(path)
    return path


def _percentiles(name: str, figures: list[float], goals: tuple[str, str] | None = None) -> Iterator[Row]:
    cuts = quantiles(figures, n=100, method="inclusive")
    for which, value, goal in zip(("p50", "p99"), (cuts[49], cuts[98]), goals or (None, None), strict=True):
        yield absolute(f"{name}.{which}", value, f"ms, {len(figures)} rounds", goal)


class Consoles:
    """The (input, output) descriptors of guests, by number; theirs of one are somebody else's when it is used again."""

    def __init__(self, count: int) -> None:
        self.pipes = [(os.pipe(), _narrow_pipe()) for _ in range(count)]

    def __call__(self, index: int) -> tuple[int, int]:
        typed, said = self.pipes[index]
        return typed[0], said[1]

    @property
    def outputs(self) -> list[int]:
        return [said[0] for _, said in self.pipes]

    def type(self) -> None:
        """A byte for all, as nobody knows who was taken."""
        for typed, _ in self.pipes:
            os.write(typed[1], b"x")

    def empty(self) -> None:
        for typed, said in self.pipes:
            for fd in (typed[0], said[0]):
                while _readable([fd], 0):
                    os.read(fd, 65536)

    def close(self) -> None:
        for typed, said in self.pipes:
            for fd in (*typed, *said):
                os.close(fd)


def _narrow_pipe() -> tuple[int, int]:
    """Descriptors to read from and to write to, with room for a few bytes: who has been heard is to stand still."""
    read, write = socket.socketpair()
    write.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return read.detach(), write.detach()


def _readable(fds: Sequence[int], seconds: float) -> bool:
    """Whether there is something in one of them by then. They may be above what select(2) takes."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def first_output(consoles: Consoles) -> None:
    if not _readable(consoles.outputs, PATIENCE):
        raise TimeoutError("a clone says nothing")


def _answer(consoles: Consoles) -> None:
    consoles.type()
    first_output(consoles)


def taken(
    path: Path, times: int, in_process: bool, heard: Callable[[Consoles], None]
) -> tuple[list[float], list[float]]:
    """Milliseconds from a pool's `take` to its return, and until the guest is heard."""
    calls, outputs = [], []
    # Numbers up to twice as many are given: the one that is in use goes before its successor comes.
    consoles = Consoles(2 * READY)
    with Pool(path, READY, limit=2 * READY, console=consoles, in_process=in_process) as pool:
        for _ in range(times):
            pool.wait_ready(timeout=PATIENCE)
            time.sleep(BETWEEN_S)
            begin = time.perf_counter()
            vm = pool.take()
            calls.append((time.perf_counter() - begin) * 1000)
            heard(consoles)
            outputs.append((time.perf_counter() - begin) * 1000)
            vm.stop()
            consoles.empty()
    consoles.close()
    return calls, outputs


def _cold(path: Path, times: int, in_process: bool) -> list[float]:
    """Milliseconds from `Snapshot.clone`, with nothing made ahead but the zygote, to the first output."""
    found = []
    consoles = Consoles(1)
    with Snapshot(path) as snapshot:
        for _ in range(times):
            begin = time.perf_counter()
            (vm,) = snapshot.clone(console=consoles, in_process=in_process)
            first_output(consoles)
            found.append((time.perf_counter() - begin) * 1000)
            vm.stop()
            consoles.empty()
    consoles.close()
    return found


def _memory(path: Path, in_process: bool) -> float:
    """KiB of PSS that each of many clones adds, guest memory left out."""
    with Snapshot(path) as snapshot:
        before = overhead_kib(os.getpid(), GUEST_MIB)[0]
        vms = snapshot.clone(CROWD, console=lambda _index: (-1, -1), in_process=in_process)
        try:
            time.sleep(SETTLED_S)
            if in_process:
                found = overhead_kib(os.getpid(), GUEST_MIB)[0] - before
            else:
                found = sum(overhead_kib(vm.pid, GUEST_MIB)[0] for vm in vms)
        finally:
            stop_all(vms)
    return found / CROWD


def thousand(path: str, count: int) -> float:
    """Seconds until so many clones, all of them ready, have said something, from the call that lets them go on."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pipes = [_narrow_pipe() for _ in range(count)]
    with Pool(path, count, limit=count, at_once=8, console=lambda index: (-1, pipes[index][1])) as pool:
        pool.wait_ready(timeout=10 * PATIENCE)
        heard = select.epoll()
        for read, _ in pipes:
            heard.register(read, select.EPOLLIN | select.EPOLLONESHOT)
        begin = time.perf_counter()
        vms = pool.take_many(count)
        left = count
        while left:
            left -= len(heard.poll(PATIENCE, count))
        taken = time.perf_counter() - begin
        stop_all(vms)
    return taken
