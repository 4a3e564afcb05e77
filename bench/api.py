"""api.*: one request and its answer on a kept connection."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING

from bench.monitor import Monitor
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUESTS = 2000
# The monitors take turns of so many requests, so that what else the machine does hits both.
TURN = 100

BODY = b'{"vcpu_count":1,"mem_size_mib":128}'
CALLS = {
    "get_instance": b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n",
    "put_machine_config": (
        b"PUT /machine-config HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
    ),
}


def rows(bench: Bench) -> Iterator[Row]:
    """Medians in microseconds of requests that change nothing."""
    with contextlib.ExitStack() as stack:
        monitors = {
            name: stack.enter_context(Monitor(command, bench.scratch))
            for name, command in bench.contestants.items()
        }
        for call, request in CALLS.items():
            medians: dict[str, list[float]] = defaultdict(list)
            for _ in range(bench.times(REQUESTS // TURN)):
                for name, monitor in monitors.items():
                    medians[name].append(median(_exchange(monitor, request) for _ in range(TURN)))
            yield paired(
                f"api.{call}", "us", medians["ours"], medians["reference"], bench.reference_name, "<= 1.5"
            )


def _exchange(monitor: Monitor, request: bytes) -> float:
    """Microseconds from sending the request to having its answer."""
    begin = time.perf_counter_ns()
    monitor.connection.send(request)
    answer = monitor.connection.recv(4096)
    elapsed = time.perf_counter_ns() - begin
    if not answer.startswith(b"HTTP/1.1 2"):
        raise AssertionError(answer)
    return elapsed / 1000
