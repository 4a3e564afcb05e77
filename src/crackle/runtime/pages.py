"""Which pages a forked child has of its own, where its parent has some, too (proc(5), pagemap)."""

from __future__ import annotations

import os
import struct

_PAGE = os.sysconf("SC_PAGE_SIZE")
# Documentation/admin-guide/mm/pagemap.rst: bits of an entry.
_PRESENT, _OF_FILE, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56


def written_pages(child: int) -> bytes:
    """Ranges of this process's writable private memory of which `child` has copies: pairs of address and size in bytes.

    Empty where /proc does not tell.
    """
    ranges: list[tuple[int, int]] = []
    try:
        with (
            open("/proc/self/maps", "rb") as maps,
            open(f"/proc/{child}/pagemap", "rb", buffering=0) as pages,
        ):
            for line in maps.read().splitlines():
                fields = line.split(maxsplit=5)
                if fields[1] == b"rw-p":
                    start, end = (int(place, 16) for place in fields[0].split(b"-"))
                    ranges += _written(
                        os.pread(pages.fileno(), (end - start) // _PAGE * 8, start // _PAGE * 8), start
                    )
    except OSError:
        return b""
    return b"".join(struct.pack("=2Q", start, size) for start, size in ranges)


def _written(entries: bytes, start: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for index, (entry,) in enumerate(struct.iter_unpack("=Q", entries)):
        if entry & _PRESENT and entry & _EXCLUSIVE and not entry & _OF_FILE:
            address = start + index * _PAGE
            if found and sum(found[-1]) == address:
                found[-1] = found[-1][0], found[-1][1] + _PAGE
            else:
                found.append((address, _PAGE))
    return found
