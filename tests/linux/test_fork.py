"""A Linux guest that forks, with its processes, its memory and its disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.linux.conftest import Guest

from crackle import Overlay

Boot = Callable[..., Guest]

# Slowly: where guests are emulated, each round takes a good part of the pause.
COUNTER = "(n=0; while :; do n=$((n+1)); echo $n > /run/n; usleep 250000; done) > /dev/null 2>&1 &"


def test_a_stock_guest_forks_and_each_has_its_own_disk_and_memory(
    boot: Boot, stock: dict[str, Path], rootfs: Path, tmp_path: Path
) -> None:
    guest = boot(
        stock["vmlinux"],
        initrd=stock["initrd"],
        rootfs=rootfs,
        overlay=Overlay(str(tmp_path / "top")),
        cpus=2,
        memory=256,
    ).wait_shell()
    guest.sh("mkdir -p /run /tmp; mount -t tmpfs none /run; " + COUNTER)
    guest.sh("head -c 3000000 /dev/urandom > /run/blob; cp /run/blob /blob; sync")
    guest.sh("md5sum /run/blob /blob > /run/sums")
    clones = guest.vm.fork(2)
    try:
        everybody = [guest, *map(Guest, clones)]
        for number, each in enumerate(everybody):
            each.sh(f"echo {number} > /run/who; echo {number} > /who; cat /run/blob > /blob{number}; sync")
        for number, each in enumerate(everybody):
            each.sh("echo 3 > /proc/sys/vm/drop_caches; md5sum -c /run/sums")
            assert each.sh("cat /run/who /who").split() == [str(number)] * 2
            assert each.sh("ls / | grep blob").split() == ["blob", f"blob{number}"]
            count = int(each.sh("cat /run/n"))
            each.sh(f"until [ $(cat /run/n) -gt {count + 2} ]; do usleep 100000; done", timeout=60)
            assert each.sh("nproc") == "2"
    finally:
        for vm in clones:
            vm.stop()
