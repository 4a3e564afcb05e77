"""A device written in Python: whatever its queue holds, its code sees requests that make sense."""

from __future__ import annotations

import contextlib
import struct

import crackle.virtio.custom.base
from crackle.errors import StateError
from crackle.virtio.custom.device import PythonDevice, Request, RequestQueue
from support.driver import F_VERSION_1, Buffer
from targets.choices import Choices
from targets.device import DATA, HEADERS, SIZE, DeviceTarget, Station


class Echo(crackle.virtio.custom.base.VirtioDevice):
    """Gives back what it is sent, at once or later; some requests it never completes."""

    device_id = 42
    queue_sizes = (16, 64)
    config = bytes(range(64))
    writable_config = 32

    def __init__(self) -> None:
        self.kept: list[Request] = []
        self.mood = 0

    def handle_queue(self, index: int, queue: RequestQueue) -> None:
        for request in queue:
            assert request.readable <= 256 * SIZE
            if self.mood & 1:
                self.kept.append(request)
            else:
                self.answer(request)

    def answer(self, request: Request) -> None:
        data = b""
        if self.mood & 8:
            request.complete()
            return
        if self.mood & 2:
            data = request.read(min(request.readable, 7))
        if request.readable <= 1 << 16:
            data += request.read()
        request.write(data[: request.writable])
        if not self.mood & 4:
            request.complete()

    def finish(self) -> None:
        """Answer what was kept, though the driver may have reset the device since."""
        kept, self.kept = self.kept, []
        for request in kept:
            with contextlib.suppress(StateError):
                self.answer(request)

    def reset(self) -> None:
        pass

    def config_written(self) -> None:
        assert len(self.read_config()) == 64

    def save(self) -> bytes:
        return b"x" * len(self.kept)


class Python(DeviceTarget):
    """Its queues, as `crackle.virtio.custom.device` shows them to it."""

    def make(self, kind: int) -> PythonDevice:
        self.echo = Echo()
        return PythonDevice(self.memory, self.echo)

    def chain(self, choices: Choices, queue: int) -> list[Buffer]:
        buffers = []
        for _ in range(choices.below(8)):
            size = choices.nearly(choices.of((1, 16, 64, 600, 5000)), (0, SIZE, SIZE + 1)) % (1 << 32)
            buffers.append(Buffer(self.somewhere(choices, 16, size), size, bool(choices.byte() & 1)))
        return sorted(buffers, key=lambda buffer: buffer.writable) if choices.byte() < 0xF0 else buffers

    def outside(self, choices: Choices, station: Station) -> None:
        what = choices.byte() % 4
        if what == 0:
            self.echo.mood = choices.byte() & 15
        elif what == 1:
            self.echo.write_config(choices.below(60), bytes(choices.below(5)))
        else:
            self.echo.finish()

    def begin(self, kind: int, station: Station) -> None:
        self.echo.mood, self.echo.kept = 0, []

    def prove_alive(self, station: Station) -> None:
        self.begin(0, station)
        station.start(F_VERSION_1, 16)
        ring = station.rings[1]
        self.memory.write(HEADERS, struct.pack("<Q", 0x0123456789ABCDEF))
        ring.offer(ring.add([Buffer(HEADERS, 8), Buffer(DATA, 8, True)]))
        station.notify(1)
        station.await_used(ring)
        assert self.memory.read(DATA, 8) == self.memory.read(HEADERS, 8)
