"""The hostile guests, and the unit tests of what they attack, against a core built with AddressSanitizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

sys.path.insert(0, str(HERE))

import asan  # noqa: E402

UNITS = (
    "block",
    "block_discard",
    "block_engines",
    "block_limits",
    "bus",
    "iothread",
    "memory",
    "mmio",
    "queue",
    "serial",
    "vcpu",
    "vhost_user_block",
)

pytestmark = [pytest.mark.timeout(1800), pytest.mark.beside]

PLANTED = """
import sys
sys.path.insert(0, "tests")
from crackle.memory import GuestMemory
from crackle.virtio.queue import Virtqueue
from crackle.virtio.state import QueueState
from support.driver import Buffer, Ring
from support.fence import poison

memory = GuestMemory([(0, 1 << 16)])
ring = Ring(memory, 0x1000, 4)
ring.offer(ring.add([Buffer(0x2000, 1)]))
queue = Virtqueue(memory)
parts = {"desc": ring.desc, "avail": ring.avail, "used": ring.used}
state = QueueState(size=4, ready=True, next_avail=0, next_used=0, **parts)
queue.restore(state, event_idx=False, indirect=False)
print("ready", flush=True)
poison(memory.regions[0].hva + 0x1000, 64)
queue.take()
print("unnoticed")
"""


def test_the_sanitizer_sees_what_the_core_does() -> None:
    """The queue reads its descriptors where it must not, for once."""
    run = subprocess.run(
        [sys.executable, "-c", PLANTED], cwd=ROOT, env=asan.environment(), capture_output=True, text=True
    )
    assert run.stdout == "ready\n", run.stderr
    assert run.returncode == asan.FOUND
    assert "AddressSanitizer: use-after-poison" in run.stderr
    assert "queue" in run.stderr


def test_hostile_guests_find_nothing_under_address_sanitizer() -> None:
    tests = [*HERE.glob("test_hostile*.py"), *(ROOT / "tests" / "unit" / f"test_{name}.py" for name in UNITS)]
    # A test that hangs, and not one that waits for its turn beside the others.
    command = [sys.executable, HERE / "asan.py", "-q", "--no-header", "--timeout", "600", *tests]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-8000:]
    assert "AddressSanitizer" not in run.stderr
