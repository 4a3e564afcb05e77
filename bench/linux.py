"""boot.vmm_share: how much of a Linux boot the monitor itself takes, and in which of its threads.

Debian's stock kernel to its first program, on this host if it runs Linux guests, else in the emulated host,
where every monitor is slower by the same factor: only shares and ratios mean something there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median
from typing import TYPE_CHECKING

from bench.rows import ROOT, Bench, Row, absolute, paired
from crackle.vmm.probe import probe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.linux_boot import Times

GOAL = "<= 5"
ROLES = ("main", "io", "vcpu")


def boots(monitors: list[str], times: int, *, emulated: bool) -> list[Times]:
    """So many boots in each monitor, by turns."""
    stock = [str(ROOT / "guest" / "kernel" / "stock"), "vmlinux", "initrd"]
    kernel, initrd = subprocess.run(stock, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    command = [sys.executable, "-m", "bench.linux_boot", str(times), kernel, initrd, *monitors]
    if emulated:
        command = [str(ROOT / "tools" / "emuhost"), "--timeout", "600", "--", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=700)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stdout}{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def share(times: Times, *roles: str) -> float:
    """Percent of the boot that these threads were in user space and not in the guest."""
    return sum(max(times["threads"].get(role, [0.0])[0], 0.0) for role in roles) / times["boot"] * 100


def rows(bench: Bench) -> Iterator[Row]:
    """Percent of the time from InstanceStart to init; and that time."""
    emulated = not probe().linux
    monitors = [command[0] for command in bench.contestants.values()]
    measured = boots(monitors, 2 if bench.quick else 5, emulated=emulated)
    ours, theirs = (
        [each for each in measured if each["monitor"] == monitor] for monitor in (*monitors, "")[:2]
    )
    where = "InstanceStart to init" + (", emulated host" if emulated else "")
    yield absolute("boot.vmm_share", median(share(times, *ROLES) for times in ours), "%", GOAL, where)
    for role in ROLES:
        of_role = median(share(times, role) for times in ours)
        yield absolute(f"boot.vmm_share.{role}", of_role, "%", None, f"user space of the {role} thread")
    if theirs:
        other = median(share(times, *ROLES) for times in theirs)
        yield absolute("boot.vmm_share.reference", other, "%", None, bench.reference_name)
    our_seconds, their_seconds = ([times["boot"] for times in many] for many in (ours, theirs))
    yield paired("boot.linux", "s", our_seconds, their_seconds, bench.reference_name)
