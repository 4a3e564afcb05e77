"""fork.*: for how long a running guest stands still when it is forked, median and 99th percentile.

The guest has 512 MiB, all of which it has written to, and a disk with an overlay; it never rests, and goes on writing
to 16 MiB. `pause` is the longest time for which it has stood still, as it finds itself; `monitor` what the monitor
says. `small`: it has small pages at first, and `huge`: huge ones. `twenty`: for twenty clones rather than one. `ready`:
from the request to the answer, when a clone runs.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import time
from collections import defaultdict
from contextlib import contextmanager
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from bench.rows import GUESTS, Bench, absolute
from crackle.cli.fork import ask

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from bench.rows import Row

MEMORY_MIB = 512
ROUNDS = 200
PATIENCE_S = 120.0


def rows(bench: Bench) -> Iterator[Row]:
    """Milliseconds."""
    for name, huge_pages, clones, rounds in (
        ("small", "None", 1, ROUNDS),
        ("huge", "Transparent", 1, ROUNDS),
        ("twenty", "Transparent", 20, ROUNDS // 10),
    ):
        taken = _forks(bench, huge_pages, clones, bench.times(rounds))
        for clock, goal in (("pause", "<= 5"), ("monitor", None), ("ready", None)):
            yield absolute(f"fork.{name}.{clock}", median(taken[clock]), "ms", goal)
            if rounds == ROUNDS:
                yield absolute(f"fork.{name}.{clock}.p99", quantiles(taken[clock], n=100)[98], "ms")


def _forks(bench: Bench, huge_pages: str, clones: int, rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = defaultdict(list)
    with _guest(bench.ours, bench.scratch, huge_pages) as (guest, socket):
        for number in range(rounds):
            _longest(guest)
            begin = time.perf_counter()
            answer = ask(socket, "/vm/fork", {"clones": _bodies(bench.scratch, number, clones)}, PATIENCE_S)
            taken["ready"].append((time.perf_counter() - begin) * 1000)
            taken["pause"].append(_longest(guest))
            taken["monitor"].append(answer["pause_us"] / 1000)
            _end(bench.scratch, answer)
    return taken


def _bodies(scratch: Path, number: int, clones: int) -> list[dict[str, Any]]:
    return [{"id": f"c{number}-{each}", "api_sock": str(scratch / f"c{each}")} for each in range(clones)]


def _end(scratch: Path, answer: dict[str, Any]) -> None:
    processes = [os.pidfd_open(clone["pid"]) for clone in answer["clones"]]
    for process in processes:
        signal.pidfd_send_signal(process, signal.SIGKILL)
    for process in processes:
        select.select([process], [], [], PATIENCE_S)
        os.close(process)
    for clone in answer["clones"]:
        (scratch / clone["api_sock"]).unlink()
        (scratch / f"{clone['id']}.disk.overlay").unlink()


@contextmanager
def _guest(
    command: Sequence[str], scratch: Path, huge_pages: str
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    socket = scratch / "fork.api"
    with (scratch / "fork.img").open("wb") as file:
        file.truncate(64 << 20)
    config = scratch / "fork.json"
    drive = {"drive_id": "disk", "is_root_device": False, "path_on_host": str(scratch / "fork.img")}
    config.write_text(
        json.dumps(
            {
                "boot-source": {
                    "kernel_image_path": str(GUESTS / "gaps.elf"),
                    "boot_args": f"touch={MEMORY_MIB - 32} busy=16",
                },
                "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "huge_pages": huge_pages},
                "drives": [{**drive, "overlay": {"path": str(scratch / "fork.overlay")}}],
            }
        )
    )
    guest = subprocess.Popen(
        [*command, "--api-sock", str(socket), "--config-file", str(config), "--level", "Off"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert guest.stdout is not None
        while b"gaps begins" not in guest.stdout.readline():
            pass
        yield guest, socket
    finally:
        guest.kill()
        guest.communicate()
        socket.unlink()
        for left in scratch.glob("*.overlay"):
            left.unlink()


def _longest(guest: subprocess.Popen[bytes]) -> float:
    """Milliseconds for which it has stood still since it was asked before."""
    assert guest.stdin is not None
    assert guest.stdout is not None
    guest.stdin.write(b"?")
    guest.stdin.flush()
    while (found := re.match(rb"gap (\d+) us", guest.stdout.readline())) is None:
        pass
    return int(found[1]) / 1000
