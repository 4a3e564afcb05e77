"""Copies of a Linux guest are told that they are copies: other random numbers, and the time is the right one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import Guest

from crackle import MicroVM

Boot = Callable[..., Guest]

# One after the other, without a pause: some are drawn just before a copy is made, and some just after.
DRAWING = "set +m; (while read u < /proc/sys/kernel/random/uuid; do echo $u; done > /uuids) & drawing=$!"
# How many of them are looked at, of which so many digits: a console is slow.
SHOWN, DIGITS = 300, 8
RESEEDED = "crng reseeded due to virtual machine fork"
CLOCK_ERROR_S = 0.05


def behind(guest: Guest) -> tuple[float, float]:
    """By how many seconds the guest's wall clock is behind the host's, at least and at most: asked some times."""
    least, most = -3600.0, 3600.0
    for _ in range(5):
        before = time.time()
        there = float(guest.sh("echo $EPOCHREALTIME"))
        # It was that some time between question and answer.
        least, most = max(least, before - there), min(most, time.time() - there)
    return least, most


def drawn(vm: MicroVM, source: tuple[float, float], first: int) -> list[str]:
    """How what a copy has drawn from number `first` on begins; it was told, and its clock is as right as before."""
    guest = Guest(vm)
    vm.resume()
    least, most = behind(guest)
    assert least - source[1] <= CLOCK_ERROR_S
    assert most - source[0] >= -CLOCK_ERROR_S
    guest.sh("kill $drawing; wait $drawing || true")
    assert guest.sh(f"dmesg | grep -c '{RESEEDED}'") == "1"
    return guest.sh(f"tail -n +{first} /uuids | head -n {SHOWN} | cut -c 1-{DIGITS}").split()


@pytest.mark.soak
def test_copies_draw_other_random_numbers_and_have_the_right_time(
    boot: Boot, images: dict[str, Path], tmp_path: Path
) -> None:
    """From a snapshot and by a live fork; the small kernel has the driver, CONFIG_VMGENID."""
    guest = boot(initrd=images["initramfs"], memory=64, own_process=True).wait_shell()
    guest.sh("head -c 16 /dev/random > /dev/null")
    # What a kernel loses while it boots, it has lost for good.
    source = behind(guest)
    guest.sh(DRAWING)
    first = int(guest.sh("wc -l < /uuids"))
    guest.vm.pause()
    guest.vm.snapshot(tmp_path / "s")
    copies = []
    for vm in guest.vm.fork(2):
        copies.append(drawn(vm, source, first))
        vm.stop()
    guest.vm.stop()
    for _ in range(2):
        with MicroVM.restore(tmp_path / "s", resume=False, clock_realtime=True) as vm:
            copies.append(drawn(vm, source, first))
    before = (tmp_path / "s" / "memory").read_bytes()
    for number, one in enumerate(copies):
        assert len(one) == SHOWN
        for other in copies[:number]:
            both = [place for place in range(SHOWN) if one[place] == other[place]]
            # What two have in common was drawn before there were two, or before a worker of the kernel's was told.
            assert both == list(range(len(both)))
            late = [place for place in both if f"{one[place]}-".encode() not in before]
            assert len(late) <= 2, (len(both), len(late))
            assert len(both) < SHOWN // 2
