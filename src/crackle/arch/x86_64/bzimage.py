"""The bzImage: setup header and 64-bit entry (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel
Header").
"""

from __future__ import annotations

from struct import pack_into
from typing import TYPE_CHECKING

import msgspec

from crackle.arch.x86_64.layout import BOOT_DATA, IDENTITY_MAP_END
from crackle.errors import ConfigError

if TYPE_CHECKING:
    from crackle.memory import GuestMemory

HEADER_OFFSET = 0x1F1
"""Of the setup header, in the file and in the zero page."""
HEADER_LIMIT = 0x290
"""Where the zero page goes on with something else."""
MIN_PROTOCOL = 0x0206
"""The first with a command line size of its own, Linux 2.6.22."""

_MAGIC = b"HdrS"
_MAGIC_OFFSET = 0x202
_SETUP_SECTORS = (0x1F1, 1)  # (offset, bytes) of the fields, little endian
_PARAGRAPHS = (0x1F4, 4)
_BOOT_FLAG_FIELD = (0x1FE, 2)
_JUMP_LENGTH = (0x201, 1)  # the header ends where the jump at 0x200 goes
_VERSION = (0x206, 2)
_LOAD_FLAGS = (0x211, 1)
_CODE32_START = (0x214, 4)
_INITRD_MAX = (0x22C, 4)
_EXTENDED_FLAGS = (0x236, 2)
_PREFERRED_ADDRESS = (0x258, 8)
_INIT_SIZE = (0x260, 4)
_FIELDS_END = 0x264

_BOOT_FLAG = 0xAA55
_LOADED_HIGH = 1 << 0
_XLF_KERNEL_64 = 1 << 0
_ENTRY_64_OFFSET = 0x200
_SECTOR = 512
_PARAGRAPH = 16
_DEFAULT_SETUP_SECTORS = 4


class BzImage(msgspec.Struct):
    """What the setup header says.

    `file_size` bytes at file `offset` go to guest physical `address`; the kernel unpacks itself in
    address..end. initrd_max: the highest address an initrd's last byte may have.
    """

    address: int
    offset: int
    file_size: int
    end: int
    initrd_max: int
    setup_header: bytes

    @property
    def entry(self) -> int:
        """The 64-bit entry point."""
        return self.address + _ENTRY_64_OFFSET

    def check(self, memory: GuestMemory) -> None:
        """ConfigError unless the kernel has room to unpack itself, in mapped RAM and clear of boot data."""
        room = memory.regions[0].size
        place = f"it unpacks itself at {self.address:#x}..{self.end:#x}"
        if self.end > room:
            raise ConfigError(
                f"{place} and needs {-(-self.end >> 20)} MiB of guest memory; there are {room >> 20} MiB"
            )
        if self.end > IDENTITY_MAP_END:
            raise ConfigError(f"{place}, beyond {IDENTITY_MAP_END:#x}, the end of the boot mapping")
        for start, end in BOOT_DATA:
            if self.address < end and start < self.end:
                raise ConfigError(
                    f"it wants to be loaded at {self.address:#x}, over boot data at {start:#x}..{end:#x}"
                )


def recognise(head: bytes) -> bool:
    """Whether a file that begins with `head` has the setup header's signature."""
    return head.startswith(_MAGIC, _MAGIC_OFFSET)


def parse(file_size: int, head: bytes) -> BzImage:
    """Read the setup header in `head`, the first bytes of a file of `file_size`. ConfigError if it cannot
    be booted.
    """
    if len(head) < _FIELDS_END:
        raise ConfigError(f"it is truncated: {len(head)} bytes do not hold a bzImage's setup header")

    def field(place: tuple[int, int]) -> int:
        return int.from_bytes(head[place[0] : place[0] + place[1]], "little")

    flag, version, extended_flags = field(_BOOT_FLAG_FIELD), field(_VERSION), field(_EXTENDED_FLAGS)
    if flag != _BOOT_FLAG:
        raise ConfigError(f"its boot flag is {flag:#06x}, not {_BOOT_FLAG:#06x}")
    if version < MIN_PROTOCOL:
        raise ConfigError(f"its boot protocol is {_text(version)}; {_text(MIN_PROTOCOL)} or newer is needed")
    if not field(_LOAD_FLAGS) & _LOADED_HIGH:
        raise ConfigError("it is a zImage, which loads below 1 MiB; a bzImage is needed")
    if version < 0x020C or not extended_flags & _XLF_KERNEL_64:
        raise ConfigError(
            f"it has no 64-bit entry point (boot protocol {_text(version)}, flags {extended_flags:#x})"
        )
    # The kernel moves itself to pref_address when it finds itself below, and never down: no other place needs
    # less memory.
    address = field(_PREFERRED_ADDRESS) or field(_CODE32_START)
    offset = ((field(_SETUP_SECTORS) or _DEFAULT_SETUP_SECTORS) + 1) * _SECTOR
    size = field(_PARAGRAPHS) * _PARAGRAPH
    if size <= _ENTRY_64_OFFSET:
        raise ConfigError(f"its protected-mode code has only {size} bytes")
    # The size is rounded up to paragraphs; a signature may follow the kernel.
    if file_size + _PARAGRAPH <= offset + size:
        raise ConfigError(
            f"it is truncated: it has {file_size} bytes, its setup header promises {offset + size}"
        )
    size = min(size, file_size - offset)
    header = bytearray(head[HEADER_OFFSET : min(_MAGIC_OFFSET + field(_JUMP_LENGTH), HEADER_LIMIT)])
    if len(header) < _FIELDS_END - HEADER_OFFSET:
        raise ConfigError(
            f"its setup header has {len(header)} bytes, too few for boot protocol {_text(version)}"
        )
    if address + size >= 1 << 32:
        raise ConfigError(f"it wants to be loaded at {address:#x}, not below 4 GiB")
    pack_into("<I", header, _CODE32_START[0] - HEADER_OFFSET, address)
    end = address + max(size, field(_INIT_SIZE))
    return BzImage(address, offset, size, end, field(_INITRD_MAX), bytes(header))


def _text(version: int) -> str:
    return f"{version >> 8}.{version & 0xFF:02d}"
