"""The ELF64 vmlinux: program headers, and the note that names the PVH entry (Linux
`Documentation/arch/x86`, Xen PVH ABI).
"""

from __future__ import annotations

import os
from struct import Struct
from typing import TYPE_CHECKING

import msgspec

from crackle.arch.x86_64.layout import BOOT_DATA, HIMEM_START, IDENTITY_MAP_END
from crackle.errors import ConfigError

if TYPE_CHECKING:
    from crackle.memory import GuestMemory

MAGIC = b"\x7fELF"

_HEADER = Struct("<4sBBB9xHHIQQQIHHHHHH")
_PROGRAM_HEADER = Struct("<IIQQQQQQ")
_NOTE_HEADER = Struct("<III")
_CLASS_64 = 2
_LITTLE_ENDIAN = 1
_TYPE_EXECUTABLE = 2
_TYPE_SHARED = 3
_MACHINE_X86_64 = 62
_PT_LOAD = 1
_PT_NOTE = 4
_XEN_NAME = b"Xen\0"
_XEN_PHYS32_ENTRY = 18

_MAX_PROGRAM_HEADERS = 256
_MAX_NOTES_SIZE = 1 << 20


class Segment(msgspec.Struct, order=True):
    """One PT_LOAD: `file_size` bytes at file `offset` go to guest physical `address`; `size` includes the
    zeroes after.
    """

    address: int
    size: int
    offset: int
    file_size: int

    @property
    def end(self) -> int:
        """First address after the segment."""
        return self.address + self.size


class ElfImage(msgspec.Struct):
    """What the headers of a vmlinux say. Segments are in ascending order and have memory."""

    segments: list[Segment]
    entry: int
    pvh_entry: int | None

    @property
    def start(self) -> int:
        """Guest physical address to begin at: the PVH entry if there is one, else the ELF entry."""
        return self.entry if self.pvh_entry is None else self.pvh_entry

    @property
    def end(self) -> int:
        """First guest physical address after the last segment."""
        return self.segments[-1].end

    def check(self, memory: GuestMemory) -> None:
        """ConfigError unless every segment lies in RAM, clear of the others and of boot data, and the
        entry in one.
        """
        before = None
        for segment in self.segments:
            place = f"segment at {segment.address:#x} of {segment.size:#x} bytes"
            if not any(r.gpa <= segment.address and segment.end <= r.gpa + r.size for r in memory.regions):
                raise ConfigError(f"{place} is outside the {memory.size >> 20} MiB of guest memory")
            for start, end in BOOT_DATA:
                if segment.address < end and start < segment.end:
                    raise ConfigError(
                        f"{place} lies over boot data at {start:#x}..{end:#x}; load it from {HIMEM_START:#x}"
                    )
            if before is not None and segment.address < before.end:
                raise ConfigError(
                    f"{place} overlaps the one at {before.address:#x} of {before.size:#x} bytes"
                )
            before = segment
        kind = "entry" if self.pvh_entry is None else "PVH entry"
        if not any(s.address <= self.start < s.end for s in self.segments):
            raise ConfigError(f"{kind} {self.start:#x} is in no segment")
        if self.pvh_entry is None and self.entry >= IDENTITY_MAP_END:
            raise ConfigError(
                f"entry {self.entry:#x} is not below {IDENTITY_MAP_END:#x}, the end of the boot mapping"
            )


def parse(fd: int, file_size: int, head: bytes) -> ElfImage:
    """Read the headers of the ELF file `fd` of `file_size` bytes; `head` is how it begins. ConfigError if
    they are bad.
    """
    if len(head) < _HEADER.size:
        raise ConfigError(f"the ELF header is truncated: {len(head)} of {_HEADER.size} bytes")
    fields = _HEADER.unpack_from(head)
    _, bits, order, _, kind, machine, _, entry, table, _, _, _, entry_size, count, _, _, _ = fields
    if bits != _CLASS_64 or order != _LITTLE_ENDIAN or machine != _MACHINE_X86_64:
        raise ConfigError(
            f"it is not a 64-bit x86 ELF file (class {bits}, byte order {order}, machine {machine})"
        )
    if kind not in (_TYPE_EXECUTABLE, _TYPE_SHARED):
        raise ConfigError(f"its ELF type is {kind}, which cannot be executed")
    if entry_size != _PROGRAM_HEADER.size:
        raise ConfigError(f"its ELF program headers have {entry_size} bytes each, not {_PROGRAM_HEADER.size}")
    if count > _MAX_PROGRAM_HEADERS:
        raise ConfigError(f"it has {count} ELF program headers, more than {_MAX_PROGRAM_HEADERS}")
    size = count * entry_size
    headers = head[table : table + size]
    if len(headers) < size:
        headers = _read(fd, file_size, table, size, "the ELF program header table")
    segments = []
    pvh_entry = None
    for segment_kind, _, offset, _, address, in_file, in_memory, _ in _PROGRAM_HEADER.iter_unpack(headers):
        if segment_kind == _PT_LOAD and in_memory | in_file:
            if in_file > in_memory:
                raise ConfigError(
                    f"segment at {address:#x} has {in_file:#x} bytes in the file, {in_memory:#x} in memory"
                )
            if offset + in_file > file_size:
                raise ConfigError(
                    f"it is truncated: segment at {address:#x} ends beyond the file's {file_size} bytes"
                )
            segments.append(Segment(address, in_memory, offset, in_file))
        elif segment_kind == _PT_NOTE and pvh_entry is None:
            if in_file > _MAX_NOTES_SIZE:
                raise ConfigError(f"its ELF notes have {in_file} bytes, more than {_MAX_NOTES_SIZE}")
            pvh_entry = _find_pvh_entry(_read(fd, file_size, offset, in_file, "the ELF notes"))
    if not segments:
        raise ConfigError("it has no segment to load")
    segments.sort()
    return ElfImage(segments, entry, pvh_entry)


def _find_pvh_entry(notes: bytes) -> int | None:
    """The 32-bit address in the Xen PHYS32_ENTRY note. Names and descriptors are padded to 4 bytes."""
    at = 0
    while at + _NOTE_HEADER.size <= len(notes):
        name_size, size, kind = _NOTE_HEADER.unpack_from(notes, at)
        name = at + _NOTE_HEADER.size
        description = name + (name_size + 3 & ~3)
        if kind == _XEN_PHYS32_ENTRY and notes[name : name + name_size] == _XEN_NAME:
            if size < 4 or description + 4 > len(notes):
                raise ConfigError(f"its PVH entry note has {size} bytes of address and ends at {len(notes)}")
            return int.from_bytes(notes[description : description + 4], "little")
        at = description + (size + 3 & ~3)
    return None


def _read(fd: int, file_size: int, offset: int, size: int, what: str) -> bytes:
    if offset + size <= file_size:
        data = os.pread(fd, size, offset)
        if len(data) == size:
            return data
    raise ConfigError(
        f"it is truncated: {what}, {size} bytes at {offset:#x}, ends beyond the file's {file_size} bytes"
    )
