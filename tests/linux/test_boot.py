"""Real Linux kernels boot by every protocol, with every number of vCPUs and size of memory, and end well."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.linux.conftest import Guest

from crackle import GuestError

Boot = Callable[..., Guest]


def without_pvh(kernel: Path, to: Path) -> Path:
    """A copy of a vmlinux whose PVH note is another's, so that only the 64-bit Linux protocol is left."""
    content = kernel.read_bytes()
    # The note's name size, descriptor size, type XEN_ELFNOTE_PHYS32_ENTRY (18) and name.
    note = (4).to_bytes(4, "little") + (8).to_bytes(4, "little") + (18).to_bytes(4, "little") + b"Xen\0"
    if note not in content:
        note = (4).to_bytes(4, "little") + (4).to_bytes(4, "little") + (18).to_bytes(4, "little") + b"Xen\0"
    assert content.count(note) == 1
    to.write_bytes(content.replace(note, note[:-4] + b"Not\0"))
    return to


@pytest.mark.timeout(240)
@pytest.mark.parametrize("image", ["vmlinux", "vmlinuz"])
def test_debians_stock_kernel_boots_to_user_space_and_does_its_job(
    image: str, boot: Boot, stock: dict[str, Path], images: dict[str, Path], rootfs: Path, tmp_path: Path
) -> None:
    result = tmp_path / "result"
    result.write_bytes(bytes(1 << 20))
    guest = boot(
        stock[image],
        "crackle.run=/bin/demo",
        initrd=stock["initrd"],
        rootfs=rootfs,
        drives=[result],
        memory=256,
    )
    assert guest.vm.wait(200).reason == "reset"
    digest = hashlib.sha256(images["payload"].read_bytes()).hexdigest()
    assert digest in guest.console.text
    assert result.read_bytes().startswith(digest.encode())
    read = subprocess.run(
        ["/sbin/debugfs", "-R", "cat /result", str(rootfs)], capture_output=True, check=True, text=True
    )
    assert digest in read.stdout


@pytest.mark.parametrize("kernel", ["acpi", "acpi-bzimage", "mptable", "mptable-bzimage"])
def test_the_small_kernel_boots_with_acpi_and_with_the_mp_table(
    kernel: str, boot: Boot, kernels: dict[str, Path], rootfs: Path
) -> None:
    guest = boot(kernels[kernel], rootfs=rootfs, cpus=2).wait_shell()
    assert guest.sh("nproc") == "2"
    assert guest.sh("grep -c /dev/root /proc/mounts || grep -c /dev/vda /proc/mounts").splitlines()[-1] == "1"
    has_acpi = guest.sh("test -d /sys/firmware/acpi/tables && echo yes || echo no")
    assert has_acpi == ("yes" if kernel.startswith("acpi") else "no")


def test_an_elf_kernel_without_pvh_entry_boots_by_the_64_bit_protocol(
    boot: Boot, kernels: dict[str, Path], rootfs: Path, tmp_path: Path
) -> None:
    kernel = without_pvh(kernels["acpi"], tmp_path / "vmlinux")
    guest = boot(kernel, rootfs=rootfs).wait_shell()
    # The loader's number in the zero page tells the protocols apart: PVH has the kernel set it to "Xen".
    assert guest.sh("dmesg | grep -c 'Booting paravirtualized kernel on PVH' || true") == "0"
    assert guest.sh("cat /data/payload | wc -c") == str(8 << 20)


@pytest.mark.parametrize("cpus", [1, 2, 4, 32])
def test_the_guest_sees_its_vcpus_and_runs_on_all_of_them(cpus: int, boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs, cpus=cpus, memory=256).wait_shell()
    assert guest.sh("nproc") == str(cpus)
    ids = guest.sh("grep '^apicid' /proc/cpuinfo | tr -dc '0-9\\n'").split()
    assert ids == [str(index) for index in range(cpus)]
    for index in range(cpus):
        assert guest.sh(f"taskset {1 << index:x} sh -c 'echo on {index}'") == f"on {index}"


@pytest.mark.parametrize("memory", [64, 129, 1024, 3072, 5120])
def test_the_guest_sees_its_memory(memory: int, boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs, memory=memory).wait_shell()
    regions = guest.sh("dmesg | grep 'BIOS-e820.*usable'").splitlines()
    assert len(regions) == (3 if memory > 3072 else 2)
    total_kib = int(guest.sh("grep MemTotal /proc/meminfo").split()[1])
    # The kernel keeps its own image, its page structures and the first megabyte's holes to itself.
    assert memory * 1024 * 0.93 - 24 * 1024 < total_kib < memory * 1024


@pytest.fixture
def reserved_huge_pages() -> Iterator[Callable[[], int]]:
    """Reserves 2 MiB pages for a guest of 128 MiB; gives how many of them are free."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    before = setting.read_text()
    setting.write_text("80")
    yield lambda: int(re.findall(r"HugePages_Free: +(\d+)", Path("/proc/meminfo").read_text())[0])
    setting.write_text(before)


def test_memory_can_be_backed_by_huge_pages(
    boot: Boot, rootfs: Path, reserved_huge_pages: Callable[[], int]
) -> None:
    free = reserved_huge_pages()
    guest = boot(rootfs=rootfs, memory=128, huge_pages="2M").wait_shell()
    guest.sh("dd if=/dev/zero of=/tmp/full bs=1M count=40")
    assert free - reserved_huge_pages() >= 30
    guest.vm.stop()
    assert reserved_huge_pages() == free


def test_pages_that_the_guest_writes_are_logged(boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs, memory=128, track_dirty_pages=True).wait_shell()
    guest.vm.pause()
    machine = guest.vm._controller.machine
    logged = int.from_bytes(machine.vm.get_dirty_log(0), "little").bit_count()
    written = int.from_bytes(machine.memory.take_dirty(0), "little").bit_count()
    # The kernel alone is some thousand pages; what the disk delivered was written by the monitor.
    assert logged > 1000
    assert written > 100
    assert int.from_bytes(machine.vm.get_dirty_log(0), "little") == 0


def test_an_initial_ram_disk_is_the_whole_user_space(boot: Boot, images: dict[str, Path]) -> None:
    guest = boot(initrd=images["initramfs"]).wait_shell()
    assert "rootfs" in guest.sh("grep ' / ' /proc/mounts")


def test_a_read_only_root_cannot_be_written(boot: Boot, rootfs: Path) -> None:
    before = hashlib.sha256(rootfs.read_bytes()).digest()
    guest = boot(rootfs=rootfs, read_only=True).wait_shell()
    assert guest.sh("cat /sys/block/vda/ro") == "1"
    assert "ro," in guest.sh("grep ' / ' /proc/mounts")
    assert "yes" not in guest.sh("dd if=/dev/zero of=/dev/vda bs=512 count=1 2>/dev/null && echo yes || true")
    guest.vm.stop()
    assert hashlib.sha256(rootfs.read_bytes()).digest() == before


def test_reboot_ends_the_microvm(boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs).wait_shell()
    guest.console.write("reboot -f\n")
    assert guest.vm.wait(60).reason == "reset"


def test_poweroff_ends_the_microvm_through_acpi(boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs).wait_shell()
    guest.console.write("poweroff -f\n")
    assert guest.vm.wait(60).reason == "shutdown"


def test_ctrl_alt_del_reaches_the_guests_init(boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs).wait_shell()
    guest.vm.send_ctrl_alt_del()
    assert guest.vm.wait(60).reason == "reset"


def test_the_power_button_is_an_input_event(boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs).wait_shell()
    guest.sh("killall power")  # who would switch it off
    # The other of this name, on line 23, is the VM generation ID's.
    count = "grep -iE ' 3-edge +ACPI:Ged' /proc/interrupts | awk '{print $2}'"
    before = int(guest.sh(count))
    guest.vm.press_power_button()
    assert int(guest.sh(f"sleep 1; {count}")) == before + 1


@pytest.mark.parametrize("kind", ["small", "stock"])
def test_the_power_button_switches_a_guest_off(
    kind: str, boot: Boot, stock: dict[str, Path], rootfs: Path
) -> None:
    kernel = {"kernel": stock["vmlinux"], "initrd": stock["initrd"]} if kind == "stock" else {}
    guest = boot(rootfs=rootfs, memory=256, **kernel).wait_shell()
    status = guest.vm.shutdown(240)
    assert (status.reason, status.step) == ("shutdown", "power button")


def test_a_kernel_panic_ends_the_microvm(boot: Boot) -> None:
    # Without a root the kernel panics, which it tells before it reboots (panic=1).
    guest = boot()
    with pytest.raises(GuestError, match="the guest's kernel has panicked"):
        guest.vm.wait(120)
    assert guest.vm.exit_status is not None
    assert guest.vm.exit_status.reason == "panic"
    assert "Kernel panic" in guest.console.text
