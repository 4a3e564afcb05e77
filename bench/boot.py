"""boot.*: from the InstanceStart request, and from the spawn, to the guest's first output byte."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING

from bench.monitor import Monitor, alternate
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator


def rows(bench: Bench) -> Iterator[Row]:
    """Milliseconds, with one vCPU and 128 MiB; three API calls between the spawn and the first output."""
    starts: dict[str, list[float]] = defaultdict(list)
    spawns: dict[str, list[float]] = defaultdict(list)
    for name, command in alternate(bench.contestants, bench.times(30)):
        with Monitor(command, bench.scratch) as monitor:
            monitor.configure("hello", "end=idle")
            starts[name].append(monitor.start_timed() * 1000)
            spawns[name].append((time.perf_counter() - monitor.spawned) * 1000)
    against = bench.reference_name
    yield paired("boot.first_output", "ms", starts["ours"], starts["reference"], against, "<= 1.0")
    yield paired("boot.spawn_to_first_output", "ms", spawns["ours"], spawns["reference"], against)
