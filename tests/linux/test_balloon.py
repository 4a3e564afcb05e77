"""Memory that a Linux guest has done with, in the host's hands again, and its random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import Guest

from crackle import Balloon, EntropyDevice, MicroVM, RateLimiter, TokenBucket

Boot = Callable[..., Guest]

USED = 256
"""MiB that a guest fills and frees."""


def rss(vm: MicroVM) -> float:
    """MiB that the host has in memory for its process."""
    lines = Path(f"/proc/{vm.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def wait(condition: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def use(guest: Guest) -> float:
    """Have the guest fill memory and free it; what the host has in memory for it then."""
    guest.sh("mkdir -p /m && mount -t tmpfs -o size=300m none /m")
    guest.sh(f"dd if=/dev/zero of=/m/f bs=1M count={USED} && umount /m")
    full = rss(guest.vm)
    assert full > USED
    return full


def numbers(guest: Guest) -> dict[str, int]:
    """Of /proc/meminfo, in bytes, and of /proc/vmstat."""
    lines = guest.sh("cat /proc/meminfo /proc/vmstat").splitlines()
    fields = [line.replace(":", "").split() for line in lines]
    return {name: int(value) * (1024 if unit else 1) for name, value, *unit in fields}


def check_statistics(guest: Guest) -> None:
    """They are what the guest itself says."""
    balloon, asked = guest.vm.balloon, guest.vm.metrics()["balloon"]["stats_updates_count"]
    before = numbers(guest)
    balloon.poll(4000)
    wait(lambda: guest.vm.metrics()["balloon"]["stats_updates_count"] > asked)
    found, after = balloon.statistics(), numbers(guest)
    assert found.total_memory == before["MemTotal"]
    for value, name in (
        (found.major_faults, "pgmajfault"),
        (found.minor_faults, "pgfault"),
        (found.swap_in, "pswpin"),
        (found.swap_out, "pswpout"),
    ):
        # A kernel may be built without these counters.
        assert (value is None) is (name not in before)
        assert value is None or before[name] <= value <= after[name]
    for value, name in ((found.free_memory, "MemFree"), (found.available_memory, "MemAvailable")):
        assert value is not None
        assert (
            min(before[name], after[name]) - (4 << 20) <= value <= max(before[name], after[name]) + (4 << 20)
        )
    assert found.disk_caches is not None


@pytest.mark.timeout(600)
def test_memory_that_was_freed_comes_back_by_balloon_and_by_hints(boot: Boot, rootfs: Path) -> None:
    balloon = Balloon(0, True, 3600, free_page_hinting=True)
    guest = boot(rootfs=rootfs, memory=384, balloon=balloon, entropy=True, own_process=True).wait_shell()
    vm = guest.vm
    check_statistics(guest)
    full = use(guest)
    vm.balloon.start_hinting()
    wait(lambda: vm.balloon.hinting_status().host_cmd == 1)
    assert vm.balloon.hinting_status().guest_cmd == 0
    assert full - rss(vm) >= 0.9 * USED
    full = use(guest)
    target = numbers(guest)["MemFree"] // (1 << 20) - 16
    vm.balloon.resize(target)
    wait(lambda: vm.balloon.statistics().actual_mib == target)
    assert full - rss(vm) >= 0.9 * USED
    vm.balloon.resize(0)
    wait(lambda: vm.balloon.statistics().actual_mib == 0)
    guest.sh("mount -t tmpfs -o size=300m none /m && dd if=/dev/zero of=/m/f bs=1M count=32 && umount /m")
    counters = vm.metrics()["balloon"]
    assert counters["event_fails"] == counters["stats_update_fails"] == counters["free_page_hint_fails"] == 0
    # What a pool of random numbers gives cannot be compressed.
    assert int(guest.sh("head -c 1000000 /dev/hwrng | gzip | wc -c", 240)) > 999_000
    assert vm.metrics()["entropy"]["entropy_bytes"] >= 1_000_000


@pytest.mark.timeout(600)
def test_a_guest_reports_what_it_frees_and_a_limiter_keeps_its_rate(boot: Boot, rootfs: Path) -> None:
    # A guest asks for 64 bytes at a time, and in an emulated host takes milliseconds for that.
    rate = 1600
    limits = EntropyDevice(RateLimiter(TokenBucket(size=rate // 4, refill_time=250)))
    balloon = Balloon(0, True, free_page_reporting=True)
    guest = boot(rootfs=rootfs, memory=384, balloon=balloon, entropy=limits, own_process=True).wait_shell()
    full = use(guest)
    wait(lambda: full - rss(guest.vm) >= 0.9 * USED)
    counters = guest.vm.metrics()["balloon"]
    assert counters["free_page_report_freed"] >= 0.9 * USED * (1 << 20)
    assert counters["free_page_report_fails"] == 0

    def given() -> int:
        return int(guest.vm.metrics()["entropy"]["entropy_bytes"])

    guest.sh("cat /dev/hwrng > /dev/null &")
    start = given()
    wait(lambda: given() > start + rate)
    start, began = given(), time.monotonic()
    time.sleep(8)
    found = (given() - start) / (time.monotonic() - began)
    assert 0.95 * rate < found < 1.05 * rate
