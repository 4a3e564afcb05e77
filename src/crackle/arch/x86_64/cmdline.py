"""The kernel command line: what may stand in it, and what the monitor adds
(Documentation/admin-guide/kernel-parameters.rst).

Everything after a word `--` goes to the guest's init, so what the monitor adds is put before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crackle.arch.x86_64.layout import CMDLINE_MAX_SIZE
from crackle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crackle.arch.x86_64 import DeviceInfo

DEFAULT_BOOT_ARGS = (
    "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce"
)
"""Boot arguments when none are given."""

_INIT_SEPARATOR = " -- "


class Cmdline:
    """A kernel command line of at most `capacity` bytes, its terminating NUL included.

    ConfigError for characters other than printable ASCII and when it becomes too long; it then stays as it
    was.
    """

    __slots__ = ("_boot", "_capacity", "_init")

    def __init__(self, text: str = "", capacity: int = CMDLINE_MAX_SIZE) -> None:
        self._capacity = capacity
        self._boot = ""
        _check(text)
        # A `--` at either end separates something from nothing, and still is a separator.
        boot, found, init = f" {text.strip()} ".partition(_INIT_SEPARATOR)
        self._init = init.strip() if found else ""
        boot = boot.strip()
        if self._init and not boot:
            raise ConfigError(f"kernel command line {text!r} has arguments for init only")
        self.append(boot)

    def append(self, text: str) -> None:
        """Add boot arguments before those for init."""
        _check(text)
        boot = f"{self._boot} {text.strip()}".strip()
        size = len(boot) + (len(_INIT_SEPARATOR) + len(self._init) if self._init else 0) + 1
        if size > self._capacity:
            raise ConfigError(
                f"kernel command line is too long: {size - 1} characters, at most {self._capacity - 1} fit"
            )
        self._boot = boot

    def append_root(self, *, partuuid: str | None = None, read_only: bool = False) -> None:
        """Name the root device: the first block device, or the partition with that UUID."""
        root = f"PARTUUID={partuuid}" if partuuid else "/dev/vda"
        self.append(f"root={root} {'ro' if read_only else 'rw'}")

    def append_device(self, address: int, size: int, gsi: int) -> None:
        """Declare a virtio-mmio window for kernels that do not read ACPI
        (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES).
        """
        if size <= 0 or size % 1024:
            raise ConfigError(f"a virtio-mmio window of {size} bytes cannot be declared in KiB")
        self.append(f"virtio_mmio.device={size // 1024}K@{address:#x}:{gsi}")

    def __str__(self) -> str:
        return self._boot + _INIT_SEPARATOR + self._init if self._init else self._boot

    def __bytes__(self) -> bytes:
        """The command line without its NUL."""
        return str(self).encode("ascii")


def _check(text: str) -> None:
    for position, character in enumerate(text if not (text.isascii() and text.isprintable()) else ""):
        if not " " <= character <= "~":
            raise ConfigError(
                f"kernel command line has the character {character!r} at position {position}; "
                "only printable ASCII characters are allowed"
            )


def build(
    boot_args: str | None,
    *,
    root: bool = False,
    partuuid: str | None = None,
    read_only: bool = False,
    devices: Iterable[DeviceInfo] = (),
) -> bytes:
    """The command line for one boot, without its NUL, in the order Firecracker has it.

    boot_args: the user's, or None for DEFAULT_BOOT_ARGS. root: there is a root block device (`partuuid` and
    `read_only` describe it). devices: the virtio-mmio windows, in the order in which the guest is to number
    them.
    """
    line = Cmdline(DEFAULT_BOOT_ARGS if boot_args is None else boot_args)
    line.append("pci=off")
    if root:
        line.append_root(partuuid=partuuid, read_only=read_only)
    for device in devices:
        line.append_device(device.address, device.size, device.gsi)
    return bytes(line)
