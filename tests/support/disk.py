"""A disk with a driver that has set it up, and requests to it (virtio 1.2, 5.2.6)."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crackle.memory import GuestMemory
from crackle.virtio.block.device import Block
from support.driver import F_INDIRECT, F_VERSION_1, Bench, Buffer

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNTOUCHED = 0x55
SECTOR, SECTORS, PAGE = 512, 64, 4096
RING, TABLE, ARENA = 0x1000, 0x8000, 0x10000
TABLE_OF_WRITES = 0x40000
LOW, HIGH = 1 << 20, 1 << 32
FEATURES = F_VERSION_1 | F_INDIRECT


class Answer(NamedTuple):
    """What came back of a request: its status byte, the device-writable bytes before it, and used.len."""

    status: int
    data: bytes
    written: int


class Disk(Bench):
    """A disk of 64 sectors of random bytes, with a driver that has set it up."""

    engine = "Sync"
    """What a test that says nothing gets; modules that hold for both set it."""

    def __init__(self, path: Path, *, features: int = FEATURES, **options: Any) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(os.urandom(SECTORS * SECTOR))
        options.setdefault("engine", self.engine)
        super().__init__(Block(GuestMemory([(0, LOW), (HIGH, LOW)]), str(path), **options))
        self.ring = self.begin(RING, 256, features)
        self.place = ARENA

    def buffers(self, size: int, cuts: Sequence[int], *, writable: bool, gap: int = 3) -> list[Buffer]:
        """`size` bytes in pieces cut at `cuts`, with a gap after each; in low and high memory in turn."""
        edges = [0, *sorted(cut % (size + 1) for cut in cuts), size]
        found = []
        for n, (begin, end) in enumerate(itertools.pairwise(edges)):
            gpa = self.place + (HIGH if n % 2 else 0)
            found.append(Buffer(gpa, end - begin, writable))
            self.place += end - begin + gap
            assert self.place < LOW
        return found

    def scatter(self, buffers: Sequence[Buffer], data: bytes) -> None:
        for gpa, size, _ in buffers:
            self.memory.write(gpa, data[:size])
            data = data[size:]

    def gather(self, buffers: Sequence[Buffer]) -> bytes:
        return b"".join(self.memory.read(gpa, size) for gpa, size, _ in buffers)

    def run(
        self, readable: Sequence[Buffer], writable: Sequence[Buffer], direct: int | None = None
    ) -> Answer:
        """Submit one chain, wait for it, and check that no byte changed around its writable buffers."""
        self.scatter(writable, bytes([UNTOUCHED]) * sum(size for _, size, _ in writable))
        image = [self.memory.read(0, LOW), self.memory.read(HIGH, LOW)]
        head = self.ring.add([*readable, *writable], direct=direct, table=TABLE)
        self.ring.offer(head)
        self.notify()
        self.settle()
        while not (done := self.ring.reap()):
            self.settle()  # it was only begun, and put back
        [(used, written)] = done
        assert used == head
        answer = self.gather(writable)
        for gpa, size, _ in writable:
            region, start = (1, gpa - HIGH) if gpa >= HIGH else (0, gpa)
            image[region] = (
                image[region][:start] + self.memory.read(gpa, size) + image[region][start + size :]
            )
        assert self.memory.read(ARENA, LOW - ARENA) == image[0][ARENA:]
        assert self.memory.read(HIGH, LOW) == image[1]
        return Answer(answer[-1] if answer else -1, answer[:-1], written)

    def request(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        room: int = 0,
        *,
        out_cuts: Sequence[int] = (16,),
        in_cuts: Sequence[int] | None = None,
        direct: int | None = None,
    ) -> Answer:
        """A request with `data` for the device and `room` bytes for its answer."""
        self.place = ARENA
        message = struct.pack("<IIQ", kind, 0, sector) + data
        readable = self.buffers(len(message), out_cuts, writable=False)
        self.scatter(readable, message)
        writable = self.buffers(room + 1, (room,) if in_cuts is None else in_cuts, writable=True)
        return self.run(readable, writable, direct)

    @property
    def contents(self) -> bytes:
        return self.path.read_bytes()


def submit_reads(disk: Disk, count: int) -> list[int]:
    """Offer `count` one-sector reads at once, sector i to page i; their heads."""
    disk.memory.write(ARENA, b"".join(struct.pack("<IIQ", IN, 0, i % SECTORS) for i in range(count)))
    heads = []
    for i in range(count):
        data = Buffer(HIGH + i * PAGE, SECTOR, True)
        heads.append(disk.ring.add([Buffer(ARENA + 16 * i, 16), data, Buffer(ARENA + PAGE + i, 1, True)]))
    disk.ring.offer(*heads)
    return heads


def submit_writes(disk: Disk, count: int, size: int = SECTOR, *, offer: bool = True) -> list[int]:
    """Make `count` writes of `size` bytes, the n-th of the byte n + 1 at that place of the disk; their heads."""
    heads = []
    for n in range(count):
        disk.memory.write(ARENA + 16 * n, struct.pack("<IIQ", OUT, 0, n * size // SECTOR))
        disk.memory.write(HIGH + n * size, bytes([n % 255 + 1]) * size)
        chain = [
            Buffer(ARENA + 16 * n, 16),
            Buffer(HIGH + n * size, size),
            Buffer(ARENA + 2 * PAGE + n, 1, True),
        ]
        heads.append(disk.ring.add(chain, direct=0, table=TABLE_OF_WRITES + 48 * n))
    if offer:
        disk.ring.offer(*heads)
    return heads
