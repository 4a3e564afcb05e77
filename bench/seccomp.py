"""seccomp.*: what the filters of system calls cost: the start of a guest, and what it does through our system calls."""

from __future__ import annotations

import importlib
from collections import defaultdict
from typing import TYPE_CHECKING

from bench.jail import DATA_PATH
from bench.launch import first_output
from bench.monitor import Monitor, alternate
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator

AGAINST = "--no-seccomp"


def rows(bench: Bench) -> Iterator[Row]:
    """Wall time from the spawn; a guest's speed."""
    both = bench._replace(reference=[*bench.ours, AGAINST], reference_name=AGAINST)
    ready: dict[str, list[float]] = defaultdict(list)
    output: dict[str, list[float]] = defaultdict(list)
    for who, command in alternate(both.contestants, bench.times(50)):
        with Monitor(command, bench.scratch) as monitor:
            ready[who].append(monitor.ready_after * 1000)
            output[who].append(first_output(monitor) * 1000)
    yield paired("seccomp.api_socket", "ms", ready["ours"], ready["reference"], AGAINST, "<= 1.05")
    yield paired("seccomp.first_output", "ms", output["ours"], output["reference"], AGAINST, "<= 1.1")
    for area, wanted in DATA_PATH.items():
        for row in importlib.import_module(f"bench.{area}").rows(both):
            if row.name in wanted:
                name = row.name.removesuffix(".reference")
                yield row._replace(name=f"seccomp.{name}", goal=None, met=None)
