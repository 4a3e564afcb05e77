"""The balloon: lists of pages, statistics, hints and reports, and what an operator asks meanwhile."""

from __future__ import annotations

import struct
from contextlib import suppress

from crackle.errors import ConfigError
from crackle.virtio.balloon.device import Balloon
from support.driver import CONFIG, F_VERSION_1, Buffer
from targets.choices import Choices
from targets.device import DATA, END, GPA, RINGS, SIZE, DeviceTarget, Station, fire

STATS, ON_OOM, HINT, REPORT = (1 << bit for bit in (1, 2, 3, 5))
PAGE = 4096


class Memory(DeviceTarget):
    """Pages that come and go, of a device with all of its queues, or with some."""

    kinds = 4
    features = (STATS | HINT | REPORT, STATS, HINT, REPORT, 0, STATS | ON_OOM | HINT | REPORT)

    def make(self, kind: int) -> Balloon:
        return Balloon(
            self.memory,
            deflate_on_oom=bool(kind & 1),
            stats_interval_s=0 if kind & 2 else 3600,
            hinting=True,
            reporting=True,
        )

    def outside(self, choices: Choices, station: Station) -> None:
        balloon = station.device
        assert isinstance(balloon, Balloon)
        what = choices.byte() % 8
        with suppress(ConfigError):
            if what == 0:
                balloon.resize(choices.below(2))
            elif what == 1:
                balloon.poll_statistics(1 + choices.below(5000))
            elif what == 2:
                balloon.start_hinting(bool(choices.byte() & 1))
            elif what == 3:
                balloon.stop_hinting()
            elif what == 4:
                balloon.statistics()
                balloon.hinting_status()
            elif what == 5:
                balloon.restore_own(balloon.save_own())
            elif what == 6:
                station.registers[CONFIG + 4 * choices.below(4)] = choices.number(4)
            else:
                fire(balloon.timer_fd)

    def page(self, choices: Choices) -> int:
        """One beyond the rings, mostly."""
        number = choices.nearly((DATA >> 12) + choices.below((END - DATA) >> 12), (0, GPA >> 12, END >> 12))
        return number & 0xFFFFFFFF

    def chain(self, choices: Choices, queue: int) -> list[Buffer]:
        what = choices.nearly(queue, range(5)) % 5
        if what <= 1:
            numbers = [self.page(choices) for _ in range(choices.below(24))]
            content = struct.pack(f"<{len(numbers)}I", *numbers)
            return [Buffer(self.put(content), len(content) - choices.rarely() * (len(content) > 0))]
        if what == 2:
            content = b"".join(
                struct.pack("<HQ", choices.nearly(choices.below(16)) & 0xFFFF, choices.number(8))
                for _ in range(choices.below(17))
            )
            return [Buffer(self.put(content), choices.nearly(len(content)) % SIZE, choices.rarely())]
        buffers = []
        if choices.byte() & 1:
            command = choices.nearly(choices.of((2, 2, 3, 0, 1))) & 0xFFFFFFFF
            buffers.append(Buffer(self.put(struct.pack("<I", command)), choices.nearly(4) % SIZE))
        for _ in range(choices.below(4)):
            size = choices.nearly(PAGE * choices.below(8)) % SIZE
            buffers.append(Buffer(self.somewhere(choices, PAGE // 32, size), size, not choices.rarely()))
        return buffers

    def prove_alive(self, station: Station) -> None:
        rings = station.begin_queues([RINGS, RINGS + 0x1000], 16, F_VERSION_1)
        self.memory.write(DATA, struct.pack("<I", (DATA >> 12) + 1))
        self.memory.write(DATA + PAGE, b"x")
        for index, ring in enumerate(rings):
            ring.offer(ring.add([Buffer(DATA, 4)]))
            station.notify(index)
            station.await_used(ring)
        assert self.memory.read(DATA + PAGE, 1) == b"\0"
