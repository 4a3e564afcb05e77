"""vsock.*: a stream each way between a host program and a polling bare-metal guest.

Beside the reference, and beside a socket pair. Both the host program and the pair are `bench/streams.c`. What is told
is what the receiver saw.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING, NamedTuple

from bench.monitor import Monitor, alternate, device_seconds, idle_switches
from bench.rows import BUILD, ROOT, Bench, Row, absolute, paired

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MILLISECONDS = 250
IDLE_CONNECTIONS = 20
GUEST_PORT, HOST_PORT = 52, 80
NUMBERS = count()


class Test(NamedTuple):
    """What is measured: its row, the way, bytes of what is written at once, and the guest's options."""

    name: str
    to_guest: bool
    size: int
    options: str = ""


TESTS = (
    Test("vsock.to_guest_64k", True, 65536, "buffer=65536 buffers=64 credit=1048576"),
    Test("vsock.to_guest_4k", True, 4096, "buffer=4096 buffers=128"),
    Test("vsock.to_host_64k", False, 65536),
    Test("vsock.to_host_4k", False, 4096),
)


class Speed(NamedTuple):
    """MiB a second, and seconds of CPU for each GiB, of everything but vCPUs."""

    mib: float
    cpu_per_gib: float


@contextmanager
def guest(command: Sequence[str], bench: Bench, options: str) -> Iterator[tuple[Monitor, Path]]:
    """A monitor whose guest runs `vsock` with these options, and its socket's path."""
    path = bench.scratch / f"vsock-{next(NUMBERS)}"
    with Monitor(command, bench.scratch) as monitor:
        monitor.configure("vsock", f"end=idle {options}", vsock={"guest_cid": 3, "uds_path": str(path)})
        try:
            monitor.start()
            monitor.wait_output("vsock cid")
            keep_apart(monitor.pid)
            yield monitor, path
        finally:
            path.unlink(missing_ok=True)


def keep_apart(pid: int) -> None:
    """Give the vCPU, which polls, a processor of its own.

    What it shares one with would wait for whole time slices, more or less often as it happens.
    """
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) == 1:
        return
    for task in Path(f"/proc/{pid}/task").iterdir():
        polls = "vcpu" in (task / "comm").read_text()
        os.sched_setaffinity(int(task.name), processors[-1:] if polls else processors[:-1])


def beside(*command: str) -> Popen[str]:
    """A host program, where it leaves the vCPU alone."""
    first = ",".join(map(str, sorted(os.sched_getaffinity(0))[:-1] or [0]))
    return Popen(["taskset", "--cpu-list", first, *command], stdout=PIPE, text=True)


def speed_of(printed: str, pattern: str, cpu_seconds: float) -> Speed:
    found = re.search(rf"{pattern}bytes=(\d+) us=(\d+)", printed)
    if not found or not int(found[1]):
        raise RuntimeError(f"no result in: {printed}")
    size, us = int(found[1]), int(found[2])
    return Speed(size / us * 1e6 / (1 << 20), cpu_seconds / (size / (1 << 30)))


def to_guest(command: Sequence[str], bench: Bench, tool: Path, test: Test) -> Speed:
    with guest(command, bench, f"{test.options} t=recv") as (monitor, path):
        monitor.wait_output("recv ready")
        before = device_seconds(monitor.pid)
        arguments = ("send", str(path), str(GUEST_PORT), str(test.size), str(MILLISECONDS))
        with beside(str(tool), *arguments) as sender:
            sender.communicate(timeout=30)
        printed = monitor.wait_output("vsock end")
        return speed_of(printed, "recv ", device_seconds(monitor.pid) - before)


def to_host(command: Sequence[str], bench: Bench, tool: Path, test: Test) -> Speed:
    options = f"{test.options} ms={MILLISECONDS} t=wait,200 t=send,{test.size},{HOST_PORT}"
    with guest(command, bench, options) as (monitor, path), ExitStack() as stack:
        arguments = ("receive", f"{path}_{HOST_PORT}", "65536")
        receiver = stack.enter_context(beside(str(tool), *arguments))
        stack.callback(receiver.kill)
        before = device_seconds(monitor.pid)
        monitor.wait_output("vsock end")
        cpu = device_seconds(monitor.pid) - before
        printed, _ = receiver.communicate(timeout=30)
        return speed_of(printed, "", cpu)


def measure(command: Sequence[str], bench: Bench, tool: Path, test: Test) -> Speed:
    """One run of the test in one monitor."""
    return (to_guest if test.to_guest else to_host)(command, bench, tool, test)


def pair(tool: Path, test: Test) -> Speed:
    """The same between two processes without a monitor."""
    command = [str(tool), "pair", str(test.size), str(MILLISECONDS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    return speed_of(done.stdout, "", int(done.stdout.rsplit("=", 1)[1]) / 1e6)


def idle_wakeups(bench: Bench) -> float:
    """Times a second that a thread of ours wakes while the guest halts and connections wait for nothing."""
    import socket

    with (
        guest(bench.ours, bench, f"irq t=echo,{IDLE_CONNECTIONS + 1}") as (monitor, path),
        ExitStack() as stack,
    ):
        monitor.wait_output("echo ready")

        def connected() -> socket.socket:
            program = stack.enter_context(socket.socket(socket.AF_UNIX))
            program.settimeout(10)
            program.connect(str(path))
            program.sendall(b"CONNECT 53\n")
            while not program.recv(32).endswith(b"\n"):
                pass
            return program

        for _ in range(IDLE_CONNECTIONS):
            connected()
        return idle_switches(monitor.pid)


def rows(bench: Bench) -> Iterator[Row]:
    """MiB a second."""
    tool = BUILD / "bench" / "streams"
    tool.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", "-O2", "-o", str(tool), str(ROOT / "bench" / "streams.c")], check=True)
    found: dict[tuple[str, str], list[Speed]] = defaultdict(list)
    for turn, (name, command) in enumerate(alternate(bench.contestants, bench.times(15))):
        for test in TESTS:
            found[name, test.name].append(measure(command, bench, tool, test))
            if turn % len(bench.contestants) == 0:
                found["pair", test.name].append(pair(tool, test))
    for test in TESTS:
        who = ("ours", "reference", "pair")
        mib = {name: [one.mib for one in found[name, test.name]] for name in who}
        cpu = {name: [one.cpu_per_gib for one in found[name, test.name]] for name in who}
        reference = bench.reference_name
        yield paired(test.name, "MiB/s", mib["ours"], mib["reference"], reference, ">= 1.0")
        yield paired(f"{test.name}.pair", "MiB/s", mib["ours"], mib["pair"], "a socket pair", ">= 0.7")
        yield paired(f"{test.name}.cpu", "s/GiB", cpu["ours"], cpu["reference"], reference, "<= 1.0")
    yield absolute("vsock.idle", idle_wakeups(bench), "switches/s", "== 0")
