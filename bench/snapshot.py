"""snapshot.*: a full snapshot, and a guest loaded from it in a fresh process, until it says something.

The guest sleeps, and says something every millisecond. Three clocks: `create` is the request's answer, `load` the
answer of a load that resumes, `load_output` the first byte of the restored guest, both in a process that has answered
before; `spawn_output` the same byte from the spawn of a process that is asked as soon as it can be.

`cold_served` is `load_output` of a guest that looks at 16 MiB before it says something, none of it in the page cache:
served by `crackle snapshot serve`, which has noted what it wants, against a memory file that is mapped.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from bench.monitor import DEFAULT_TIMEOUT, Monitor, MonitorError, alternate
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TOUCHED_MIB = 16


def rows(bench: Bench) -> Iterator[Row]:
    """Milliseconds; guests of 128 MiB, of which they have used 16."""
    against = bench.reference_name
    create: dict[str, list[float]] = defaultdict(list)
    load: dict[str, list[float]] = defaultdict(list)
    output: dict[str, list[float]] = defaultdict(list)
    spawned: dict[str, list[float]] = defaultdict(list)
    places = {name: _taken(command, bench, name, create) for name, command in bench.contestants.items()}
    for name, command in alternate(bench.contestants, bench.times(60)):
        with Monitor(command, bench.scratch) as monitor:
            # A process that is up: what its start takes is in the other figure.
            monitor.request("GET", "/")
            answered, said, _ = _loaded(monitor, places[name])
        load[name].append(answered)
        output[name].append(said)
        with Monitor(command, bench.scratch) as monitor:
            spawned[name].append(_loaded(monitor, places[name])[2])
    yield paired("snapshot.create", "ms", create["ours"], create["reference"], against, "<= 0.7")
    yield paired("snapshot.load", "ms", load["ours"], load["reference"], against)
    yield paired("snapshot.load_output", "ms", output["ours"], output["reference"], against, "<= 0.7")
    yield paired("snapshot.spawn_output", "ms", spawned["ours"], spawned["reference"], against)
    yield _cold(bench)


def _cold(bench: Bench) -> Row:
    command, paths = bench.contestants["ours"], _paths(bench, "cold")
    with Monitor(command, bench.scratch) as monitor:
        monitor.configure("count", f"touch={TOUCHED_MIB}")
        monitor.start_timed()
        monitor.request("PATCH", "/vm", {"state": "Paused"})
        monitor.request("PUT", "/snapshot/create", paths)
    memory, handler = paths["mem_file_path"], str(bench.scratch / "handler.sock")
    took: dict[str, list[float]] = defaultdict(list)
    serve = [sys.executable, "-m", "crackle.cli.main", "snapshot", "serve", memory, "--socket", handler]
    with subprocess.Popen(serve) as process:
        try:
            while not os.path.exists(handler):
                time.sleep(0.01)
            for number in range(bench.times(20) + 1):
                for kind, path in (("Uffd", handler), ("File", memory)):
                    _forget(memory)
                    with Monitor(command, bench.scratch) as monitor:
                        monitor.request("GET", "/")
                        said = _loaded(monitor, {**paths, "backend_type": kind, "mem_file_path": path})[1]
                    # The first one is noted.
                    if number:
                        took[kind].append(said)
        finally:
            process.terminate()
    return paired("snapshot.cold_served", "ms", took["Uffd"], took["File"], "File")


def _forget(path: str) -> None:
    """Have none of the file in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _paths(bench: Bench, name: str) -> dict[str, str]:
    return {
        "snapshot_path": str(bench.scratch / f"{name}.state"),
        "mem_file_path": str(bench.scratch / f"{name}.memory"),
    }


def _taken(command: Sequence[str], bench: Bench, name: str, create: dict[str, list[float]]) -> dict[str, str]:
    """The paths of a snapshot, which was taken a few times."""
    paths = _paths(bench, name)
    with Monitor(command, bench.scratch) as monitor:
        monitor.configure("idle", f"tick=1000 beats=1 touch={TOUCHED_MIB}")
        monitor.start_timed()
        monitor.request("PATCH", "/vm", {"state": "Paused"})
        for _ in range(bench.times(10)):
            begin = time.perf_counter()
            monitor.request("PUT", "/snapshot/create", paths)
            create[name].append((time.perf_counter() - begin) * 1000)
    return paths


def _loaded(monitor: Monitor, paths: dict[str, str]) -> tuple[float, float, float]:
    """Milliseconds from the request to the answer and to the first output, and from the spawn to that."""
    body = {
        "snapshot_path": paths["snapshot_path"],
        "mem_backend": {
            "backend_type": paths.get("backend_type", "File"),
            "backend_path": paths["mem_file_path"],
        },
        "resume_vm": True,
    }
    begin = time.perf_counter()
    monitor.send("PUT", "/snapshot/load", body)
    answered = said = 0.0
    watched = [monitor.connection.fileno(), monitor.console]
    while watched:
        ready = select.select(watched, [], [], DEFAULT_TIMEOUT)[0]
        now = time.perf_counter()
        if not ready:
            raise MonitorError("a loaded guest says nothing")
        for fd in ready:
            watched.remove(fd)
            if fd == monitor.console:
                said = now
            else:
                answered = now
                status, answer = monitor.receive()
                if status // 100 != 2:
                    raise MonitorError(answer.decode(errors="replace"))
    return (answered - begin) * 1000, (said - begin) * 1000, (said - monitor.spawned) * 1000
