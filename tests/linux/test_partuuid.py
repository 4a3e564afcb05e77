"""A root device that is a partition, named by its PARTUUID."""

from __future__ import annotations

import binascii
import os
import struct
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import Guest

from crackle.schema.drive import Drive

Boot = Callable[..., Guest]
SECTOR = 512
FIRST, SPARE = 2048, 2048  # in sectors: where the first partition begins, and how long it is
SIGNATURE = 0x0EAA91A0
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
ROOT = uuid.UUID("c4ac91e0-1111-4222-8333-000000000042")


def mbr(sectors: int) -> tuple[bytes, bytes, str]:
    """Start and end of a disk with an MBR (what lies before and behind its partitions), and the second's PARTUUID."""
    entries = b"".join(
        struct.pack("<B3sB3sII", 0, b"", 0x83, b"", begin, size)
        for begin, size in ((FIRST, SPARE), (FIRST + SPARE, sectors))
    )
    head = bytes(440) + struct.pack("<IH", SIGNATURE, 0) + entries.ljust(64, b"\0") + b"\x55\xaa"
    return head, b"", f"{SIGNATURE:08x}-02"


def gpt(sectors: int) -> tuple[bytes, bytes, str]:
    """The same with a GPT (UEFI 2.10, section 5.3)."""
    table = b"".join(
        LINUX.bytes_le + each.bytes_le + struct.pack("<QQQ", begin, begin + size - 1, 0) + bytes(72)
        for each, begin, size in ((uuid.uuid4(), FIRST, SPARE), (ROOT, FIRST + SPARE, sectors))
    ).ljust(128 * 128, b"\0")
    end = FIRST + SPARE + sectors  # the table's copy, then the header's
    last = end + 32

    def header(own: int, other: int, entries: int) -> bytes:
        def pack(checksum: int) -> bytes:
            return struct.pack(
                "<8sIIIIQQQQ16sQIII",
                b"EFI PART", 0x10000, 92, checksum, 0, own, other, 34, end - 1, uuid.uuid4().bytes_le,
                entries, 128, 128, binascii.crc32(table),
            )  # fmt: skip

        first = pack(0)
        return (first[:16] + struct.pack("<I", binascii.crc32(first)) + first[20:]).ljust(SECTOR, b"\0")

    protective = struct.pack("<B3sB3sII", 0, b"", 0xEE, b"", 1, last)
    head = (bytes(446) + protective).ljust(510, b"\0") + b"\x55\xaa" + header(1, last, 2) + table
    return head, table + header(last, 1, end), str(ROOT)


@pytest.fixture
def partitioned(rootfs: Path, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Makes a disk whose second partition is the root file system: its path, and the PARTUUID."""

    def make(scheme: Callable[[int], tuple[bytes, bytes, str]]) -> tuple[Path, str]:
        head, tail, partuuid = scheme(rootfs.stat().st_size // SECTOR)
        path = tmp_path / "partitioned"
        with open(path, "wb") as disk:
            disk.write(head)
            disk.seek((FIRST + SPARE) * SECTOR)
            disk.write(rootfs.read_bytes())
            disk.write(tail)
            # The disk may have an end of its own behind what is in use.
            disk.truncate(os.lseek(disk.fileno(), 0, os.SEEK_END))
        return path, partuuid

    return make


def mount_of_root(guest: Guest) -> tuple[str, str]:
    """(block device, "ro" or "rw") of the guest's root."""
    number = guest.sh("stat -c %d /")
    major, minor = int(number) >> 8, int(number) & 0xFF
    name = guest.sh(f"basename $(readlink /sys/dev/block/{major}:{minor})")
    return name, guest.sh("grep ' / ext4 ' /proc/mounts").split()[3].split(",")[0]


@pytest.mark.parametrize("scheme", [mbr, gpt])
@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_a_partition_becomes_the_root(
    boot: Boot, partitioned: Callable[..., tuple[Path, str]], scheme: object, read_only: bool
) -> None:
    path, partuuid = partitioned(scheme)
    root = Drive("root", True, partuuid=partuuid, path_on_host=str(path), is_read_only=read_only)
    guest = boot(drives=[root]).wait_shell()
    mode = "ro" if read_only else "rw"
    assert mount_of_root(guest) == ("vda2", mode)
    words = guest.sh("cat /proc/cmdline").split()
    assert words[words.index(f"root=PARTUUID={partuuid}") + 1] == mode
    if not read_only:
        guest.sh("echo written > /here && sync")


def test_of_a_drive_that_is_not_the_root_it_has_no_effect(
    boot: Boot, rootfs: Path, partitioned: Callable[..., tuple[Path, str]]
) -> None:
    path, partuuid = partitioned(mbr)
    other = Drive("other", False, partuuid=partuuid, path_on_host=str(path), is_read_only=True)
    guest = boot(rootfs=rootfs, drives=[other]).wait_shell()
    assert mount_of_root(guest) == ("vda", "rw")
    line = guest.sh("cat /proc/cmdline")
    assert "PARTUUID" not in line
    assert "root=/dev/vda rw" in line
    assert guest.sh("ls /sys/block/vdb | grep vdb").split() == ["vdb1", "vdb2"]
