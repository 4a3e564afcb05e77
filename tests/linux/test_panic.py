"""A Linux kernel's own driver tells that it has panicked, through the device that the ACPI tables name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import BOOT_ARGS, Guest

from crackle.errors import GuestError

Boot = Callable[..., Guest]
# A first process that ends at once, which no kernel survives.
NO_INIT = "init=/bin/false"


@pytest.mark.parametrize("panic", ["panic=1", "panic=0"])
def test_a_stock_kernel_that_panics_ends_the_guest_with_that_reason(
    panic: str, boot: Boot, stock: dict[str, Path], rootfs: Path
) -> None:
    arguments = f"{NO_INIT} {panic}"
    guest = boot(stock["vmlinux"], arguments, initrd=stock["initrd"], rootfs=rootfs, memory=256)
    with pytest.raises(GuestError, match="the guest's kernel has panicked"):
        guest.vm.wait(200)
    assert "Kernel panic - not syncing: Attempted to kill init!" in guest.console.text


def test_the_small_kernel_tells_too(boot: Boot, kernels: dict[str, Path], rootfs: Path) -> None:
    guest = boot(kernels["acpi"], NO_INIT, rootfs=rootfs)
    with pytest.raises(GuestError, match="the guest's kernel has panicked"):
        guest.vm.wait(120)


def test_a_kernel_without_the_driver_resets(boot: Boot, kernels: dict[str, Path], rootfs: Path) -> None:
    guest = boot(kernels["mptable"], NO_INIT, rootfs=rootfs)
    assert guest.vm.wait(120).reason == "reset"
    assert "Kernel panic - not syncing" in guest.console.text


def test_crackle_run_ends_with_1_where_the_kernel_panicked(
    boot: Boot, stock: dict[str, Path], rootfs: Path
) -> None:
    assert boot is not None
    files = ["--kernel", stock["vmlinux"], "--initrd", stock["initrd"], "--rootfs", rootfs]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "crackle.cli.main", "run", *files),
            *("--boot-args", f"{BOOT_ARGS} root=/dev/vda rw {NO_INIT}"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert "the guest's kernel has panicked" in done.stderr
