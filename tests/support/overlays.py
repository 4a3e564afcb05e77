"""Disks with an overlay, as a drive has them, without a microVM."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from crackle.disk.chain import lay_over
from crackle.schema.drive import Overlay
from crackle.virtio.block.backing import Backing, open_backing
from support.disk import DISCARD, FEATURES, FLUSH, IN, OK, OUT, SECTOR, WRITE_ZEROES, Disk

F_DISCARD, F_WRITE_ZEROES = 1 << 13, 1 << 14


def opened(
    base: Path, overlay: Overlay | Path | str, *, read_only: bool = False, durable: bool = False
) -> Backing:
    """The file with its layers, which is the caller's to close."""
    if not isinstance(overlay, Overlay):
        overlay = Overlay(str(overlay))
    backing = open_backing(str(base), True)
    try:
        lay_over(backing, overlay, open_backing, read_only=read_only, durable=durable)
    except BaseException:
        backing.close()
        raise
    return backing


class OverlaidDisk(Disk):
    """A disk over `base`, whose writes go to `overlay`, with a driver that may discard."""

    def __init__(self, base: Path, overlay: Overlay | Path | str, **options: Any) -> None:
        options.setdefault("features", FEATURES | F_DISCARD | F_WRITE_ZEROES)
        backing = opened(base, overlay, read_only=options.get("read_only", False))
        try:
            super().__init__(base, backing=backing, **options)
        finally:
            backing.close()

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """So many bytes of the disk, which are whole sectors; all of it without a size."""
        answer = self.request(IN, offset // SECTOR, room=self.device.size if size is None else size)
        assert answer.status == OK
        return answer.data

    def write(self, offset: int, data: bytes) -> int:
        """The status."""
        return self.request(OUT, offset // SECTOR, data=data).status

    def discard(self, offset: int, size: int) -> int:
        """The status."""
        return self._range(DISCARD, offset, size, 0)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> int:
        """The status."""
        return self._range(WRITE_ZEROES, offset, size, unmap)

    def flush(self) -> int:
        """The status."""
        return self.request(FLUSH).status

    def _range(self, kind: int, offset: int, size: int, flags: int) -> int:
        return self.request(kind, data=struct.pack("<QII", offset // SECTOR, size // SECTOR, flags)).status
