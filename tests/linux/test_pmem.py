"""Files in a stock kernel's address space: a file system with DAX, what a flush keeps, and a root device."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import Guest

from crackle import MicroVM, Pmem

Boot = Callable[..., Guest]
MIB = 1 << 20
FIO = (
    "fio --name=v --filename=/mnt/v --rw=randrw --bsrange=512-32k --bs_unaligned=1 --ioengine=psync --size=8m "
    "--fsync=32 --verify=crc32c --verify_fatal=1 --do_verify=1 --minimal > /run/fio.log"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty ext4, in blocks as large as a page."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(48 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", path], check=True, capture_output=True)
    return path


def test_a_file_system_with_dax_keeps_what_was_flushed_and_can_be_the_root_device(
    boot: Boot, stock: dict[str, Path], tools: dict[str, object], image: Path, rootfs: Path, tmp_path: Path
) -> None:
    guest = boot(stock["vmlinux"], initrd=stock["initrd"], **tools, pmem=[image]).wait_shell()
    guest.sh("mount -o dax /dev/pmem0 /mnt && grep '/mnt ' /proc/mounts | grep dax")
    guest.sh(FIO, 300)
    guest.sh("echo kept > /mnt/kept; sync")
    counters = guest.vm.metrics()["pmem_pmem0"]
    assert counters["queue_event_count"] > 0
    assert counters["event_fails"] == 0
    # It goes on where it was, the file system mounted, from another file that is the same.
    guest.vm.pause()
    guest.vm.snapshot(tmp_path / "s")
    other = Path(image.rename(tmp_path / "other"))
    guest.vm.stop()
    guest = Guest(MicroVM.restore(tmp_path / "s", pmem={"pmem0": other}))
    assert guest.sh("cat /mnt/kept; echo more >> /mnt/kept; umount /mnt") == "kept"
    guest.vm.stop()
    checked = subprocess.run(["e2fsck", "-f", "-n", other], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert b"kept\nmore\n" in other.read_bytes()
    root = Pmem("root", str(rootfs), root_device=True)
    guest = boot(stock["vmlinux"], initrd=stock["initrd"], pmem=[root]).wait_shell()
    assert guest.sh("grep ' / ' /proc/mounts | tail -n 1").startswith("/dev/pmem0 / ext4 rw")
