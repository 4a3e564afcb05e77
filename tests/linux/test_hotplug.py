"""Drives, network interfaces and files that come to a stock Linux guest that runs, are used at once, and go again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import Guest

from crackle import ConfigError, Drive, MicroVM, NetworkInterface, Pmem
from support.network import Namespace

Boot = Callable[..., Guest]

CYCLES = 3
SOAK_CYCLES = 100
HOST, GUEST = "10.9.0.1", "10.9.0.2"
MAC = "06:f0:0d:00:00:09"
WRONG = "BUG:|WARNING:|lockup|stall|I/O error|Call Trace|EXT4-fs error|Oops|ACPI Error|ACPI Warning"
# What the kernel has had to say from a number of lines on.
SAID = "dmesg | tail -n +{} | grep -E '{}' || true"


def until(there: str) -> str:
    """A shell command that waits for a condition, ten seconds at most."""
    return f"for i in $(seq 200); do {there} && break; sleep 0.05; done; {there}"


def use_disk(guest: Guest, cycle: int) -> None:
    """Make a file system on the disk that has come, and find the last one's file gone and its own there."""
    guest.sh(until("[ -b /dev/vdb ]"))
    guest.sh(
        f"mke2fs -q /dev/vdb > /dev/null && mkdir -p /tmp/m && mount -t ext2 /dev/vdb /tmp/m && echo {cycle} > /tmp/m/f"
    )
    assert guest.sh("umount /tmp/m && mount -t ext2 /dev/vdb /tmp/m && cat /tmp/m/f && umount /tmp/m") == str(
        cycle
    )


def use_card(guest: Guest) -> None:
    """Send to the host on the interface that has come, and hear from it."""
    guest.sh(until("ifconfig eth1 > /dev/null 2>&1"))
    assert MAC in guest.sh("ifconfig eth1").lower()
    guest.sh(f"ifconfig eth1 {GUEST} netmask 255.255.255.0 up")
    assert "2 packets received" in guest.sh(f"ping -c 2 -i 0.2 {HOST}")


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def detach(vm: MicroVM, identifier: str) -> None:
    """Ask the guest for a device until it has let go: in an emulated host it may need more than two seconds."""
    until = time.monotonic() + 60
    while True:
        try:
            return vm.detach(identifier)
        except ConfigError as error:
            if "the guest still uses it" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(0.2)


def cycle(guest: Guest, drive: Drive, card: NetworkInterface, number: int) -> None:
    guest.vm.attach(drive)
    use_disk(guest, number)
    guest.vm.attach(card)
    use_card(guest)
    guest.vm.attach(Pmem("file", drive.path_on_host or "", read_only=True))
    guest.sh(
        until("[ -b /dev/pmem1 ]")
        + ' && [ "$(head -c 4096 /dev/pmem1 | md5sum)" = "$(head -c 4096 /dev/vdb | md5sum)" ]'
    )
    for identifier in (drive.drive_id, card.iface_id, "file"):
        detach(guest.vm, identifier)
    guest.sh(
        until("[ ! -e /dev/vdb ] && [ ! -e /dev/pmem1 ]") + "; " + until("! ifconfig eth1 > /dev/null 2>&1")
    )


@pytest.mark.parametrize(
    "cycles", [CYCLES, pytest.param(SOAK_CYCLES, marks=(pytest.mark.soak, pytest.mark.timeout(3500)))]
)
def test_a_stock_guest_takes_and_gives_back_a_disk_and_an_interface_and_nothing_is_left(
    boot: Boot, stock: dict[str, Path], rootfs: Path, tmp_path: Path, namespace: Namespace, cycles: int
) -> None:
    """Its drivers are there, as it has one of each from the start."""
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 8 << 20)
    first = tmp_path / "first"
    first.write_bytes(bytes(4096))
    taps = namespace.tap(), namespace.tap(address=f"{HOST}/24")
    drive = Drive("data", False, path_on_host=str(path))
    card = NetworkInterface("data0", taps[1], MAC)
    with namespace.entered():
        guest = boot(
            stock["vmlinux"],
            initrd=stock["initrd"],
            rootfs=rootfs,
            memory=256,
            interfaces=[taps[0]],
            pmem=[first],
        )
        guest.wait_shell()
        lines = int(guest.sh("dmesg | wc -l"))
        cycle(guest, drive, card, 0)
        before = held()
        for number in range(1, cycles):
            cycle(guest, drive, card, number)
        assert held() == before
    assert guest.sh(SAID.format(lines, WRONG)) == ""
    assert [each.drive_id for each in guest.vm.config.drives] == ["rootfs"]
    assert int(guest.sh("ls /sys/bus/virtio/devices | wc -l")) == 3
    with pytest.raises(ConfigError, match="is the root device"):
        guest.vm.detach("rootfs")


def test_what_came_goes_on_in_a_copy_and_what_the_guest_began_with_goes_when_it_is_unbound(
    boot: Boot, kernels: dict[str, Path], images: dict[str, Path], tmp_path: Path
) -> None:
    disks = []
    for name in ("first", "came", "late"):
        disks.append(tmp_path / name)
        disks[-1].write_bytes(name.encode().ljust(1 << 20, b"\0"))
    guest = boot(initrd=images["initramfs"], memory=64, drives=[disks[0]])
    # Its kernel has not begun yet.
    guest.vm.attach(disks[1])
    guest.wait_shell()
    guest.sh(until("[ -b /dev/vdb ]"))
    guest.vm.pause()
    guest.vm.attach(disks[2])
    guest.vm.snapshot(tmp_path / "s")
    guest.vm.stop()
    with MicroVM.restore(tmp_path / "s") as copy:
        guest = Guest(copy)
        guest.sh(until("[ -b /dev/vdc ]"))
        assert guest.sh("for d in vda vdb vdc; do head -c 5 /dev/$d | tr -d '\\000'; done") == "firstcamelate"
        detach(copy, "drive1")
        detach(copy, "drive2")
        with pytest.raises(ConfigError, match="the guest still uses it"):
            copy.detach("drive0")
        guest.sh(
            "echo $(basename $(realpath /sys/block/vda/device/..)) > /sys/bus/platform/drivers/virtio-mmio/unbind"
        )
        copy.detach("drive0")
        assert guest.sh("ls /dev/vd* 2> /dev/null || true") == ""
