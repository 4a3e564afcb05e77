"""A device, its driver and the outside world, as an input has them.

The device is served on the calling thread (`IoThread.step`), so that the same input does the same each time. It is
reset and used again from one input to the next; what an input must not do to it, whatever it holds, is checked after
each.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
import time
from collections.abc import Callable

from crackle.runtime.iothread import IoThread
from crackle.schema.rate_limiter import RateLimiter, TokenBucket
from crackle.virtio.device import VirtioDevice
from support import driver
from support.driver import F_EVENT_IDX, F_INDIRECT, F_VERSION_1, NEEDS_RESET, STATUS, Bench, Buffer, Ring
from support.fence import Fenced
from targets.choices import Choices

GPA, SIZE = 0x10000, 0x10000
"""The memory neither begins at address 0 nor ends where an address space does."""
END = GPA + SIZE
RINGS, TABLES, HEADERS, DATA = GPA, GPA + 0x4000, GPA + 0x5000, GPA + 0x6000
EDGES = (0, GPA - 16, GPA - 1, GPA, END - 17, END - 16, END - 1, END, 1 << 32, (1 << 64) - 1)
LENGTHS = (0, 1, 15, 16, 17, 511, 512, 4096, SIZE - 1, SIZE, SIZE + 1, 1 << 31, (1 << 32) - 1)
STEPS = 48
"""What an input may do, so that a long one is no slow one."""
NO_LIMIT = RateLimiter(bandwidth=TokenBucket(size=0, refill_time=0), ops=TokenBucket(size=0, refill_time=0))

_libc = ctypes.CDLL(None)


def fire(timer_fd: int) -> None:
    """Let a limiter's timer end now."""
    _libc.timerfd_settime(timer_fd, 0, struct.pack("<4q", 0, 0, 0, 1), None)


def descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def reap(ring: Ring) -> None:
    """Take back the descriptors of what was used, as far as what the ring says makes sense."""
    for _ in range(min(ring.size, (ring.used_idx - ring.next_used) & 0xFFFF)):
        place = ring.used + 4 + 8 * (ring.next_used % ring.size)
        head = int.from_bytes(ring.memory.read(place, 4), "little")
        ring.free[:0] = ring.chains.pop(head, ())
        ring.next_used = (ring.next_used + 1) & 0xFFFF


class Target:
    """What is fuzzed: `run` raises, or the process ends, when an input found something."""

    modules: tuple[str, ...] = ()
    """The modules whose coverage the target is measured by."""

    def run(self, data: bytes) -> None:
        raise NotImplementedError


class Station(Bench):
    """A device that is served by who calls, with a driver's hands on it."""

    def __init__(self, device: VirtioDevice) -> None:
        super().__init__(device, IoThread())
        self.rings: list[Ring] = []

    def start(self, features: int, size: int) -> None:
        """Initialise the device; its rings of `size` entries lie one after the other from RINGS on."""
        registers = self.registers
        self.rings = []
        registers.negotiate(features & self.device.device_features)
        for index in range(len(self.device.queues)):
            ring = Ring(self.memory, RINGS + index * 0x1000, size)
            self.rings.append(ring)
            registers.set_up_queue(index, ring)
        registers.drive()

    def settle(self, rounds: int = 8) -> None:
        """Serve what is ready; a guest that keeps its device busy is left alone after `rounds`."""
        for _ in range(rounds):
            if not self.io.step():
                break

    def await_used(self, ring: Ring) -> None:
        """Serve until the device has used something."""
        self.await_that(lambda: ring.used_idx != ring.next_used)

    def await_that(self, condition: Callable[[], bool]) -> None:
        """Serve until `condition` is there, for at most 5 seconds: the kernel may be asked first."""
        end = time.monotonic() + 5
        while not condition():
            assert self.io.step() or time.monotonic() < end, "the device does not answer"


class DeviceTarget(Target):
    """The script that every device is put through; subclasses add their own chains and events."""

    features: tuple[int, ...] = (0,)
    """The device's own, of which a driver negotiates one."""

    def __init__(self) -> None:
        self.fenced = Fenced(GPA, SIZE)
        self.memory = self.fenced.memory
        self.stations: dict[object, Station] = {}
        self.failures: list[object] = []
        sys.unraisablehook = self.failures.append
        threading.excepthook = self.failures.append

    # -- what a target is made of --------------------------------------------------------------------------------

    def make(self, kind: int) -> VirtioDevice:
        """A device; `kind`, up to `kinds`, says with which options."""
        raise NotImplementedError

    kinds = 1

    def chain(self, choices: Choices, queue: int) -> list[Buffer]:
        """A chain that queue `queue` might well be given, its contents written to memory."""
        raise NotImplementedError

    def outside(self, choices: Choices, station: Station) -> None:
        """Something happens on the host's side."""

    def begin(self, kind: int, station: Station) -> None:
        """Before an input: what the last one did outside is undone."""

    def prelude(self, stage: int, station: Station) -> None:
        """How far a driver in order has come before the input begins: 0, not at all, to 3."""

    def prove_alive(self, station: Station) -> None:
        """After a reset a driver that behaves is served."""
        raise NotImplementedError

    # -- the script ----------------------------------------------------------------------------------------------

    def station(self, kind: int) -> Station:
        if kind not in self.stations:
            self.stations[kind] = Station(self.make(kind))
            self.begin(kind, self.stations[kind])
            self.prove_alive(self.stations[kind])
        return self.stations[kind]

    def run(self, data: bytes) -> None:
        choices = Choices(data)
        setting = choices.byte()
        kind = setting % self.kinds
        station = self.station(kind)
        self.memory.write(GPA, bytes(SIZE))
        self.begin(kind, station)
        before = descriptors()
        self.free = HEADERS
        station.start(F_VERSION_1 | self.negotiated(choices), 1 << 1 + (setting >> 4) % 5)
        self.prelude(setting >> 1 & 3, station)
        if setting & 8:
            self.memory.track_dirty(True)
        for _ in range(STEPS):
            if not choices:
                break
            self.actions[choices.byte() % len(self.actions)](self, choices, station)
        for index in range(len(station.rings)):
            station.notify(index)
        station.settle()
        self.recover(station)
        self.memory.track_dirty(False)
        assert not self.failures, self.failures
        assert descriptors() <= before, "a descriptor was left open"

    def recover(self, station: Station) -> None:
        station.device.kick()  # a machine that was paused goes on before its guest does anything
        station.registers[STATUS] = 0
        self.memory.write(GPA, bytes(SIZE))
        for index in range(len(station.device.limiters)):
            station.device.update_limiter(index, NO_LIMIT)
        station.settle()
        assert self.memory.read(GPA, SIZE) == bytes(SIZE), "memory was written after the reset (2.4.1)"
        self.prove_alive(station)
        assert not station.registers[STATUS] & NEEDS_RESET, station.device.fault
        station.registers[STATUS] = 0

    def negotiated(self, choices: Choices) -> int:
        bits = choices.byte()
        features = F_EVENT_IDX * (bits & 1) | F_INDIRECT * (bits >> 1 & 1)
        return features | self.features[(bits >> 2) % len(self.features)]

    def place(self, size: int) -> int:
        """Where a header of `size` bytes may be."""
        if self.free + size > DATA:
            self.free = HEADERS
        gpa = self.free
        self.free += size
        return gpa

    def put(self, content: bytes) -> int:
        """Write a header; where."""
        gpa = self.place(len(content))
        self.memory.write(gpa, content)
        return gpa

    def somewhere(self, choices: Choices, step: int, size: int) -> int:
        """Where a buffer of `size` bytes may be: at the end of memory more often than chance would have it."""
        if choices.byte() & 7 == 7 and size <= SIZE:
            return END - size
        return choices.nearly(DATA + choices.below(256) * step, (*EDGES, HEADERS, RINGS)) % (1 << 64)

    def submit(self, choices: Choices, station: Station) -> None:
        index = choices.below(len(station.rings))
        ring = station.rings[index]
        reap(ring)
        buffers = self.chain(choices, index)
        shape = choices.byte()
        direct = None if shape < 0xA0 else shape % (len(buffers) + 1)
        needed = len(buffers) if direct is None else direct + 1
        if not buffers or needed > len(ring.free):
            return
        table = TABLES + choices.below(64) * 64
        head = ring.add(buffers, direct=direct, table=table)
        if shape & 1:
            self.corrupt(choices, ring, head)
        # The same chain many times over, which no driver in order does.
        ring.offer(*[head] * choices.of((1, 1, 1, 1, 1, 1, 2, 3, 8, 16)))
        if not shape & 2:
            station.notify(index)
            station.settle(2)

    def corrupt(self, choices: Choices, ring: Ring, head: int) -> None:
        """One field of a descriptor becomes another."""
        place = ring.desc + 16 * choices.of(ring.chains[head])
        gpa, size, flags, following = struct.unpack("<QIHH", self.memory.read(place, 16))
        field = choices.byte() % 4
        if field == 0:
            gpa = choices.nearly(choices.of(EDGES), EDGES)
        elif field == 1:
            size = choices.nearly(choices.of(LENGTHS), LENGTHS) & 0xFFFFFFFF
        elif field == 2:
            flags ^= 1 << choices.below(16)
        else:
            following = choices.nearly(choices.below(64)) & 0xFFFF
        self.memory.write(place, struct.pack("<QIHH", gpa & (1 << 64) - 1, size, flags, following))

    def notify(self, choices: Choices, station: Station) -> None:
        station.notify(choices.below(len(station.rings)))
        station.settle(1 + choices.below(4))

    def scribble(self, choices: Choices, station: Station) -> None:
        """Bytes anywhere, rings included."""
        data = choices.bytes(choices.below(64))
        gpa = GPA + choices.below(SIZE)
        self.memory.write(gpa, data[: END - gpa])

    def shift(self, choices: Choices, station: Station) -> None:
        """The available index, flags or the event index say something else."""
        ring = station.rings[choices.below(len(station.rings))]
        what = choices.byte() % 4
        if what == 0:
            ring.set_flags(choices.number(2))
        elif what == 1:
            ring.set_used_event(choices.number(2))
        elif what == 2:
            ring.offer(*[choices.below(64) for _ in range(choices.below(ring.size + 1))])
        else:
            ring.next_avail = choices.number(2)
            ring.offer()

    def access(self, choices: Choices, station: Station) -> None:
        """A register or the configuration space, of any width."""
        size = choices.of((4, 4, 1, 2, 4, 8))
        offset = choices.of(range(0, 0x110, 4)) if size == 4 else choices.below(0x1000 - size)
        if choices.byte() & 1:
            if offset == driver.STATUS:
                station.bus.write(Bench.ADDRESS + offset, size, choices.of((0, 1, 3, 11, 15, 64, 128, 255)))
            else:
                station.bus.write(Bench.ADDRESS + offset, size, choices.number(size))
        else:
            station.bus.read(Bench.ADDRESS + offset, size)

    def restart(self, choices: Choices, station: Station) -> None:
        station.start(F_VERSION_1 | self.negotiated(choices), 1 << choices.below(6))

    def limit(self, choices: Choices, station: Station) -> None:
        """A limiter's timer ends, or the limiter is changed."""
        if not (count := len(station.device.limiters)):
            return
        index = choices.below(count)
        if choices.byte() & 1:
            bucket = TokenBucket(
                size=choices.of((0, 1, 16, 600, 5000)),
                refill_time=choices.of((1, 1000, 1 << 20)),
                one_time_burst=choices.of((0, 1, 4096)),
            )
            given = choices.byte()
            station.device.update_limiter(
                index, RateLimiter(bandwidth=bucket if given & 1 else None, ops=bucket if given & 2 else None)
            )
        else:
            fire(station.device.limiters[index].timer_fd)
            station.settle(2)

    def happen(self, choices: Choices, station: Station) -> None:
        self.outside(choices, station)
        station.settle(2)

    def pause(self, choices: Choices, station: Station) -> None:
        """What a pause does, and a snapshot reads."""
        station.settle()
        station.device.drain()
        station.transport.save()
        station.device.save_own()
        station.device.counters()
        if choices.byte() & 1:
            station.device.kick()

    actions: tuple[Callable[[DeviceTarget, Choices, Station], None], ...] = (
        *(submit,) * 6,
        *(happen,) * 3,
        notify,
        notify,
        scribble,
        shift,
        access,
        restart,
        limit,
        limit,
        pause,
    )
