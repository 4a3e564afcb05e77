"""block.*: virtio-block from a polling bare-metal guest on a cached file, beside the reference and fio."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from bench.monitor import alternate, run_guest
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILE_MIB = 256
MILLISECONDS = 20
SLICES = 12


class Test(NamedTuple):
    """An access pattern: its row; operation, bytes, depth for the `blk` guest; fio's name; goal."""

    name: str
    operation: str
    size: int
    depth: int
    fio: str
    goal: str | None = ">= 1.0"


TESTS = (
    Test("block.randread_4k_qd1", "randread", 4096, 1, "randread"),
    Test("block.randread_4k_qd32", "randread", 4096, 32, "randread"),
    Test("block.randwrite_4k_qd32", "randwrite", 4096, 32, "randwrite", None),
    Test("block.seqread_128k", "seqread", 131072, 8, "read"),
    Test("block.seqwrite_128k", "seqwrite", 131072, 8, "write"),
)


def guest_speeds(printed: str) -> dict[str, float]:
    """MiB/s by test name, the best slice of each, from what the `blk` guest prints."""
    speeds = {}
    for test in TESTS:
        line = rf"blk {test.operation} {test.size} {test.depth} bytes=(\d+) cycles=\d+ us=(\d+)"
        slices = [int(size) / int(us) * 1e6 / (1 << 20) for size, us in re.findall(line, printed)]
        if len(slices) != SLICES:
            raise RuntimeError(f"{len(slices)} results of {test.name} in: {printed}")
        speeds[test.name] = max(slices)
    return speeds


def fio_speed(file: Path, test: Test) -> float:
    """MiB/s of `fio --ioengine=psync` in the host on the same file, one request at a time, as psync is."""
    command = ["fio", "--name=bench", f"--filename={file}", f"--rw={test.fio}", f"--bs={test.size}"]
    command += [
        "--ioengine=psync",
        f"--size={FILE_MIB}M",
        "--time_based",
        f"--runtime={MILLISECONDS * SLICES}ms",
    ]
    command += ["--direct=0", "--invalidate=0", "--randrepeat=0", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = "write" if "write" in test.fio else "read"
    return float(job[side]["bw_bytes"]) / (1 << 20)


def rows(bench: Bench) -> Iterator[Row]:
    """MiB/s."""
    file = bench.scratch / "block.img"
    with file.open("wb") as image:
        for _ in range(FILE_MIB):
            image.write(b"\x5a" * (1 << 20))
    options = " ".join(f"t={test.operation},{test.size},{test.depth}" for test in TESTS * SLICES)
    speeds: dict[tuple[str, str], list[float]] = defaultdict(list)
    fio = shutil.which("fio")
    for turn, (name, command) in enumerate(alternate(bench.contestants, bench.times(15))):
        file.read_bytes()  # cached, whatever the host has reclaimed meanwhile
        printed = run_guest(command, bench.scratch, "blk", f"ms={MILLISECONDS} {options}", drives=[file])
        for row, speed in guest_speeds(printed).items():
            speeds[name, row].append(speed)
        if fio and turn % (2 * len(bench.contestants)) == 0:
            for test in TESTS:
                speeds["fio", test.name].append(fio_speed(file, test))
    for test in TESTS:
        ours, theirs = speeds["ours", test.name], speeds["reference", test.name]
        yield paired(test.name, "MiB/s", ours, theirs, bench.reference_name, test.goal)
    for test in TESTS:
        beside = speeds["fio", test.name]
        ours = speeds["ours", test.name]
        every = max(len(ours) // max(len(beside), 1), 1)
        chosen = ours[::every][: len(beside)] or ours
        yield paired(f"{test.name}.fio", "MiB/s", chosen, beside, "fio --ioengine=psync")
