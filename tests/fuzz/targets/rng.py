"""The entropy device: buffers that overlap, are to be read or are none, and limits that change meanwhile."""

from __future__ import annotations

from crackle.virtio.rng.device import Rng
from support.driver import F_VERSION_1, Buffer
from targets.choices import Choices
from targets.device import DATA, RINGS, DeviceTarget, Station, fire


class Entropy(DeviceTarget):
    """Requests for random bytes."""

    def make(self, kind: int) -> Rng:
        return Rng(self.memory)

    def outside(self, choices: Choices, station: Station) -> None:
        fire(station.device.limiters[0].timer_fd)

    def chain(self, choices: Choices, queue: int) -> list[Buffer]:
        buffers = []
        for _ in range(1 + choices.below(4)):
            size = choices.nearly(choices.below(512), (0, 1, 4096, 0x8000, 0xFFFF)) % 0x10000
            buffers.append(Buffer(self.somewhere(choices, 128, size), size, not choices.rarely()))
        return buffers

    def prove_alive(self, station: Station) -> None:
        ring = station.begin(RINGS, 16, F_VERSION_1)
        ring.offer(ring.add([Buffer(DATA, 64, True)]))
        station.notify()
        station.await_used(ring)
        assert [written for _, written in ring.reap()] == [64]
        assert self.memory.read(DATA, 64) != bytes(64)
