"""Disks: requests that are nearly right, and files that fail."""

from __future__ import annotations

import os
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

from crackle.errors import ConfigError
from crackle.schema.drive import Overlay
from crackle.virtio.block.device import Block
from support.driver import F_VERSION_1, Buffer
from support.overlays import opened
from targets.choices import Choices
from targets.device import DATA, HEADERS, RINGS, DeviceTarget, Station, fire

SECTORS = 16
FLUSH, DISCARD, WRITE_ZEROES = 9, 13, 14


def in_memory() -> str | None:
    """Where a file is flushed at once, if there is such a place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Sync(DeviceTarget):
    """Requests served at once."""

    kinds = 4
    engine = "Sync"
    features = (
        0,
        1 << DISCARD | 1 << WRITE_ZEROES,
        1 << FLUSH,
        1 << DISCARD | 1 << WRITE_ZEROES | 1 << FLUSH,
    )

    def __init__(self) -> None:
        super().__init__()
        self.home = tempfile.TemporaryDirectory(prefix="crackle-fuzz-", dir=in_memory())
        self.disks = [os.path.join(self.home.name, name) for name in ("disk", "other")]
        self.begin(0, None)

    def make(self, kind: int) -> Block:
        self.begin(kind, None)
        return Block(
            self.memory,
            self.disks[0],
            read_only=bool(kind & 1),
            writeback=bool(kind & 2),
            engine=self.engine,
        )

    def begin(self, kind: int, station: Station | None) -> None:
        """The files as they were."""
        for path in self.disks:
            if not os.path.exists(path) or os.path.getsize(path) != SECTORS * 512:
                with open(path, "wb") as disk:
                    disk.truncate(SECTORS * 512)

    def outside(self, choices: Choices, station: Station) -> None:
        what = choices.byte() % 4
        if what == 0:
            with suppress(ConfigError):
                station.device.update(choices.of(self.disks))
        elif what == 1:
            # Shorter than the guest knows.
            os.truncate(choices.of(self.disks), choices.below(SECTORS * 512))
        else:
            fire(choices.of(station.device.limiters).timer_fd) if station.device.limiters else None

    def chain(self, choices: Choices, queue: int) -> list[Buffer]:
        kind = choices.nearly(choices.of((0, 1, 4, 8, 0, 1, 11, 13)))
        sector = choices.nearly(choices.below(SECTORS))
        head = self.put(struct.pack("<IIQ", kind & 0xFFFFFFFF, 0, sector & (1 << 64) - 1))
        writing = kind in (1, 11, 13)
        buffers = [Buffer(head, choices.nearly(16, range(64)) % 4096)]
        for _ in range(choices.below(6)):
            size = choices.nearly(512 * choices.below(9), (0, 1, 511, 513, 8, 16, 24)) % 0x10000
            gpa = self.somewhere(choices, 128, size)
            if kind in (11, 13):
                # Segments of discard and write-zeroes: sector, count, flags
                size = 16
                fields = choices.nearly(choices.below(SECTORS)), choices.nearly(choices.below(SECTORS))
                gpa = self.put(
                    struct.pack("<QII", fields[0], fields[1] & 0xFFFFFFFF, choices.nearly(0) & 0xFFFFFFFF)
                )
            buffers.append(Buffer(gpa, size, not writing))
        if not choices.rarely():
            buffers.append(Buffer(self.place(1), 1, True))
        return buffers

    def prove_alive(self, station: Station) -> None:
        ring = station.begin(RINGS, 16, F_VERSION_1)
        self.memory.write(HEADERS, (8).to_bytes(16, "little"))
        ring.offer(ring.add([Buffer(HEADERS, 16), Buffer(DATA, 21, True)]))
        station.notify()
        station.await_used(ring)
        assert [written for _, written in ring.reap()] == [21]
        assert self.memory.read(DATA + 20, 1) == b"\0"


class Async(Sync):
    """Requests that the kernel serves meanwhile."""

    engine = "Async"


class Overlaid(Sync):
    """Requests to a disk with an overlay, with either engine; what is flushed, and completed, goes by its map."""

    kinds = 8

    def make(self, kind: int) -> Block:
        self.begin(kind, None)
        backing = opened(Path(self.disks[0]), Overlay(memory=True))
        try:
            return Block(
                self.memory,
                self.disks[0],
                writeback=bool(kind & 2),
                engine="Async" if kind & 4 else "Sync",
                backing=backing,
            )
        finally:
            backing.close()

    def begin(self, kind: int, station: Station | None) -> None:
        """And a new overlay over the first."""
        super().begin(kind, station)
        if station is not None:
            self.lay(station, self.disks[0])

    def lay(self, station: Station, path: str) -> None:
        backing = opened(Path(path), Overlay(memory=True))
        try:
            station.device.update(path, backing)
        finally:
            backing.close()

    def outside(self, choices: Choices, station: Station) -> None:
        if choices.byte() % 4:
            super().outside(choices, station)
            return
        with suppress(ConfigError):
            self.lay(station, choices.of(self.disks))
