"""ACPI Machine Language: the few terms the DSDT needs, each a function from its parts to bytes (ACPI 6.5,
chapter 20.2).

Resource descriptors are those of chapter 6.4.
"""

from __future__ import annotations

from struct import pack

_NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")

ARG0 = b"\x68"
LOCAL0 = b"\x60"
LOCAL1 = b"\x61"
END_TAG = b"\x79\0"
"""Ends a resource template; a checksum of 0 counts as correct (6.4.2.9)."""


def pkg_length(size: int) -> bytes:
    """PkgLength for `size` bytes that follow it; the encoded value counts its own bytes too (20.2.4)."""
    if size + 1 < 1 << 6:
        return bytes((size + 1,))
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes((extra << 6 | total & 0xF,)) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"an AML package of {size} bytes is too long")


def name_string(path: str) -> bytes:
    r"""A name or path such as `COM1` or `\_SB.PWRB`; segments are padded with `_` to four characters
    (20.2.2).
    """
    root = b"\\" if path.startswith("\\") else b""
    segments = []
    for segment in path.removeprefix("\\").split("."):
        if not 1 <= len(segment) <= 4 or segment[0].isdigit() or not _NAME_CHARACTERS.issuperset(segment):
            raise ValueError(f"{path!r} is no AML name")
        segments.append(segment.ljust(4, "_").encode("ascii"))
    if len(segments) == 1:
        return root + segments[0]
    if len(segments) == 2:
        return root + b"\x2e" + segments[0] + segments[1]
    return root + b"\x2f" + bytes((len(segments),)) + b"".join(segments)


def integer(value: int) -> bytes:
    """An integer in its shortest form (20.2.3)."""
    if value in (0, 1):
        return bytes((value,))
    if value < 1 << 8:
        return pack("<BB", 0x0A, value)
    if value < 1 << 16:
        return pack("<BH", 0x0B, value)
    if value < 1 << 32:
        return pack("<BI", 0x0C, value)
    return pack("<BQ", 0x0E, value)


def string(text: str) -> bytes:
    """A string constant (20.2.3)."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """An EISA id such as `PNP0501` as the integer it is packed to: three letters of 5 bits, four hex
    digits (19.6.36).
    """
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - ord("@")
    return b"\x0c" + pack(">HH", letters, int(text[3:], 16))


def name(path: str, value: bytes) -> bytes:
    """Name (path, value)."""
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) { terms }."""
    return _package(b"\x10", name_string(path), *terms)


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) { terms }."""
    return _package(b"\x5b\x82", name_string(path), *terms)


def method(path: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """Method (path, arguments) { terms }."""
    return _package(b"\x14", name_string(path), bytes((arguments | serialized << 3,)), *terms)


def if_equal(left: bytes, right: bytes, *terms: bytes) -> bytes:
    """If (left == right) { terms }."""
    return _package(b"\xa0", b"\x93", left, right, *terms)


def while_true(predicate: bytes, *terms: bytes) -> bytes:
    """While (predicate) { terms }."""
    return _package(b"\xa2", predicate, *terms)


def store(value: bytes, target: bytes) -> bytes:
    """Store (value, target)."""
    return b"\x70" + value + target


def load(path: str, target: bytes) -> bytes:
    """Load (path, target): adds the table in an operation region to the namespace (19.6.79)."""
    return b"\x5b\x20" + name_string(path) + target


def memory_region(path: str, address: int, size: int) -> bytes:
    """OperationRegion (path, SystemMemory, address, size)."""
    return b"\x5b\x80" + name_string(path) + b"\0" + integer(address) + integer(size)


def byte_field(region: str, path: str) -> bytes:
    """Field (region, ByteAcc, NoLock, Preserve) { path, 8 }: the first byte of an operation region."""
    return _package(b"\x5b\x81", name_string(region), b"\x01", name_string(path), b"\x08")


def notify(path: str, value: int) -> bytes:
    """Notify (path, value)."""
    return b"\x86" + name_string(path) + integer(value)


def package(*elements: bytes) -> bytes:
    """Package () { elements }."""
    return _package(b"\x12", bytes((len(elements),)), *elements)


def resource_template(*descriptors: bytes) -> bytes:
    """ResourceTemplate () { descriptors }: a buffer that ends with the end tag."""
    data = b"".join(descriptors) + END_TAG
    return _package(b"\x11", integer(len(data)), data)


def memory32_fixed(address: int, size: int) -> bytes:
    """Memory32Fixed (ReadWrite, address, size) (6.4.3.4)."""
    return pack("<BHBII", 0x86, 9, 1, address, size)


def interrupt(gsi: int, *, shared: bool = False, level: bool = False) -> bytes:
    """Interrupt (ResourceConsumer, Edge or Level, ActiveHigh, Exclusive or Shared) { gsi } (6.4.3.6)."""
    return pack("<BHBBI", 0x89, 6, shared << 3 | (not level) << 1 | 1, 1, gsi)


def io(port: int, count: int) -> bytes:
    """IO (Decode16, port, port, 1, count) (6.4.2.5)."""
    return pack("<BBHHBB", 0x47, 1, port, port, 1, count)


def _package(opcode: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return opcode + pkg_length(len(body)) + body
