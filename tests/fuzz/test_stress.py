"""Threads against each other on one device, one guest, one bus: shortly, and under ThreadSanitizer too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

sys.path.insert(0, str(HERE))

import tsan  # noqa: E402

pytestmark = [pytest.mark.timeout(1800), pytest.mark.beside]
SECONDS = 2.0


def skip_without_kvm(arguments: tuple[str, ...]) -> None:
    if arguments[0] == "pause" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm that can be opened")


@pytest.mark.parametrize("arguments", tsan.RUNS, ids=" ".join)
def test_no_thread_hangs(arguments: tuple[str, ...]) -> None:
    skip_without_kvm(arguments)
    command = [sys.executable, str(HERE / "stress.py"), *arguments, str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=tsan.patience(SECONDS))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", tsan.RUNS, ids=" ".join)
def test_no_two_threads_race(arguments: tuple[str, ...]) -> None:
    skip_without_kvm(arguments)
    status, printed = tsan.run(arguments, SECONDS)
    assert status == 0, printed[-6000:]
