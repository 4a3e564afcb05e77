"""boot.*: from the InstanceStart request, and from the spawn, to the guest's first output byte."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

from bench.monitor import Monitor, alternate
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator

GOAL = "<= 1.0"
# A monitor may use the time between configuration and start; a client may leave it none or plenty.
PAUSES = {"boot.first_output": 0.0, "boot.first_output_prepared": 0.3}


def rows(bench: Bench) -> Iterator[Row]:
    """Milliseconds, with one vCPU and 128 MiB; two API calls between the spawn and InstanceStart."""
    starts: dict[tuple[str, str], list[float]] = defaultdict(list)
    spawns: dict[str, list[float]] = defaultdict(list)
    for name, command in alternate(bench.contestants, bench.times(30)):
        for row, pause in PAUSES.items():
            with Monitor(command, bench.scratch) as monitor:
                monitor.configure("hello", "end=idle")
                time.sleep(pause)
                starts[name, row].append(monitor.start_timed() * 1000)
                if not pause:
                    spawns[name].append((time.perf_counter() - monitor.spawned) * 1000)
    against = bench.reference_name
    for row in PAUSES:
        yield paired(row, "ms", starts["ours", row], starts["reference", row], against, GOAL)
    yield paired("boot.spawn_to_first_output", "ms", spawns["ours"], spawns["reference"], against)
