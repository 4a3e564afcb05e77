"""Loading a kernel and an initial RAM disk into guest memory.

A kernel is an ELF64 vmlinux, entered by the PVH protocol if it has a note that says where, else by the 64-bit
Linux protocol, or a bzImage (Documentation/arch/x86/boot.rst). What a file claims is checked before a byte of
it is loaded; the image is then read straight into guest memory, which must still read as zero, as new
mappings do.
"""

from __future__ import annotations

import os
from stat import S_ISREG
from typing import TYPE_CHECKING

import msgspec

from crackle.arch.x86_64 import bzimage, elf
from crackle.arch.x86_64.layout import HIMEM_START, PAGE_SIZE
from crackle.errors import ConfigError

if TYPE_CHECKING:
    from crackle.memory import GuestMemory

LINUX64 = "linux64"
PVH = "pvh"

# Firecracker's words: clients look for them.
_NO_KERNEL = "System configuration error: " + (
    "Cannot load kernel due to invalid memory configuration or invalid kernel image"
)
_NO_INITRD = "Error with initrd initialization: Cannot load initrd due to an invalid memory configuration"
_NO_PLACE = "Error with initrd initialization: Failed to compute the initrd address"
_NO_ELF = "Kernel Loader: failed to load ELF kernel image: Kernel Loader: Unable to read elf header"
_NO_BZIMAGE = "Kernel Loader: failed to load bzImage kernel image: Kernel Loader: Invalid bzImage"

_HEAD_SIZE = 4096  # holds the ELF header, the usual program headers, and the whole bzImage setup header


class LoadedKernel(msgspec.Struct, frozen=True):
    """A kernel in guest memory.

    entry: guest physical address of the first instruction. protocol: "linux64" or "pvh". end: first address
    after all that the kernel needs before it knows its memory map. setup_header: of a bzImage, the bytes for
    offset 0x1f1 of the zero page. initrd_limit: an initrd must end at or below this address.
    """

    entry: int
    protocol: str
    end: int
    setup_header: bytes | None = None
    initrd_limit: int = 1 << 32


def load_kernel(memory: GuestMemory, kernel_fd: int) -> LoadedKernel:
    """Load the kernel image in `kernel_fd`, a regular file, whatever its file position.

    ConfigError, and guest memory untouched, if the image is no kernel for this machine, is truncated, or does
    not fit.
    """
    try:
        status = os.fstat(kernel_fd)
        if not S_ISREG(status.st_mode):
            raise ConfigError(f"{_NO_ELF}: it is not a regular file")
        head = os.pread(kernel_fd, _HEAD_SIZE, 0)
        if head[:4] == elf.MAGIC:
            image = elf.parse(kernel_fd, status.st_size, head)
            image.check(memory)
            for segment in image.segments:
                if segment.file_size:
                    memory.load(segment.address, kernel_fd, segment.offset, segment.file_size)
            protocol = LINUX64 if image.pvh_entry is None else PVH
            return LoadedKernel(image.start, protocol, image.end)
        if bzimage.recognise(head):
            loaded = bzimage.parse(status.st_size, head)
            loaded.check(memory)
            memory.load(loaded.address, kernel_fd, loaded.offset, loaded.file_size)
            return LoadedKernel(
                loaded.entry, LINUX64, loaded.end, loaded.setup_header, min(loaded.initrd_max + 1, 1 << 32)
            )
        raise ConfigError(f"{_NO_BZIMAGE if head else _NO_ELF}: {_describe(head)}")
    except OSError as error:
        raise ConfigError(f"{_NO_KERNEL}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{_NO_KERNEL}: {error}") from None


def load_initrd(memory: GuestMemory, initrd_fd: int, kernel: LoadedKernel) -> tuple[int, int]:
    """Load the initial RAM disk as high as it goes below 3 GiB, page aligned. Returns (guest physical
    address, bytes).

    ConfigError if it is empty, cannot be read, or does not fit between the kernel and the end of that memory.
    """
    try:
        status = os.fstat(initrd_fd)
        if not S_ISREG(status.st_mode):
            raise ConfigError("it is not a regular file")
        size = status.st_size
        if not size:
            raise ConfigError("the file is empty")
        top = min(memory.regions[0].size, kernel.initrd_limit)
        bottom = max(HIMEM_START, -(-kernel.end // PAGE_SIZE) * PAGE_SIZE)
        address = (top - size) // PAGE_SIZE * PAGE_SIZE
        if address >= bottom:
            memory.load(address, initrd_fd, 0, size)
    except OSError as error:
        raise ConfigError(f"{_NO_INITRD}: {error.strerror}") from error
    except ConfigError as error:
        raise ConfigError(f"{_NO_INITRD}: {error}") from None
    if address < bottom:
        raise ConfigError(
            f"{_NO_PLACE}: its {size} bytes do not fit between the kernel's end at {bottom:#x} and {top:#x}"
        )
    return address, size


_OTHER_KINDS = (
    (0, b"\x1f\x8b", "is compressed with gzip"),
    (0, b"\xfd7zXZ\0", "is compressed with xz"),
    (0, b"\x28\xb5\x2f\xfd", "is compressed with zstd"),
    (0, b"BZh", "is compressed with bzip2"),
    (0, b"\x02\x21\x4c\x18", "is compressed with lz4"),
    (0x38, b"ARM\x64", "is an arm64 kernel"),
)


def _describe(head: bytes) -> str:
    if not head:
        return "the file is empty"
    for offset, magic, text in _OTHER_KINDS:
        if head.startswith(magic, offset):
            return f"the file {text}; an x86_64 vmlinux or bzImage is needed"
    return f"the file is neither an ELF vmlinux nor a bzImage: it begins with {head[:4].hex(' ')}"
