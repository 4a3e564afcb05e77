"""What else a host may be doing while something is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

PERIOD_US = 100_000


@contextmanager
def beside(command: Sequence[str]) -> Iterator[None]:
    """A program that runs meanwhile."""
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def third_thread() -> AbstractContextManager[None]:
    """A program beside that never sleeps."""
    return beside([sys.executable, "-c", "while True: pass"])


@contextmanager
def quota_of_one() -> Iterator[None]:
    """This process and those it starts have one processor's time between them (cgroup v1 or v2, cpu controller)."""
    roots = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    root = next(root for root in roots if (root / "cgroup.procs").exists())
    group = root / f"crackle-bench-{os.getpid()}"
    group.mkdir()
    try:
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(PERIOD_US))
        else:
            (group / "cpu.max").write_text(f"{PERIOD_US} {PERIOD_US}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (root / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


HOSTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "quiet": nullcontext,
    "third": third_thread,
    "quota": quota_of_one,
}
