"""start.*: processor time from the spawn until the API socket accepts and until the first answer."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from bench.monitor import Monitor, alternate
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator


def rows(bench: Bench) -> Iterator[Row]:
    """Milliseconds of processor time, user and system; beside an interpreter that does nothing."""
    python = os.path.realpath(sys.executable)
    accepting: dict[str, list[float]] = defaultdict(list)
    answering: dict[str, list[float]] = defaultdict(list)
    walls: dict[str, list[float]] = defaultdict(list)
    empty: list[float] = []
    for name, command in alternate(bench.contestants, bench.times(30)):
        with Monitor(command, bench.scratch) as monitor:
            accepting[name].append(_processor_ms(monitor.pid))
            walls[name].append(monitor.ready_after * 1000)
            monitor.request("GET", "/")
            answering[name].append(_processor_ms(monitor.pid))
        if name == "ours":
            empty.append(_interpreter_ms(python))
    nothing, against = "python3 -I -S -c pass", bench.reference_name
    yield paired("start.api_socket", "ms CPU", accepting["ours"], empty, nothing, "<= 3.0")
    yield paired("start.api_socket_reference", "ms CPU", accepting["ours"], accepting["reference"], against)
    yield paired("start.api_socket_wall", "ms", walls["ours"], walls["reference"], against)
    yield paired("start.first_answer", "ms CPU", answering["ours"], empty, nothing)


def _processor_ms(pid: int) -> float:
    """Processor time a live process has used so far."""
    # Another process's clock, as clock_getcpuclockid(3) makes it. Some kernels show 0 until the first tick.
    while not (seconds := time.clock_gettime((~pid << 3) | 2)):
        time.sleep(0.0001)
    return seconds * 1000


def _interpreter_ms(python: str) -> float:
    pid = os.posix_spawn(python, [python, "-I", "-S", "-c", "pass"], os.environ)
    _, _, usage = os.wait4(pid, 0)
    return (usage.ru_utime + usage.ru_stime) * 1000
