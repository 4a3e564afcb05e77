"""A device written in Python, in a real guest: the example of the documentation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.linux.conftest import Guest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "rng.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("rng", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_linux_takes_its_entropy_from_a_device_in_python(boot: Callable[..., Guest], rootfs: Path) -> None:
    budget = 1 << 16
    rng = example().Rng(budget)
    guest = boot(rootfs=rootfs, devices=[rng]).wait_shell()
    assert guest.sh("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0"
    first = guest.sh("head -c 64 /dev/hwrng | od -An -v -tx1").split()
    second = guest.sh("head -c 64 /dev/hwrng | od -An -v -tx1").split()
    assert len(first) == len(second) == 64
    assert first != second
    assert rng.budget <= budget - 128
    guest.vm.pause()
    guest.vm.resume()
    assert guest.sh("head -c 8 /dev/hwrng | wc -c") == "8"
