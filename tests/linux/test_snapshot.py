"""A Linux guest that is saved and goes on, with its processes, its memory, its disk and its clock."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import Guest

from crackle import MicroVM

Boot = Callable[..., Guest]

# Slowly: where guests are emulated, each round takes a good part of the pause.
COUNTER = "(n=0; while :; do n=$((n+1)); echo $n > /run/n; usleep 250000; done) > /dev/null 2>&1 &"


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_stock_guest_goes_on_through_snapshots_of_snapshots(
    boot: Boot, stock: dict[str, Path], rootfs: Path, tmp_path: Path, cpus: int
) -> None:
    """Full ones and differential ones in turn; memory, disk and processes are verified each time."""
    guest = boot(
        stock["vmlinux"],
        initrd=stock["initrd"],
        rootfs=rootfs,
        cpus=cpus,
        memory=256,
        track_dirty_pages=True,
    ).wait_shell()
    guest.sh("mkdir -p /run /tmp; mount -t tmpfs none /run; " + COUNTER)
    guest.sh("head -c 3000000 /dev/urandom > /run/blob; cp /run/blob /blob; sync")
    guest.sh("md5sum /run/blob /blob > /run/sums")
    vm, disk = guest.vm, rootfs
    last = 0
    try:
        for number in range(4):
            vm.pause()
            vm.snapshot(tmp_path / f"state{number}", tmp_path / "memory", differential=number % 2 == 1)
            copy = tmp_path / f"disk{number}"
            shutil.copyfile(disk, copy)
            vm.stop()
            disk = copy
            vm = MicroVM.restore(
                tmp_path / f"state{number}",
                tmp_path / "memory",
                drives={"rootfs": disk},
                track_dirty_pages=True,
                clock_realtime=True,
            )
            guest = Guest(vm)
            # From the disk, and not from what the guest has kept of it.
            guest.sh("echo 3 > /proc/sys/vm/drop_caches; md5sum -c /run/sums")
            count = int(guest.sh("cat /run/n"))
            assert count > last
            guest.sh(f"until [ $(cat /run/n) -gt {count + 2} ]; do usleep 100000; done", timeout=60)
            last = count
            assert guest.sh("nproc") == str(cpus)
            assert not guest.sh(
                "dmesg | grep -E 'BUG:|lockup|stall|I/O error|Call Trace|EXT4-fs error' || true"
            )
            # The wall clock of a guest with kvmclock goes on by the time that has passed.
            assert abs(int(guest.sh("date +%s")) - time.time()) < 30
    finally:
        vm.stop()
