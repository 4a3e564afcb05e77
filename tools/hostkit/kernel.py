"""Debian's kernel packages: the uncompressed kernel out of the bzImage, and modules in loading order.

The bzImage's header is described in Documentation/arch/x86/boot.rst of Linux ("The Real-Mode Kernel Header").
"""

from __future__ import annotations

import bz2
import ctypes
import lzma
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cache, debian


class KernelError(Exception):
    """A kernel image or module is not what it should be."""


@dataclass(frozen=True)
class DebianKernel:
    """An unpacked kernel package."""

    version: str
    vmlinuz: Path
    vmlinux: Path
    modules: Path


def debian_kernel(package: str) -> DebianKernel:
    """The kernel that the metapackage `package` stands for, such as `linux-image-amd64`."""
    root = debian.unpacked(package, meta=True)
    vmlinuz = next((root / "boot").glob("vmlinuz-*"))
    version = vmlinuz.name.removeprefix("vmlinuz-")
    vmlinux = cache.made(
        cache.cache_dir() / "kernels" / f"{root.name}-vmlinux",
        lambda path: _write(path, vmlinux_of(vmlinuz.read_bytes())),
    )
    return DebianKernel(version, vmlinuz, vmlinux, root / "lib" / "modules" / version)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def vmlinux_of(image: bytes) -> bytes:
    """The ELF file inside the bzImage `image`. Raises KernelError when there is none."""
    if image[0x202:0x206] != b"HdrS":
        raise KernelError("not a bzImage: the magic number HdrS is missing at 0x202")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    # The build appends the unpacked size to the payload, except that gzip's own trailer already is that size.
    size = struct.unpack("<I", payload[-4:])[0]
    elf = _unpack(payload, size)
    if elf[:4] != b"\x7fELF":
        raise KernelError("the bzImage's payload is not an ELF file")
    return elf


def _unpack(payload: bytes, size: int) -> bytes:
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(31).decompress(payload)
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
    if payload.startswith(b"BZh"):
        return bz2.BZ2Decompressor().decompress(payload)
    if payload.startswith(b"]\0\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(payload)
    if payload.startswith(b"\x02\x21\x4c\x18"):
        return _unpack_lz4(payload[4:-4], size)
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return _unpack_zstd(payload[:-4], size)
    raise KernelError(f"unknown compression of the bzImage: it starts with {payload[:4].hex()}")


def _unpack_lz4(payload: bytes, size: int) -> bytes:
    """Unpack lz4's legacy frames: blocks, each after its length. The library is one that apt itself uses."""
    library = ctypes.CDLL("liblz4.so.1")
    block_size = 8 << 20
    out = ctypes.create_string_buffer(block_size)
    unpacked = bytearray()
    position = 0
    while position < len(payload) and len(unpacked) < size:
        (length,) = struct.unpack_from("<I", payload, position)
        block = payload[position + 4 : position + 4 + length]
        got = library.LZ4_decompress_safe(block, out, len(block), block_size)
        if got < 0:
            raise KernelError(f"corrupt lz4 block at {position} of the bzImage's payload")
        unpacked += out.raw[:got]
        position += 4 + length
    return bytes(unpacked)


def _unpack_zstd(payload: bytes, size: int) -> bytes:
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    out = ctypes.create_string_buffer(size)
    got = library.ZSTD_decompress(out, size, payload, len(payload))
    if got != size:
        raise KernelError("corrupt zstd payload in the bzImage")
    return out.raw


def load_order(kernel: DebianKernel, names: Sequence[str]) -> list[Path]:
    """The modules `names` and all they depend on, dependencies first. Built-in ones are left out."""
    files = {_canonical(path.stem): path for path in kernel.modules.glob("kernel/**/*.ko")}
    builtin = {
        _canonical(Path(line).stem) for line in (kernel.modules / "modules.builtin").read_text().split()
    }
    order: list[Path] = []

    def visit(name: str) -> None:
        if name in builtin:
            return
        if name not in files:
            raise KernelError(f"kernel {kernel.version} has no module {name}")
        path = files[name]
        if path in order:
            return
        for dependency in dependencies(path):
            visit(dependency)
        order.append(path)

    for name in names:
        visit(_canonical(name))
    return order


def dependencies(module: Path) -> list[str]:
    """What a module's own description (its .modinfo section) says it needs."""
    content = module.read_bytes()
    start = content.find(b"\0depends=") + len(b"\0depends=")
    listed = content[start : content.index(b"\0", start)].decode()
    return [_canonical(name) for name in listed.split(",") if name]


def _canonical(name: str) -> str:
    return name.replace("-", "_")
