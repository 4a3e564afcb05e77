"""The host's random numbers in a bare-metal guest: through every door, under a limit, and over snapshots and forks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from crackle import EntropyDevice, MicroVM, RateLimiter, TokenBucket

from .conftest import PATIENCE, Process


def said(vm: MicroVM) -> tuple[int, int, int]:
    """Bytes that came in the guest's next round, how long that took in us, and how many of their bits are 1."""
    match = vm.console.expect(r"rng bytes=(\d+) us=(\d+) ones=(\d+)\s", PATIENCE)
    return int(match[1]), int(match[2]), int(match[3])


def even(size: int, ones: int) -> bool:
    """Whether half of the bits are 1, as far as chance goes: ten standard deviations."""
    bits = size * 8
    return abs(ones - bits / 2) < 10 * (bits / 4) ** 0.5


@pytest.mark.parametrize(("size", "given"), [(1, 1), (4096, 4096), (1 << 20, 64 << 10)])
def test_a_guest_gets_random_bytes(guests: Path, size: int, given: int) -> None:
    with MicroVM(guests / "rng.elf", boot_args=f"bytes={size} requests=64", memory=32, entropy=True) as vm:
        bytes_, _, ones = said(vm)
        assert bytes_ == given * 64
        assert even(bytes_, ones)
        vm.console.write("end\n")
        vm.wait(timeout=PATIENCE)
        counters = vm.metrics()["entropy"]
        assert counters["entropy_bytes"] == bytes_
        assert counters["entropy_event_count"] == 64
        assert counters["entropy_event_fails"] == 0


def test_the_limiter_keeps_its_rate_here_and_in_what_goes_on_from_a_snapshot(
    guests: Path, tmp_path: Path
) -> None:
    limits = EntropyDevice(RateLimiter(bandwidth=TokenBucket(size=100_000, refill_time=100)))
    args = "bytes=10000 requests=50"
    with MicroVM(guests / "rng.elf", boot_args=args, memory=32, entropy=limits) as vm:
        # The bucket's 100,000 bytes at once, and the other 400,000 in 0.4 s.
        size, microseconds, _ = said(vm)
        assert size == 500_000
        assert microseconds > 380_000
        vm.snapshot(tmp_path / "s")
    with MicroVM.restore(tmp_path / "s") as vm:
        vm.console.write("again\n")
        size, microseconds, _ = said(vm)
        assert size == 500_000
        assert microseconds > 380_000
        assert vm.config.entropy == limits


def test_clones_do_not_get_the_same_numbers(guests: Path) -> None:
    with MicroVM(guests / "rng.elf", boot_args="requests=8", memory=32, entropy=True, own_process=True) as vm:
        said(vm)
        clones = vm.fork(2)
        found = {said_after(each) for each in (vm, *clones)}
        for clone in clones:
            clone.stop()
        # 262,144 bits: three counts that are all alike are one in 400,000.
        assert len(found) > 1


def said_after(vm: MicroVM) -> tuple[int, int]:
    vm.console.write("again\n")
    size, _, ones = said(vm)
    assert size == 32768
    return size, ones


def test_the_api_configures_it_once_and_shows_it(guests: Path, spawn: Callable[..., Process]) -> None:
    process = spawn()
    limiter = {"ops": {"size": 5, "refill_time": 1000}}
    process.api.ask("PUT", "/entropy", {"rate_limiter": limiter})
    process.api.ask("PUT", "/entropy", {})
    process.boot(guests / "rng.elf", "requests=2")
    while not re.search(r"rng bytes=8192 ", process.text):
        assert process.process.poll() is None, process.text
        process.read(1)
    assert process.api.ask("GET", "/vm/config", expect=200)["entropy"] == {"rate_limiter": None}
    process.api.ask("PUT", "/entropy", {}, expect=400)
