"""block.*: virtio-block from a polling bare-metal guest on a cached file, beside the reference and fio."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from bench.monitor import Monitor, alternate, device_seconds
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

FILE_MIB = 256
MILLISECONDS = 40
SLICES = 10
ENGINES = {"Sync": "psync", "Async": "io_uring"}
"""And the engine of fio that does the same."""


class Test(NamedTuple):
    """An access pattern: its row; operation, bytes, depth for the `blk` guest; fio's name."""

    name: str
    operation: str
    size: int
    depth: int
    fio: str


TESTS = (
    Test("randread_4k_qd1", "randread", 4096, 1, "randread"),
    Test("randread_4k_qd32", "randread", 4096, 32, "randread"),
    Test("randwrite_4k_qd1", "randwrite", 4096, 1, "randwrite"),
    Test("randwrite_4k_qd32", "randwrite", 4096, 32, "randwrite"),
    Test("seqread_128k", "seqread", 131072, 8, "read"),
    Test("seqwrite_128k", "seqwrite", 131072, 8, "write"),
)


def guest_run(
    command: Sequence[str], scratch: Path, file: Path, test: Test, engine: str, overlay: Path | None = None
) -> tuple[float, float]:
    """MiB/s of the best slice, and CPU seconds a GiB of all threads but the vCPU's over all slices."""
    options = f"t={test.operation},{test.size},{test.depth} " * SLICES
    with Monitor(command, scratch) as monitor:
        tasks = f"end=idle ms={MILLISECONDS} {options}"
        monitor.configure("blk", tasks, drives=[file], overlay=overlay, io_engine=engine)
        monitor.start()
        monitor.wait_output("khz=")
        before = device_seconds(monitor.pid)
        printed = monitor.wait_output("blk end")
        taken = device_seconds(monitor.pid) - before
    line = rf"blk {test.operation} {test.size} {test.depth} bytes=(\d+) cycles=\d+ us=(\d+)"
    slices = [(int(size), int(us)) for size, us in re.findall(line, printed)]
    if len(slices) != SLICES:
        raise RuntimeError(f"{len(slices)} results of {test.name} in: {printed}")
    total = sum(size for size, _ in slices)
    return max(size / us * 1e6 / (1 << 20) for size, us in slices), taken / (total / (1 << 30))


def fio_speed(file: Path, test: Test, engine: str) -> float:
    """MiB/s of fio in the host on the same file; psync does one request at a time whatever the depth."""
    command = ["fio", "--name=bench", f"--filename={file}", f"--rw={test.fio}", f"--bs={test.size}"]
    command += [f"--ioengine={ENGINES[engine]}", f"--iodepth={test.depth}", f"--size={FILE_MIB}M"]
    command += ["--time_based", f"--runtime={MILLISECONDS * SLICES}ms"]
    command += ["--direct=0", "--invalidate=0", "--randrepeat=0", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = "write" if "write" in test.fio else "read"
    return float(job[side]["bw_bytes"]) / (1 << 20)


def fill(file: Path) -> None:
    """Write the whole file anew: all of it is in the page cache and dirty, and the host has no reason yet to write it.

    Otherwise a measurement of writes depends on what the one before it has left.
    """
    with file.open("r+b") as image:
        for _ in range(FILE_MIB):
            image.write(b"\x5a" * (1 << 20))


def rows(bench: Bench) -> Iterator[Row]:
    """MiB/s; CPU seconds a GiB."""
    file = bench.scratch / "block.img"
    file.touch()
    fio = shutil.which("fio")
    for engine in ENGINES:
        for test in TESTS:
            speed: dict[str, list[float]] = defaultdict(list)
            cost: dict[str, list[float]] = defaultdict(list)
            for turn, (name, command) in enumerate(alternate(bench.contestants, bench.times(6))):
                fill(file)
                mibs, seconds = guest_run(command, bench.scratch, file, test, engine)
                speed[name].append(mibs)
                cost[name].append(seconds)
                if fio and turn % len(bench.contestants) == 0:
                    fill(file)
                    speed["fio"].append(fio_speed(file, test, engine))
            row = f"block.{engine.lower()}.{test.name}"
            against = bench.reference_name
            yield paired(row, "MiB/s", speed["ours"], speed["reference"], against, ">= 1.0")
            yield paired(f"{row}.cpu", "s/GiB", cost["ours"], cost["reference"], against, "<= 1.0")
            yield paired(f"{row}.fio", "MiB/s", speed["ours"], speed["fio"], f"fio {ENGINES[engine]}")
