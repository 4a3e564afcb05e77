"""What the kernel is told at its first instruction: the zero page, or the PVH start info, and the memory map
in each.

The zero page is Documentation/arch/x86/zero-page.rst; the start info is Xen's
`xen/include/public/arch-x86/hvm/start_info.h`, version 1.
"""

from __future__ import annotations

from struct import Struct, pack_into
from typing import TYPE_CHECKING

from crackle.arch.x86_64 import layout
from crackle.arch.x86_64.bzimage import HEADER_OFFSET

if TYPE_CHECKING:
    from crackle.memory import GuestMemory

E820_RAM = 1
E820_RESERVED = 2

_ZERO_PAGE_SIZE = 4096
_RSDP_OFFSET = 0x070
_E820_COUNT_OFFSET = 0x1E8
_BOOT_FLAG_OFFSET = 0x1FE
_HEADER_MAGIC_OFFSET = 0x202
_LOADER_OFFSET = 0x210
_RAMDISK_OFFSET = 0x218
_CMDLINE_POINTER_OFFSET = 0x228
_KERNEL_ALIGNMENT_OFFSET = 0x230
_CMDLINE_SIZE_OFFSET = 0x238
_E820_TABLE_OFFSET = 0x2D0
_E820_ENTRY = Struct("<QQI")

_BOOT_FLAG = 0xAA55
_LOADER_UNDEFINED = 0xFF
_KERNEL_ALIGNMENT = 16 << 20

# Real-mode code: mov al, I8042_RESET; out I8042_COMMAND_PORT, al; then hlt for ever.
_RESET_CODE = bytes((0xB0, layout.I8042_RESET, 0xE6, layout.I8042_COMMAND_PORT, 0xF4, 0xEB, 0xFD))

_START_INFO = Struct("<IIIIQQQQII")
_START_INFO_MAGIC = 0x336EC578
_START_INFO_VERSION = 1
_MODULE = Struct("<QQQQ")
_MEMORY_MAP_ENTRY = Struct("<QQII")


def memory_map(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """(guest physical address, bytes, E820_RAM or E820_RESERVED) in ascending order."""
    entries = [
        (0, layout.SYSTEM_MEM_START, E820_RAM),
        (layout.SYSTEM_MEM_START, layout.HIMEM_START - layout.SYSTEM_MEM_START, E820_RESERVED),
    ]
    for region in memory.regions:
        start = max(region.gpa, layout.HIMEM_START)
        if start < region.gpa + region.size:
            entries.append((start, region.gpa + region.size - start, E820_RAM))
    return entries


def write_zero_page(
    memory: GuestMemory, *, setup_header: bytes | None, cmdline_size: int, initrd: tuple[int, int] | None
) -> None:
    """Write the zero page for the 64-bit Linux protocol.

    setup_header: what a bzImage brought, from offset 0x1f1 on; None for a vmlinux. cmdline_size: bytes with
    the NUL. initrd: (guest physical address, bytes).
    """
    page = bytearray(_ZERO_PAGE_SIZE)
    if setup_header is None:
        pack_into("<I", page, _KERNEL_ALIGNMENT_OFFSET, _KERNEL_ALIGNMENT)
        pack_into("<I", page, _CMDLINE_SIZE_OFFSET, cmdline_size)
    else:
        page[HEADER_OFFSET : HEADER_OFFSET + len(setup_header)] = setup_header
    pack_into("<Q", page, _RSDP_OFFSET, layout.RSDP_ADDR)
    pack_into("<H", page, _BOOT_FLAG_OFFSET, _BOOT_FLAG)
    pack_into("<4s", page, _HEADER_MAGIC_OFFSET, b"HdrS")
    pack_into("<B", page, _LOADER_OFFSET, _LOADER_UNDEFINED)
    pack_into("<I", page, _CMDLINE_POINTER_OFFSET, layout.CMDLINE_START)
    if initrd:
        pack_into("<II", page, _RAMDISK_OFFSET, *initrd)
    entries = memory_map(memory)
    page[_E820_COUNT_OFFSET] = len(entries)
    for index, entry in enumerate(entries):
        _E820_ENTRY.pack_into(page, _E820_TABLE_OFFSET + index * _E820_ENTRY.size, *entry)
    memory.write(layout.ZERO_PAGE_START, page)


def write_start_info(memory: GuestMemory, *, initrd: tuple[int, int] | None) -> None:
    """Write the PVH start info, its memory map, and the module list with the initrd if there is one."""
    entries = memory_map(memory)
    memory.write(layout.MEMMAP_START, b"".join(_MEMORY_MAP_ENTRY.pack(*entry, 0) for entry in entries))
    if initrd:
        memory.write(layout.MODLIST_START, _MODULE.pack(*initrd, 0, 0))
    start_info = _START_INFO.pack(
        _START_INFO_MAGIC,
        _START_INFO_VERSION,
        0,
        1 if initrd else 0,
        layout.MODLIST_START if initrd else 0,
        layout.CMDLINE_START,
        layout.RSDP_ADDR,
        layout.MEMMAP_START,
        len(entries),
        0,
    )
    memory.write(layout.PVH_INFO_START, start_info)


def write_reset_vector(memory: GuestMemory) -> None:
    """Make the BIOS's reset vector pulse the keyboard controller's reset line.

    On a hardware-reduced ACPI machine Linux tries EFI and then the BIOS, and neither exists: without this, a
    guest that reboots and was not told `reboot=k` runs for ever through empty memory. A kernel loaded over
    the vector keeps it.
    """
    if not any(memory.read(layout.RESET_VECTOR, len(_RESET_CODE))):
        memory.write(layout.RESET_VECTOR, _RESET_CODE)
