"""launch.*: microVMs from crackle-launch with a warm zygote, beside the other monitor started as it always is."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from bench.memory import overhead_kib
from bench.monitor import DEFAULT_TIMEOUT, Monitor, MonitorError, alternate
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# As many microVMs at a time as the project's figures are for; their memory is settled after so long.
CROWD = 60
CROWD_MIB = 128
SETTLED_S = 3.0
# Until there is a spare again.
SPARE_S = 0.15


@contextlib.contextmanager
def zygote(scratch: Path, spares: int = 0) -> Iterator[int]:
    """A warm one, which crackle-launch finds; its process."""
    path = scratch / "zygote"
    process = subprocess.Popen(
        [sys.executable, "-X", "utf8", "-m", "crackle.cli.zygote", "--spares", str(spares), "--socket", path]
    )
    before = os.environ.get("CRACKLE_ZYGOTE")
    os.environ["CRACKLE_ZYGOTE"] = str(path)
    try:
        deadline = time.perf_counter() + DEFAULT_TIMEOUT
        while not path.exists():
            if process.poll() is not None or time.perf_counter() > deadline:
                raise MonitorError("no zygote")
            time.sleep(0.01)
        # The first one it answers to: everything is imported then.
        Monitor([launcher()], scratch).close()
        yield process.pid
    finally:
        if before is None:
            del os.environ["CRACKLE_ZYGOTE"]
        else:
            os.environ["CRACKLE_ZYGOTE"] = before
        process.terminate()
        process.wait()


def launcher() -> str:
    """crackle-launch of this installation."""
    return str(Path(sys.executable).with_name("crackle-launch"))


def rows(bench: Bench) -> Iterator[Row]:
    """Wall time, with nothing made ahead and with a spare; memory and rate, with nothing made ahead."""
    both = {**bench.contestants, "ours": [launcher()]}
    against = bench.reference_name
    for spares, name in ((0, "launch"), (1, "launch.spare")):
        ready: dict[str, list[float]] = defaultdict(list)
        output: dict[str, list[float]] = defaultdict(list)
        with zygote(bench.scratch, spares):
            if spares:
                learn(bench.scratch)
            for who, command in alternate(both, bench.times(200)):
                time.sleep(SPARE_S if spares else 0)
                with Monitor(command, bench.scratch) as monitor:
                    ready[who].append(monitor.ready_after * 1000)
                    output[who].append(first_output(monitor) * 1000)
        yield paired(f"{name}.api_socket", "ms", ready["ours"], ready["reference"], against, "<= 2.0")
        yield paired(f"{name}.first_output", "ms", output["ours"], output["reference"], against, "<= 0.5")
    crowds: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for who, command in alternate(both, bench.times(5)):
        with zygote(bench.scratch) as pid:
            crowds[who].append(crowd(command, bench.scratch, pid if who == "ours" else None))
    pss, dirty, rate = (
        {who: [each[place] for each in crowds[who]] for who in ("ours", "reference")} for place in range(3)
    )
    each = f"KiB each of {CROWD}"
    yield paired("launch.pss", each, pss["ours"], pss["reference"], against, "<= 1.5")
    yield paired("launch.private_dirty", each, dirty["ours"], dirty["reference"], against)
    yield paired("launch.rate", "started/s", rate["ours"], rate["reference"], against, ">= 2.0")


def learn(scratch: Path) -> None:
    """Let the zygote see what one child writes to."""
    with Monitor([launcher()], scratch) as monitor:
        first_output(monitor)
        time.sleep(SETTLED_S)


def first_output(monitor: Monitor) -> float:
    """Seconds from the spawn to the first byte of the guest's output."""
    monitor.configure("idle", memory_mib=CROWD_MIB)
    monitor.send("PUT", "/actions", {"action_type": "InstanceStart"})
    if not select.select([monitor.console], [], [], DEFAULT_TIMEOUT)[0]:
        raise MonitorError("the guest says nothing")
    taken = time.perf_counter() - monitor.spawned
    monitor.receive()
    return taken


def crowd(command: Sequence[str], scratch: Path, zygote_pid: int | None) -> tuple[float, float, float]:
    """(PSS, private dirty) in KiB of each of many, its launcher included, and how many were started a second."""

    def start(_number: int) -> Monitor:
        monitor = Monitor(command, scratch)
        first_output(monitor)
        return monitor

    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        monitors = list(pool.map(start, range(CROWD)))
    rate = CROWD / (time.perf_counter() - started)
    try:
        time.sleep(SETTLED_S)
        pids = [monitor.pid for monitor in monitors]
        if zygote_pid is not None:
            children = Path(f"/proc/{zygote_pid}/task/{zygote_pid}/children").read_text()
            pids += map(int, children.split())
        found = [overhead_kib(pid, CROWD_MIB) for pid in pids]
    finally:
        for monitor in monitors:
            monitor.close()
    return sum(pss for pss, _ in found) / CROWD, sum(dirty for _, dirty in found) / CROWD, rate
