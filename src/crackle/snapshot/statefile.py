"""The state file: a header that says what it is, and the state as MessagePack with the names of its fields.

| bytes | content |
|---|---|
| 8 | "CRACKLE" and a NUL |
| 6 | version of the format: major, minor, patch, 16 bits each |
| 2 | 0 |
| 16 | architecture, as uname(2) names it, filled with NULs |
| 8 | bytes of the state |
| 32 | BLAKE2b (RFC 7693) of the header up to here and the state |
| ... | the state |

Numbers are little-endian. A reader takes every format of its own major version up to its own minor version.
"""

from __future__ import annotations

# The C module itself, as for the metadata tokens.
from _blake2 import blake2b
from _struct import Struct

import msgspec

from crackle.arch import MACHINE
from crackle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from crackle.snapshot.state import Snapshot

    T = TypeVar("T")

VERSION = (1, 0, 0)

MAGIC = b"CRACKLE\0"
_HEADER = Struct("<8s3HH16sQ")
_DIGEST = 32
HEADER_SIZE = _HEADER.size + _DIGEST


def version_text(version: tuple[int, int, int]) -> str:
    """As the command line shows it."""
    return "v" + ".".join(map(str, version))


def encode(snapshot: Snapshot) -> bytes:
    """A state file's content."""
    body = msgspec.msgpack.encode(snapshot)
    header = _HEADER.pack(MAGIC, *VERSION, 0, MACHINE.encode(), len(body))
    return header + _digest(header, body) + body


def describe(data: bytes) -> tuple[int, int, int]:
    """The version of the format of a state file that is whole. ConfigError when it is not."""
    version, _ = _split(data)
    return version


class _Id(msgspec.Struct):
    id: str


def id_of(data: bytes) -> str:
    """The id of the pair that a state file belongs to. ConfigError as `decode`."""
    return _decode(data, msgspec.msgpack.Decoder(_Id)).id


_decoders: list[msgspec.msgpack.Decoder[Snapshot]] = []


def make_ready() -> None:
    """Make what `decode` needs, which takes milliseconds, and is done once."""
    from crackle.snapshot.state import Snapshot

    if not _decoders:
        _decoders.append(msgspec.msgpack.Decoder(Snapshot))


def decode(data: bytes) -> Snapshot:
    """The snapshot in a state file's content. ConfigError says what is wrong with it."""
    make_ready()
    return _decode(data, _decoders[0])


def _decode(data: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    _, body = _split(data)
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"its state means nothing to this version of Crackle: {error}") from None


def _split(data: bytes) -> tuple[tuple[int, int, int], bytes]:
    """The version, and the state as it was written, once all the rest fits."""
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise ConfigError(f"it is no state file of Crackle's, which begins with {MAGIC!r}, not {data[:8]!r}")
    start = HEADER_SIZE
    if len(data) < start:
        raise ConfigError(f"it is truncated: {len(data)} bytes, where the header alone has {start}")
    _, major, minor, patch, _, architecture, size = _HEADER.unpack_from(data)
    if (major, minor) > VERSION[:2] or major < VERSION[0]:
        newer = "newer" if (major, minor) > VERSION[:2] else "older"
        raise ConfigError(
            f"its format {version_text((major, minor, patch))} is {newer} than this version of Crackle reads "
            f"({version_text(VERSION)})"
        )
    machine = architecture.rstrip(b"\0").decode(errors="replace")
    if machine != MACHINE:
        raise ConfigError(f"it is of an {machine} microVM, and this host is {MACHINE}")
    if len(data) != start + size:
        what = "is truncated" if len(data) < start + size else "goes on after its end"
        raise ConfigError(f"it {what}: {len(data)} bytes, where its header says {start + size}")
    body = data[start:]
    if data[_HEADER.size : start] != _digest(data[: _HEADER.size], body):
        raise ConfigError("it is corrupt: its checksum does not fit")
    return (major, minor, patch), body


def _digest(header: bytes, body: bytes) -> bytes:
    digest: bytes = blake2b(header + body, digest_size=_DIGEST).digest()
    return digest
