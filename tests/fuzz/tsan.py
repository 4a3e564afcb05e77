"""Runs `stress.py` on a core built with ThreadSanitizer.

    python tests/fuzz/tsan.py SECONDS

Each kind of stress for so long; status FOUND, and the reports, when there is a race or a thread hangs. The interpreter
is not instrumented: what happens under the GIL is known by its mutex only. tsan.supp says what is left out, and why.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import asan  # noqa: E402

RUNS = (
    ("device", "Sync"),
    ("device", "Async"),
    ("device", "net"),
    ("bus",),
    ("pause", "hammer"),
    ("pause", "exits"),
)


def patience(seconds: float) -> float:
    """After how many a run of so many hangs, where it gets only what other tests leave of the processors."""
    return seconds * 10 + 600


def run(arguments: tuple[str, ...], seconds: float) -> tuple[int, str]:
    """(status, what it printed) of one kind of stress under ThreadSanitizer."""
    # Its shadow memory wants the addresses that a process has without randomisation.
    command = ["setarch", platform.machine(), "-R", sys.executable, str(HERE / "stress.py"), *arguments]
    done = subprocess.run(
        [*command, str(seconds)],
        env=asan.environment(asan.TSAN),
        cwd=asan.ROOT,
        capture_output=True,
        text=True,
        timeout=patience(seconds),
    )
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    """0, or FOUND."""
    seconds, worst = float(sys.argv[1]), 0
    for arguments in RUNS:
        if arguments[0] == "pause" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
            print(*arguments, "needs /dev/kvm")
            continue
        status, printed = run(arguments, seconds)
        print(*arguments, "status", status)
        print(printed if status else printed.splitlines()[-1])
        worst = worst or (asan.FOUND if status else 0)
    return worst


if __name__ == "__main__":
    sys.exit(main())
