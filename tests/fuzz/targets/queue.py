"""A virtqueue by itself, and a device's registers by themselves."""

from __future__ import annotations

import struct

from crackle.virtio.queue import Virtqueue
from crackle.virtio.state import QueueState
from support.driver import Bench
from support.fence import Fenced
from targets.block import Sync
from targets.choices import Choices
from targets.device import EDGES, END, GPA, LENGTHS, SIZE, DeviceTarget, Station, Target


class Queue(Target):
    """The parts of a queue anywhere in memory, also over each other, full of descriptors that are nearly right."""

    def __init__(self) -> None:
        self.fenced = Fenced(GPA, SIZE)
        self.memory = self.fenced.memory

    def run(self, data: bytes) -> None:
        choices = Choices(data)
        self.memory.write(GPA, bytes(SIZE))
        size = 1 << choices.below(9)
        bits = choices.byte()
        desc, avail, used = GPA, GPA + 0x1000, GPA + 0x2000
        if bits & 4:
            desc, avail, used = (GPA + choices.number(2) & ~15 for _ in range(3))
        parts = {"desc": choices.nearly(desc, EDGES), "avail": avail, "used": choices.nearly(used, EDGES)}
        start = choices.nearly(0) & 0xFFFF
        queue = Virtqueue(self.memory, 256)
        state = QueueState(size=size, ready=True, next_avail=start, next_used=start, **parts)
        try:
            queue.restore(state, event_idx=bool(bits & 1), indirect=bool(bits & 2))
        except ValueError:
            assert any(gpa < GPA or gpa + 16 * size + 6 > END or gpa & 15 for gpa in parts.values())
            return
        for _ in range(16):
            if not choices:
                break
            self.fill(choices, size, parts["desc"], avail)
            ahead = choices.nearly(1 + choices.below(size)) & 0xFFFF
            self.memory.write(avail + 2, struct.pack("<H", (queue.save().next_avail + ahead) & 0xFFFF))
            self.drain(queue)

    def fill(self, choices: Choices, size: int, desc: int, avail: int) -> None:
        """A few descriptors, of the table or of an indirect one, and the heads that are offered."""
        tables = (desc, GPA + 0x4000, END - 64, END - 16)
        for _ in range(choices.below(12)):
            place = choices.of(tables) + 16 * choices.below(16)
            gpa = choices.nearly(GPA + choices.number(2), EDGES)
            length = choices.nearly(choices.below(64), LENGTHS) & 0xFFFFFFFF
            flags = choices.of((0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 0xFFFF))
            if flags & 4:
                gpa, length = choices.nearly(choices.of(tables)), choices.nearly(16 * choices.below(20))
            following = choices.nearly(choices.below(16)) & 0xFFFF
            if GPA <= place <= END - 16:
                raw = struct.pack("<QIHH", gpa & (1 << 64) - 1, length & 0xFFFFFFFF, flags, following)
                self.memory.write(place, raw)
        for slot in range(choices.below(8)):
            head = choices.nearly(choices.below(16)) & 0xFFFF
            self.memory.write(avail + 4 + 2 * (slot % size), struct.pack("<H", head))

    def drain(self, queue: Virtqueue) -> None:
        """Take and give back what there is, and check each chain."""
        for _ in range(64):
            try:
                found = queue.take()
            except ValueError:
                break
            if found is None:
                break
            head, buffers = found
            assert len(buffers) <= queue.size
            assert sorted(buffers, key=lambda buffer: buffer[2]) == buffers
            for gpa, length, _ in buffers:
                assert length > 0
                assert GPA <= gpa < gpa + length <= END
            queue.give(head, len(buffers))


class Mmio(Sync):
    """Only registers and configuration space, of any width, in any order, before and after the device lives."""

    def access_queue(self, choices: Choices, station: Station) -> None:
        """A queue is set up nearly as it should be."""
        station.registers.place_queue(
            choices.nearly(0) & 0xFFFFFFFF,
            choices.nearly(1 << choices.below(9)) & 0xFFFFFFFF,
            *(choices.nearly(GPA + 0x1000 * i, EDGES) & (1 << 64) - 1 for i in range(3)),
        )
        station.bus.write(Bench.ADDRESS + 0x44, 4, choices.byte() & 1)

    def negotiate(self, choices: Choices, station: Station) -> None:
        station.registers.negotiate(choices.nearly(station.registers.offered()) & (1 << 64) - 1)

    actions = (
        *(DeviceTarget.access,) * 6,
        access_queue,
        access_queue,
        negotiate,
        DeviceTarget.submit,
        DeviceTarget.notify,
        DeviceTarget.pause,
    )
