"""The kernel command line, by the kernel's own grammar (lib/cmdline.c, next_arg; kernel/params.c, parse_args), and what
the monitor adds.

Words are separated by white space outside double quotes. Everything after a word `--` goes to the guest's init, and
everything after a quote that nobody closes belongs to its word, so what the monitor adds is put before either.
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

# What isspace() is to the kernel (lib/ctype.c), whatever the bytes are meant to be.
_SPACE = frozenset(b" \t\n\v\f\r\xa0")
_END_OF_BOOT = (b"--", b'"--"')


class Cmdline:
    """A kernel command line of at most `capacity` bytes, its terminating NUL included.

    ConfigError for what cannot be bytes without a NUL, and when it becomes too long; it then stays as it was.
    """

    __slots__ = ("_boot", "_capacity", "_rest")

    def __init__(self, text: str = "", capacity: int = CMDLINE_MAX_SIZE) -> None:
        self._capacity = capacity
        self._boot = self._rest = b""
        boot, self._rest = _split(_encode(text))
        self._add(boot)

    def append(self, text: str) -> None:
        """Add boot arguments before those for init."""
        self._add(_encode(text))

    def _add(self, words: bytes) -> None:
        boot = b" ".join(part for part in (self._boot, words) if part)
        size = len(boot) + len(self._rest) + bool(boot and self._rest) + 1
        if size > self._capacity:
            raise ConfigError(
                "Invalid kernel command line: Inserting string would make command line too long. "
                f"It would have {size - 1} bytes, {self._capacity - 1} is the most."
            )
        self._boot = boot

    def append_root(self, root: str, *, read_only: bool = False) -> None:
        """Name the root device, as the kernel knows it."""
        self.append(f"root={root} {'ro' if read_only else 'rw'}")

    def append_device(self, address: int, size: int, gsi: int) -> None:
        """Declare a virtio-mmio window for kernels that do not read ACPI
        (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES).
        """
        if size <= 0 or size % 1024:
            raise ConfigError(f"a virtio-mmio window of {size} bytes cannot be declared in KiB")
        self.append(f"virtio_mmio.device={size // 1024}K@{address:#x}:{gsi}")

    def __bytes__(self) -> bytes:
        """The command line without its NUL."""
        return b" ".join(part for part in (self._boot, self._rest) if part)


def _encode(text: str) -> bytes:
    try:
        encoded = text.encode().strip()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"Invalid kernel command line: {text!r} cannot be encoded: {error.reason}"
        ) from None
    if b"\0" in encoded:
        # Firecracker's words.
        raise ConfigError(
            "Invalid kernel command line: Null terminator detected in the command line structure. "
            f"It is at position {encoded.index(0)}."
        )
    return encoded


def _split(text: bytes) -> tuple[bytes, bytes]:
    """What comes before the place for more boot arguments, and what comes after it, each without white space around."""
    at, end = 0, len(text)
    while at < end:
        if text[at] in _SPACE:
            at += 1
            continue
        begin, quoted = at, False
        while at < end and (quoted or text[at] not in _SPACE):
            quoted ^= text[at] == ord('"')
            at += 1
        if quoted or text[begin:at] in _END_OF_BOOT:
            return text[:begin].rstrip(), text[begin:]
    return text, b""


def build(
    boot_args: str | None,
    *,
    root: str | None = None,
    read_only: bool = False,
    devices: Iterable[DeviceInfo] = (),
) -> bytes:
    """The command line for one boot, without its NUL, in the order Firecracker has it.

    boot_args: the user's, or None for DEFAULT_BOOT_ARGS. root: what its root device is called, if there is one, which
    may be `read_only`. devices: the virtio-mmio windows, in the order in which the guest is to number them. Those that
    share an interrupt line with an earlier one are left out where there is no room for them: so many are found by
    kernels that read ACPI.
    """
    line = Cmdline(DEFAULT_BOOT_ARGS if boot_args is None else boot_args)
    line.append("pci=off")
    if root is not None:
        line.append_root(root, read_only=read_only)
    lines: set[int] = set()
    for device in devices:
        try:
            line.append_device(device.address, device.size, device.gsi)
        except ConfigError:
            if device.gsi not in lines:
                raise
            break
        lines.add(device.gsi)
    return bytes(line)
