"""A guest's drivers, as far as devices can tell: the driver's side of a split virtqueue in real guest memory
(virtio 1.2, section 2.7) and of the virtio-mmio registers behind a real bus (section 4.2).

Written from the specification and from nothing in the package: the two sides can only be wrong independently.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from crackle.kvm.bus import Bus
from crackle.kvm.line import Line
from crackle.memory import GuestMemory
from crackle.runtime.iothread import IoThread
from crackle.virtio.custom.device import PythonDevice
from crackle.virtio.device import VirtioDevice
from crackle.virtio.queue import Virtqueue
from crackle.virtio.state import MmioState, QueueState
from crackle.virtio.transport.mmio import MmioTransport

NEXT, WRITE, INDIRECT = 1, 2, 4  # descriptor flags
NO_INTERRUPT = 1  # avail.flags
NO_NOTIFY = 1  # used.flags

F_INDIRECT, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128

# Registers (4.2.2)
MAGIC, VERSION, DEVICE_ID, VENDOR_ID = 0x00, 0x04, 0x08, 0x0C
DEVICE_FEATURES, DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x10, 0x14, 0x20, 0x24
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x30, 0x34, 0x38, 0x44, 0x50
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x60, 0x64, 0x70
QUEUE_DESC, QUEUE_AVAIL, QUEUE_USED = 0x80, 0x90, 0xA0
SHM_LEN_LOW, CONFIG_GENERATION, CONFIG = 0xB0, 0xFC, 0x100


class Buffer(NamedTuple):
    """One element of a chain: where it is, and whether the device writes it."""

    gpa: int
    size: int
    writable: bool = False


def align(value: int, to: int) -> int:
    return (value + to - 1) // to * to


def ring_bytes(size: int) -> int:
    """Bytes that the three parts of a queue of `size` entries need, from a page boundary."""
    return align(align(16 * size + 6 + 2 * size, 4) + 6 + 8 * size, 4096)


class Ring:
    """The driver's side of a queue of `size` entries whose parts lie one after the other from `base`.

    `start`: the value from which both indices count, as after that many chains. The descriptors in use are
    the driver's business: `add` takes free ones, `reap` frees those of the chains that the device has used.
    """

    def __init__(self, memory: GuestMemory, base: int, size: int, start: int = 0) -> None:
        self.memory, self.size = memory, size
        self.desc = base
        self.avail = base + 16 * size
        self.used = align(self.avail + 6 + 2 * size, 4)
        self.next_avail = self.next_used = start & 0xFFFF
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        memory.write(self.avail, bytes(6 + 2 * size))
        memory.write(self.used, bytes(6 + 8 * size))
        self._write_idx()
        memory.write(self.used + 2, struct.pack("<H", self.next_used))

    def _write_idx(self) -> None:
        self.memory.write(self.avail + 2, struct.pack("<H", self.next_avail))

    def write_descriptor(
        self, index: int, gpa: int, size: int, flags: int, following: int, table: int = -1
    ) -> None:
        """Descriptor `index` of the queue's table, or of the one at `table`."""
        place = (self.desc if table < 0 else table) + 16 * index
        self.memory.write(place, struct.pack("<QIHH", gpa, size, flags, following))

    def add(self, buffers: Sequence[Buffer], *, direct: int | None = None, table: int = -1) -> int:
        """Make `buffers` a chain and return its head; the device sees it after `offer`.

        direct: how many of them take descriptors of the queue's own table; the others go into an indirect
        table that is written at `table`. None for all.
        """
        if direct is None:
            direct = len(buffers)
        indirect = direct < len(buffers)
        mine = [self.free.pop() for _ in range(direct + indirect)]
        for place, index in enumerate(mine):
            last = place == len(mine) - 1
            if last and indirect:
                rest = buffers[direct:]
                for i, (gpa, size, writable) in enumerate(rest):
                    more = i < len(rest) - 1
                    flags = (NEXT if more else 0) | (WRITE if writable else 0)
                    self.write_descriptor(i, gpa, size, flags, i + 1 if more else 0xDEAD, table)
                self.write_descriptor(index, table, 16 * len(rest), INDIRECT, 0xBEEF)
            else:
                gpa, size, writable = buffers[place]
                flags = (0 if last else NEXT) | (WRITE if writable else 0)
                self.write_descriptor(index, gpa, size, flags, 0xBEEF if last else mine[place + 1])
        self.chains[mine[0]] = mine
        return mine[0]

    def offer(self, *heads: int) -> None:
        """Make chains available, in this order, all at once."""
        for head in heads:
            place = self.avail + 4 + 2 * (self.next_avail % self.size)
            self.memory.write(place, struct.pack("<H", head))
            self.next_avail = (self.next_avail + 1) & 0xFFFF
        self._write_idx()

    def reap(self) -> list[tuple[int, int]]:
        """(head, bytes written) of the chains used since the last call, in the order of the ring."""
        (idx,) = struct.unpack("<H", self.memory.read(self.used + 2, 2))
        done = []
        while self.next_used != idx:
            place = self.used + 4 + 8 * (self.next_used % self.size)
            head, written = struct.unpack("<II", self.memory.read(place, 8))
            self.next_used = (self.next_used + 1) & 0xFFFF
            self.free[:0] = self.chains.pop(head)
            done.append((head, written))
        return done

    @property
    def used_idx(self) -> int:
        """What the device says it has used."""
        return int.from_bytes(self.memory.read(self.used + 2, 2), "little")

    def set_flags(self, flags: int) -> None:
        """avail.flags."""
        self.memory.write(self.avail, struct.pack("<H", flags))

    def set_used_event(self, value: int) -> None:
        """Ask to be interrupted when the chain with this used index is done (2.7.7.1)."""
        self.memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", value & 0xFFFF))

    @property
    def used_flags(self) -> int:
        """The device's flags, of which NO_NOTIFY is one (2.7.10); meaningful without an event index."""
        return int.from_bytes(self.memory.read(self.used, 2), "little")

    @property
    def avail_event(self) -> int:
        """The available index of which the device wants to be notified (2.7.10)."""
        return int.from_bytes(self.memory.read(self.used + 4 + 8 * self.size, 2), "little")


class Registers:
    """virtio-mmio registers at `address` of `bus`, as a vCPU reaches them."""

    def __init__(self, bus: Bus, address: int) -> None:
        self.bus, self.address = bus, address

    def __getitem__(self, offset: int) -> int:
        return self.bus.read(self.address + offset, 4)

    def __setitem__(self, offset: int, value: int) -> None:
        assert self.bus.write(self.address + offset, 4, value) == 0

    def offered(self) -> int:
        """All 64 feature bits of the device."""
        features = 0
        for half in (0, 1):
            self[DEVICE_FEATURES_SEL] = half
            features |= self[DEVICE_FEATURES] << 32 * half
        return features

    def negotiate(self, features: int) -> bool:
        """Reset, and go as far as FEATURES_OK (3.1.1, steps 1 to 6); whether the device kept that bit."""
        self[STATUS] = 0
        self[STATUS] = ACKNOWLEDGE
        self[STATUS] = ACKNOWLEDGE | DRIVER
        for half in (0, 1):
            self[DRIVER_FEATURES_SEL] = half
            self[DRIVER_FEATURES] = features >> 32 * half & 0xFFFFFFFF
        self[STATUS] = ACKNOWLEDGE | DRIVER | FEATURES_OK
        return bool(self[STATUS] & FEATURES_OK)

    def set_up_queue(self, index: int, ring: Ring) -> bool:
        """Tell the device where `ring` is (4.2.3.2); whether it took the queue."""
        self.place_queue(index, ring.size, ring.desc, ring.avail, ring.used)
        self[QUEUE_READY] = 1
        return self[QUEUE_READY] == 1

    def place_queue(self, index: int, size: int, desc: int, avail: int, used: int) -> None:
        """Size and addresses of a queue, not enabled yet."""
        self[QUEUE_SEL] = index
        self[QUEUE_NUM] = size
        for register, gpa in ((QUEUE_DESC, desc), (QUEUE_AVAIL, avail), (QUEUE_USED, used)):
            self[register] = gpa & 0xFFFFFFFF
            self[register + 4] = gpa >> 32

    def drive(self) -> None:
        """DRIVER_OK: the device is live."""
        self[STATUS] = self[STATUS] | DRIVER_OK


def queue_for(ring: Ring, *, event_idx: bool = False, indirect: bool = True) -> Virtqueue:
    """The device's queue over the driver's ring, enabled, from where the ring stands."""
    queue = Virtqueue(ring.memory, 256)
    state = QueueState(
        size=ring.size,
        ready=True,
        desc=ring.desc,
        avail=ring.avail,
        used=ring.used,
        next_avail=ring.next_avail,
        next_used=ring.next_used,
    )
    queue.restore(state, event_idx=event_idx, indirect=indirect)
    return queue


def through_a_file(state: MmioState) -> MmioState:
    """As a snapshot gives it back: what the device itself has saved has no type then."""
    return msgspec.json.decode(msgspec.json.encode(state), type=MmioState)


class Bench:
    """A device on a bus and an I/O thread, and the guest's hands on it. A context manager.

    io: a thread to share, which the caller starts; by default it has its own.
    """

    ADDRESS = 0xC0001000

    def __init__(self, device: VirtioDevice, io: IoThread | None = None) -> None:
        self.device, self.memory = device, device.memory
        self.bus = Bus("mmio")
        self.line = Line(5)
        self.transport = MmioTransport(device, self.ADDRESS, self.line)
        # As in a machine: handlers in Python have a thread with a stack for it.
        kind = "python" if isinstance(device, PythonDevice) else "io"
        self.io = IoThread(kind) if io is None else io
        self.transport.plug(self.bus, self.io)
        self.registers = Registers(self.bus, self.ADDRESS)
        if io is None:
            self.io.start()

    def begin(self, base: int, size: int, features: int = F_VERSION_1, *, drive: bool = True) -> Ring:
        """Take the device through its whole initialisation with one queue at `base`."""
        return self.begin_queues((base,), size, features, drive=drive)[0]

    def begin_queues(
        self, bases: Sequence[int], size: int, features: int = F_VERSION_1, *, drive: bool = True
    ) -> list[Ring]:
        """The same with a queue at each of `bases`."""
        rings = [Ring(self.memory, base, size) for base in bases]
        assert self.registers.negotiate(features)
        for index, ring in enumerate(rings):
            assert self.registers.set_up_queue(index, ring)
        if drive:
            self.registers.drive()
        return rings

    def notify(self, queue: int = 0) -> None:
        """What KVM does when the driver writes QueueNotify."""
        os.eventfd_write(self.device.notify_fds[queue], 1)

    def settle(self) -> None:
        """Wait until the device has served all it was notified of."""
        self.io.settle()
        self.io.pause()
        if not isinstance(
            self.device, PythonDevice
        ):  # where it is the beginning of a pause, and nothing is in flight
            self.device.drain()
        self.io.resume()

    def interrupts(self) -> int:
        """How many times the interrupt line was pulsed since the last call."""
        try:
            return os.eventfd_read(self.transport.irq_fd)
        except BlockingIOError:
            return 0

    def acknowledge(self) -> None:
        """What a driver does first when it is interrupted (4.2.2, InterruptACK)."""
        self.registers[INTERRUPT_ACK] = self.registers[INTERRUPT_STATUS]

    def close(self) -> None:
        self.io.close()
        self.device.close()
        self.transport.close()
        self.line.close()
        self.memory.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
