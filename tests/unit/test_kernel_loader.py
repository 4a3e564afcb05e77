"""Loading vmlinux, bzImage and initrd: what goes where, and one clear error for each way to be wrong."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crackle.arch.x86_64 import load_initrd, load_kernel, memory_layout
from crackle.arch.x86_64.kernel import LoadedKernel
from crackle.errors import ConfigError
from crackle.memory import GuestMemory

MIB = 1 << 20
CODE = bytes(range(256)) * 16


def note(kind: int = 18, description: bytes = struct.pack("<Q", 0x100040), name: bytes = b"Xen\0") -> bytes:
    padded = name.ljust(len(name) + 3 & ~3, b"\0")
    return (
        struct.pack("<III", len(name), len(description), kind)
        + padded
        + description.ljust(len(description) + 3 & ~3, b"\0")
    )


def elf(
    segments: list[tuple[int, bytes, int]] | None = None,
    *,
    entry: int = 0x100000,
    notes: bytes = b"",
    **header: int,
) -> bytes:
    """An ELF64 file with PT_LOAD segments of (physical address, bytes, size in memory) and a PT_NOTE."""
    segments = [(0x100000, CODE, len(CODE))] if segments is None else segments
    count = len(segments) + bool(notes)
    offset = 64 + 56 * count
    table, body = b"", b""
    for address, data, size in segments:
        virtual = 0xFFFF_FFFF_8000_0000 + address & (1 << 64) - 1
        table += struct.pack("<IIQQQQQQ", 1, 7, offset + len(body), virtual, address, len(data), size, 0x1000)
        body += data
    if notes:
        table += struct.pack("<IIQQQQQQ", 4, 4, offset + len(body), 0, 0, len(notes), len(notes), 4)
        body += notes
    head = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH",
        b"\x7fELF",
        header.get("bits", 2),
        header.get("order", 1),
        1,
        header.get("kind", 2),
        header.get("machine", 62),
        1,
        entry,
        header.get("table", 64),
        0,
        0,
        64,
        header.get("entry_size", 56),
        header.get("count", count),
        0,
        0,
        0,
    )
    return head + table + body


def bzimage(code: bytes = CODE, *, trailer: bytes = b"", **fields: int) -> bytes:
    """A bzImage of boot protocol 2.15, preferred address 16 MiB, with `code` as its protected-mode part."""
    setup_sectors = fields.get("setup_sectors", 3)
    image = bytearray(((setup_sectors or 4) + 1) * 512)
    struct.pack_into("<B", image, 0x1F1, setup_sectors)
    struct.pack_into("<I", image, 0x1F4, fields.get("paragraphs", (len(code) + 15) // 16))
    struct.pack_into("<H", image, 0x1FE, fields.get("flag", 0xAA55))
    struct.pack_into(
        "<BB4sH", image, 0x200, 0xEB, fields.get("jump", 0x6A), b"HdrS", fields.get("version", 0x20F)
    )
    struct.pack_into("<B", image, 0x211, fields.get("load_flags", 1))
    struct.pack_into("<I", image, 0x214, fields.get("code32_start", 0x100000))
    struct.pack_into("<I", image, 0x22C, fields.get("initrd_max", 0x7FFFFFFF))
    struct.pack_into("<IBBHI", image, 0x230, 0x200000, 1, 21, fields.get("extended_flags", 1), 2047)
    struct.pack_into("<QI", image, 0x258, fields.get("preferred", 0x1000000), fields.get("init_size", MIB))
    return bytes(image) + code + trailer


def load(tmp_path: Path, image: bytes, mib: int = 32) -> tuple[GuestMemory, LoadedKernel]:
    path = tmp_path / "kernel"
    path.write_bytes(image)
    memory = GuestMemory(memory_layout(mib * MIB))
    fd = os.open(path, os.O_RDONLY)
    try:
        return memory, load_kernel(memory, fd)
    finally:
        os.close(fd)


# -- vmlinux ----------------------------------------------------------------


def test_vmlinux_segments_go_to_their_physical_addresses(tmp_path: Path) -> None:
    memory, kernel = load(tmp_path, elf([(0x100000, CODE, 8192), (0x200000, b"data", 4096)], entry=0x100010))
    assert memory.read(0x100000, len(CODE)) == CODE
    assert memory.read(0x100000 + len(CODE), 8192 - len(CODE)) == bytes(8192 - len(CODE))
    assert memory.read(0x200000, 8) == b"data\0\0\0\0"
    assert kernel == LoadedKernel(entry=0x100010, protocol="linux64", end=0x201000)


def test_segments_may_come_in_any_order_and_have_nothing_in_the_file(tmp_path: Path) -> None:
    _, kernel = load(tmp_path, elf([(0x300000, b"", 4096), (0x100000, CODE, len(CODE))]))
    assert kernel.end == 0x301000


def test_a_shared_object_is_loaded_like_an_executable(tmp_path: Path) -> None:
    assert load(tmp_path, elf(kind=3))[1].entry == 0x100000


def test_the_pvh_note_is_preferred_to_the_elf_entry(tmp_path: Path) -> None:
    notes = note(kind=6, name=b"GNU\0", description=b"12345") + note()
    _, kernel = load(tmp_path, elf(notes=notes))
    assert (kernel.protocol, kernel.entry) == ("pvh", 0x100040)


def test_a_pvh_address_may_have_four_bytes(tmp_path: Path) -> None:
    assert load(tmp_path, elf(notes=note(description=struct.pack("<I", 0x100080))))[1].entry == 0x100080


def test_other_notes_do_not_make_it_pvh(tmp_path: Path) -> None:
    for notes in (note(kind=17), note(name=b"Yen\0"), b"short"):
        assert load(tmp_path, elf(notes=notes))[1].protocol == "linux64"


def test_a_segment_above_4_gib_needs_that_much_memory(tmp_path: Path) -> None:
    image = elf([(0x100000, CODE, len(CODE)), (1 << 32, b"high", 4096)])
    assert load(tmp_path, image, 4096)[0].read(1 << 32, 4) == b"high"
    with pytest.raises(ConfigError, match="segment at 0x100000000 of 0x1000 bytes is outside the 32 MiB"):
        load(tmp_path, image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "the file is empty"),
        (b"\x7fELF", "ELF header is truncated: 4 of 64 bytes"),
        (elf()[:100], "program header table.*ends beyond"),
        (elf()[:-1], "truncated: segment at 0x100000 ends beyond the file's"),
        (elf(bits=1), "not a 64-bit x86 ELF file .class 1"),
        (elf(order=2), "byte order 2"),
        (elf(machine=183), "machine 183"),
        (elf(kind=1), "ELF type is 1"),
        (elf(entry_size=32), "32 bytes each, not 56"),
        (elf(count=60000), "60000 ELF program headers, more than 256"),
        (elf(table=1 << 63), "program header table, 56 bytes at 0x8000000000000000"),
        (elf([]), "no segment to load"),
        (elf([(0x100000, CODE, 16)]), "0x1000 bytes in the file, 0x10 in memory"),
        (
            elf([(0x100000, CODE, 1 << 40)]),
            "segment at 0x100000 of 0x10000000000 bytes is outside the 32 MiB",
        ),
        (elf([((1 << 64) - 4096, CODE, 4096)]), "segment at 0xfffffffffffff000"),
        (
            elf([(0x100000, CODE, 8192), (0x101000, CODE, 4096)]),
            "0x101000 of 0x1000 bytes overlaps the one at 0x1000",
        ),
        (elf([(0x100000, CODE, 4096), (0x7000, CODE, 4096)]), "segment at 0x7000.*boot data at 0x0..0xc000"),
        (elf([(0x20000, CODE, 4096)], entry=0x20000), "boot data at 0x20000"),
        (elf([(0xFF000, CODE, 4096), (0x9F000, CODE, 4096)]), "boot data at 0x9fc00"),
        (elf(entry=0x101000), "entry 0x101000 is in no segment"),
        (elf(notes=note(description=struct.pack("<Q", 0x101000))), "PVH entry 0x101000 is in no segment"),
        (elf(notes=note(description=b"12")), "PVH entry note has 2 bytes"),
        (elf(notes=note()[:-8]), "PVH entry note"),
        (b"\x1f\x8b\x08\0", "compressed with gzip"),
        (bytes(0x38) + b"ARM\x64", "arm64"),
        (b"#!/bin/sh\n", "neither an ELF vmlinux nor a bzImage: it begins with 23 21 2f 62"),
    ],
)
def test_a_bad_vmlinux_is_one_clear_error(tmp_path: Path, image: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=f"Cannot load kernel due to .* kernel image: .*{message}"):
        load(tmp_path, image)


def test_an_entry_beyond_the_boot_mapping_is_refused(tmp_path: Path) -> None:
    image = elf([(0x4000_0000, CODE, 4096)], entry=0x4000_0000)
    with pytest.raises(ConfigError, match="entry 0x40000000 is not below 0x40000000"):
        load(tmp_path, image, 2048)


def test_low_memory_that_the_monitor_does_not_use_may_be_loaded(tmp_path: Path) -> None:
    memory, _ = load(tmp_path, elf([(0xFF000, CODE, 4096), (0x100000, CODE, 4096)]))
    assert memory.read(0xFF000, 16) == CODE[:16]


def test_nothing_is_loaded_when_a_later_segment_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(elf([(0x100000, CODE, 4096), (64 * MIB, CODE, 4096)]))
    memory = GuestMemory(memory_layout(32 * MIB))
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(ConfigError):
        load_kernel(memory, fd)
    os.close(fd)
    assert memory.read(0x100000, 4096) == bytes(4096)


def test_a_directory_is_no_kernel(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(ConfigError, match="not a regular file"):
        load_kernel(GuestMemory(memory_layout(MIB)), fd)
    os.close(fd)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(elf())
    fd = os.open(path, os.O_WRONLY)
    with pytest.raises(ConfigError, match=r"Cannot load kernel due to .*: Bad file descriptor"):
        load_kernel(GuestMemory(memory_layout(MIB)), fd)
    os.close(fd)


# -- bzImage ----------------------------------------------------------------


def test_bzimage_goes_to_its_preferred_address_and_is_entered_in_64_bit_mode(tmp_path: Path) -> None:
    memory, kernel = load(tmp_path, bzimage())
    assert memory.read(0x1000000, len(CODE)) == CODE
    assert (kernel.entry, kernel.protocol) == (0x1000200, "linux64")
    assert kernel.end == 0x1000000 + MIB
    assert kernel.initrd_limit == 0x80000000


def test_the_setup_header_says_where_the_kernel_was_loaded(tmp_path: Path) -> None:
    image = bzimage()
    header = load(tmp_path, image)[1].setup_header
    assert header is not None
    assert len(header) == 0x202 + 0x6A - 0x1F1
    assert header[: 0x214 - 0x1F1] == image[0x1F1:0x214]
    assert struct.unpack_from("<I", header, 0x214 - 0x1F1) == (0x1000000,)
    assert header[0x218 - 0x1F1 :] == image[0x218 : 0x202 + 0x6A]


def test_without_a_preferred_address_it_goes_where_the_header_says(tmp_path: Path) -> None:
    assert load(tmp_path, bzimage(preferred=0))[1].entry == 0x100200


def test_a_kernel_without_a_number_of_setup_sectors_has_four(tmp_path: Path) -> None:
    assert load(tmp_path, bzimage(setup_sectors=0))[0].read(0x1000000, 16) == CODE[:16]


def test_a_signature_after_the_kernel_is_not_loaded(tmp_path: Path) -> None:
    memory, _ = load(tmp_path, bzimage(trailer=b"signature"))
    assert memory.read(0x1000000 + len(CODE), 9) == bytes(9)


def test_the_last_paragraph_may_be_short(tmp_path: Path) -> None:
    memory, _ = load(tmp_path, bzimage(CODE[:-3]))
    assert memory.read(0x1000000, len(CODE)) == CODE[:-3] + bytes(3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (bzimage()[:0x210], "truncated: 528 bytes do not hold"),
        (bzimage()[:-64], "truncated: it has 6080 bytes, its setup header promises 6144"),
        (bzimage(flag=0), "boot flag is 0x0000"),
        (bzimage(version=0x205), "boot protocol is 2.05; 2.06 or newer"),
        (bzimage(version=0x20B), "no 64-bit entry point .boot protocol 2.11"),
        (bzimage(extended_flags=0), "no 64-bit entry point .boot protocol 2.15, flags 0x0"),
        (bzimage(load_flags=0), "zImage"),
        (bzimage(paragraphs=4), "only 64 bytes"),
        (bzimage(paragraphs=0xFFFFFFFF), "truncated"),
        (bzimage(jump=0x10), "setup header has 33 bytes"),
        (bzimage(preferred=0x8000), "0x8000, over boot data at 0x0..0xc000"),
        (bzimage(preferred=0xE0000), "boot data at 0x9fc00"),
        (bzimage(preferred=0xFFFF_FFFF_FFFF_F000), "0xfffffffffffff000, not below 4 GiB"),
        (
            bzimage(init_size=64 * MIB),
            "0x1000000..0x5000000 and needs 80 MiB of guest memory; there are 32 MiB",
        ),
        (bzimage(init_size=0xFFFFFFFF), "needs 4112 MiB"),
    ],
)
def test_a_bad_bzimage_is_one_clear_error(tmp_path: Path, image: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=f"Cannot load kernel due to .* kernel image: .*{message}"):
        load(tmp_path, image)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    image=st.sampled_from(
        [elf(notes=note()), elf([(0x100000, CODE, 8192), (0x200000, CODE, 9000)]), bzimage()]
    ),
    changes=st.lists(st.tuples(st.integers(0, 0x270), st.binary(min_size=1, max_size=8)), max_size=4),
    size=st.integers(0, 7000),
)
def test_whatever_a_file_says_it_is_loaded_or_refused(
    tmp_path: Path, image: bytes, changes: list[tuple[int, bytes]], size: int
) -> None:
    mangled = bytearray(image)
    for offset, data in changes:
        mangled[offset : offset + len(data)] = data
    try:
        memory, kernel = load(tmp_path, bytes(mangled[:size]))
    except ConfigError as error:
        assert str(error).startswith("System configuration error: Cannot load kernel due to ")  # noqa: PT017
    else:
        assert 0 < kernel.entry < kernel.end <= memory.size


# -- initrd ----------------------------------------------------------------

KERNEL = LoadedKernel(entry=0x100000, protocol="linux64", end=0x200123)


def load_disk(
    tmp_path: Path, size: int, mib: int, kernel: LoadedKernel = KERNEL
) -> tuple[GuestMemory, int, int]:
    path = tmp_path / "initrd"
    path.write_bytes(b"i" * size)
    memory = GuestMemory(memory_layout(mib * MIB))
    fd = os.open(path, os.O_RDONLY)
    try:
        return memory, *load_initrd(memory, fd, kernel)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("size", "mib", "address"),
    [
        (1, 4, 0x3FF000),
        (4096, 4, 0x3FF000),
        (4097, 4, 0x3FE000),
        (0x1FF000, 4, 0x201000),
        (5, 5120, 0xBFFFF000),
    ],
)
def test_the_initrd_ends_low_memory_page_aligned(tmp_path: Path, size: int, mib: int, address: int) -> None:
    memory, place, length = load_disk(tmp_path, size, mib)
    assert (place, length) == (address, size)
    assert memory.read(address, size) == b"i" * size


def test_the_initrd_stays_below_what_a_bzimage_can_reach(tmp_path: Path) -> None:
    kernel = LoadedKernel(entry=0x1000200, protocol="linux64", end=0x2000000, initrd_limit=0x80000000)
    assert load_disk(tmp_path, 10, 3072, kernel)[1] == 0x7FFFF000


@pytest.mark.parametrize("size", [0x1FF001, 4 * MIB, 5 * MIB])
def test_an_initrd_that_would_touch_the_kernel_is_refused(tmp_path: Path, size: int) -> None:
    words = f"Failed to compute the initrd address: its {size} bytes do not fit between the kernel's end at 0x201000"
    with pytest.raises(ConfigError, match=words):
        load_disk(tmp_path, size, 4)


def test_an_empty_initrd_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="invalid memory configuration: the file is empty"):
        load_disk(tmp_path, 0, 4)
