"""memory.*: what a microVM costs beside its guest's memory, and whether an idle one costs anything."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from bench.monitor import Monitor, alternate, context_switches
from bench.rows import Bench, Row, absolute, paired

if TYPE_CHECKING:
    from collections.abc import Iterator

GUEST_MIB = 128
IDLE_SECONDS = 3


def overhead_kib(pid: int, guest_mib: int) -> tuple[int, int]:
    """(PSS, private dirty) in KiB of a process, its mapping of guest memory left out.

    That mapping is the one of at least the guest's size; KVM may have split it, but nothing else is so large.
    """
    pss = dirty = size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Size":
            size = int(rest.split()[0])
        elif size < guest_mib * 1024 * 0.9:
            if name == "Pss":
                pss += int(rest.split()[0])
            elif name == "Private_Dirty":
                dirty += int(rest.split()[0])
    return pss, dirty


def cpu_ticks(pid: int) -> int:
    """User and system time of a process's threads so far, in clock ticks (proc(5), stat 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def rows(bench: Bench) -> Iterator[Row]:
    """One vCPU, one drive, a guest that halts for good."""
    drive = bench.scratch / "memory.img"
    drive.write_bytes(bytes(1 << 20))
    pss: dict[str, list[float]] = defaultdict(list)
    dirty: dict[str, list[float]] = defaultdict(list)
    ticks: dict[str, list[int]] = defaultdict(list)
    switches: dict[str, list[int]] = defaultdict(list)
    for name, command in alternate(bench.contestants, 3):
        with Monitor(command, bench.scratch) as monitor:
            monitor.configure("idle", memory_mib=GUEST_MIB, drives=[drive])
            monitor.start()
            monitor.wait_output("idle")
            time.sleep(2.0)  # what follows a start is over
            before, switched = cpu_ticks(monitor.pid), context_switches(monitor.pid)
            time.sleep(IDLE_SECONDS)
            ticks[name].append(cpu_ticks(monitor.pid) - before)
            switches[name].append(context_switches(monitor.pid) - switched)
            kib = overhead_kib(monitor.pid, GUEST_MIB)
            pss[name].append(kib[0] / 1024)
            dirty[name].append(kib[1] / 1024)
    against = bench.reference_name
    row = paired("memory.pss", "MiB", pss["ours"], pss["reference"], against)
    goal = "<= 12"
    yield row._replace(goal=goal, met=row.value <= 12)
    yield paired("memory.private_dirty", "MiB", dirty["ours"], dirty["reference"], against)
    hertz = os.sysconf("SC_CLK_TCK")
    unit = f"ticks of 1/{hertz} s in {IDLE_SECONDS} s"
    yield absolute("memory.idle_cpu", max(ticks["ours"]), unit, "== 0", "the guest idles")
    unit = f"context switches in {IDLE_SECONDS} s"
    yield absolute("memory.idle_wakeups", max(switches["ours"]), unit, None, "the guest idles")
