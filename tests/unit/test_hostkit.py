"""tools/hostkit: kernels out of bzImages, archives that Linux unpacks, a cache of whole things only."""

from __future__ import annotations

import bz2
import lzma
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from hostkit import cache, cpio, kernel, relay

ELF = b"\x7fELF" + bytes(range(256)) * 4096


def gzip(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=31)
    return compressor.compress(data) + compressor.flush()


def literals(data: bytes) -> bytes:
    """An lz4 frame of one block that is all literals: a token, the length in steps of 255, the bytes."""
    rest = len(data) - 15
    block = b"\xf0" + b"\xff" * (rest // 255) + bytes([rest % 255]) + data
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


def bzimage(payload: bytes, setup_sectors: int = 3) -> bytes:
    setup = bytearray((setup_sectors + 1) * 512)
    setup[0x1F1] = setup_sectors
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", setup, 0x248, 64, len(payload))
    return bytes(setup) + bytes(64) + payload + bytes(100)


@pytest.mark.parametrize(
    ("compress", "has_size"),
    [(gzip, False), (lzma.compress, True), (bz2.compress, True), (literals, True)],
    ids=["gzip", "xz", "bzip2", "lz4"],
)
def test_the_kernel_comes_out_of_a_bzimage(compress: Callable[[bytes], bytes], has_size: bool) -> None:
    payload = compress(ELF) + (struct.pack("<I", len(ELF)) if has_size else b"")
    assert kernel.vmlinux_of(bzimage(payload)) == ELF


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (bytes(2048), "not a bzImage"),
        (bzimage(b"unknown compression"), "unknown compression"),
        (bzimage(gzip(b"something else")), "not an ELF file"),
    ],
)
def test_what_is_no_kernel_is_refused(image: bytes, complaint: str) -> None:
    with pytest.raises(kernel.KernelError, match=complaint):
        kernel.vmlinux_of(image)


def test_an_archive_has_directories_before_what_is_in_them_and_every_part_aligned() -> None:
    archive = cpio.Archive()
    archive.file("etc/init.d/rcS", b"#!/bin/sh\n", 0o755)
    archive.symlink("init", "/sbin/init")
    archive.character_device("dev/console", 5, 1)
    data = archive.finish()
    assert len(data) % 512 == 0

    entries = {}
    position = 0
    while True:
        assert data[position : position + 6] == b"070701"
        fields = [int(data[position + 6 + 8 * n : position + 14 + 8 * n], 16) for n in range(13)]
        mode, size, major, minor, name_size = (fields[n] for n in (1, 6, 9, 10, 11))
        name = data[position + 110 : position + 110 + name_size - 1].decode()
        content = position + (110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            break
        entries[name] = (mode, data[content : content + size], major, minor)
        position = content + (size + 3) // 4 * 4
    assert entries == {
        "etc": (0o40755, b"", 0, 0),
        "etc/init.d": (0o40755, b"", 0, 0),
        "etc/init.d/rcS": (0o100755, b"#!/bin/sh\n", 0, 0),
        "init": (0o120777, b"/sbin/init", 0, 0),
        "dev": (0o40755, b"", 0, 0),
        "dev/console": (0o20600, b"", 5, 1),
    }
    assert list(entries).index("etc/init.d") < list(entries).index("etc/init.d/rcS")


def test_the_cache_makes_a_thing_once_and_keeps_no_part_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    thing = cache.cache_dir() / "things" / "one"

    def fail(path: Path) -> None:
        path.mkdir()
        (path / "part").write_text("half")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        cache.made(thing, fail)
    assert not list(thing.parent.iterdir())

    calls = []

    def make(path: Path) -> None:
        calls.append(path)
        path.write_text("whole")

    for _ in range(2):
        assert cache.made(thing, make).read_text() == "whole"
    assert len(calls) == 1


def test_an_emulated_host_has_more_time_to_boot_where_it_waits_for_a_processor(tmp_path: Path) -> None:
    patience = relay.Patience(str(tmp_path), 1000)
    assert patience.left() <= 1000
    for name, waited in (("1", 2_000_000_000_000), ("2", 5_000_000_000_000), ("3", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(f"17000 {waited} 9\n")
    assert 5000 < patience.left() <= 6000
