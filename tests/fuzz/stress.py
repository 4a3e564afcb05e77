"""Threads against each other, for so many seconds: what the tests run shortly, and `make fuzz` for long.

    python tests/fuzz/stress.py device {Sync,Async,net} SECONDS [SEED]
    python tests/fuzz/stress.py pause {exits,hammer,idle} SECONDS
    python tests/fuzz/stress.py bus SECONDS

`device`: a driver that resets, notifies and fills its rings with garbage, a host that changes files and limits, and
somebody who pauses, at once, on one device. `pause`: of a guest that exits all the time, while others look at it.
`bus`: devices that come and go while vCPUs look. Prints what was done; ends with status 1 when a thread hangs. Under
ThreadSanitizer (`tsan.py`) the core is to have no race but with the guest, whose memory is everybody's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from crackle.errors import CrackleError  # noqa: E402
from crackle.kvm.bus import Bus  # noqa: E402
from crackle.memory import GuestMemory  # noqa: E402
from crackle.schema.rate_limiter import RateLimiter, TokenBucket  # noqa: E402
from crackle.virtio.block.device import Block  # noqa: E402
from crackle.virtio.net.device import Net  # noqa: E402
from support.driver import (  # noqa: E402
    F_EVENT_IDX,
    F_INDIRECT,
    F_VERSION_1,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    NEEDS_RESET,
    NEXT,
    STATUS,
    WRITE,
    Bench,
    Ring,
)

F_FLUSH, F_DISCARD, F_WRITE_ZEROES, F_MRG_RXBUF = 1 << 9, 1 << 13, 1 << 14, 1 << 15
SIZE = 256
LOW, HIGH = 0x20000, 0x300000  # where buffers lie
PATIENCE = 30.0


class Stress:
    """Functions that are called again and again, each on a thread of its own, until the time is over."""

    def __init__(self, seconds: float) -> None:
        self.counts: Counter[str] = Counter()
        self._end = time.monotonic() + seconds
        self._threads: list[threading.Thread] = []

    def go_on(self) -> bool:
        return time.monotonic() < self._end

    def add(self, call: Callable[[], object], rest: float = 0.0) -> None:
        """Call it until the end, and rest up to so many seconds in between."""
        chance = random.Random(len(self._threads))

        def run() -> None:
            while self.go_on():
                call()
                if rest:
                    time.sleep(chance.random() * rest)

        self._threads.append(threading.Thread(target=run, daemon=True))

    def run(self) -> int:
        """0, or 1 when a thread has not come back."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join(max(self._end - time.monotonic(), 0.0) + PATIENCE)
        hung = sum(thread.is_alive() for thread in self._threads)
        print(dict(self.counts), f"{hung} of {len(self._threads)} threads hang" if hung else "", flush=True)
        return int(hung > 0)


class Device:
    """A device, and what a driver, a host and a pauser do to it."""

    features = 0
    bases: tuple[int, ...] = (0x1000,)

    def __init__(self, stress: Stress, seed: int) -> None:
        self.memory = GuestMemory([(0, 4 << 20), (1 << 32, 1 << 20)])
        self.stress, self.chance = stress, random.Random(seed)
        self.bench = Bench(self.make())
        self.device = self.bench.device
        stress.add(self.drive)
        stress.add(self.change, 0.002)
        stress.add(self.pause, 0.05)

    def make(self) -> Block | Net:
        raise NotImplementedError

    def buffer(self, queue: int, place: int, last: int, slot: int) -> tuple[int, int, bool]:
        """(gpa, size, device-writable) of a chain's element."""
        raise NotImplementedError

    def change(self) -> None:
        """What the host may do at any time."""
        raise NotImplementedError

    def chain(self, queue: int, slot: int) -> int:
        chance = self.chance
        indices = [chance.randrange(SIZE) for _ in range(chance.randrange(1, 6))]
        last = len(indices) - 1
        for place, index in enumerate(indices):
            gpa, size, writable = self.buffer(queue, place, last, slot)
            flags = (NEXT if place < last else 0) | (WRITE if writable else 0)
            if chance.random() < 0.002:
                flags, size, gpa = chance.randrange(8), chance.randrange(1 << 32), chance.randrange(1 << 33)
            following = indices[place + 1] if place < last else 0
            self.memory.write(
                self.bases[queue] + 16 * index, struct.pack("<QIHH", gpa, size, flags, following)
            )
        self.stress.counts["chains"] += 1
        return indices[0]

    def drive(self) -> None:
        """One life of a driver, from reset to reset."""
        chance, registers = self.chance, self.bench.registers
        rings = [Ring(self.memory, base, SIZE) for base in self.bases]
        features = F_INDIRECT | F_EVENT_IDX | self.features if chance.random() < 0.9 else 0
        if not registers.negotiate(F_VERSION_1 | features):
            return
        for index, ring in enumerate(rings):
            registers.set_up_queue(index, ring)
        registers.drive()
        self.stress.counts["resets"] += 1
        for _ in range(chance.randrange(1, 60)):
            for queue, ring in enumerate(rings):
                ring.offer(*(self.chain(queue, slot) for slot in range(chance.randrange(1, 30))))
                if chance.random() < 0.1:
                    self.memory.write(ring.avail, bytes(2))
                self.bench.notify(queue)
            registers[INTERRUPT_ACK] = registers[INTERRUPT_STATUS]
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.002)
            if registers[STATUS] & NEEDS_RESET or not self.stress.go_on():
                break

    def pause(self) -> None:
        self.bench.io.pause()
        assert self.device.drain()
        self.bench.io.resume()
        self.device.kick()
        self.stress.counts["pauses"] += 1


class Disk(Device):
    """A block device whose file is another one from time to time."""

    features = F_FLUSH | F_DISCARD | F_WRITE_ZEROES

    def __init__(self, stress: Stress, seed: int, engine: str, scratch: Path) -> None:
        self.engine = engine
        self.files = [scratch / "one", scratch / "other"]
        for path in self.files:
            path.write_bytes(os.urandom(1 << 20))
        super().__init__(stress, seed)

    def make(self) -> Block:
        return Block(
            self.memory, str(self.files[0]), engine=self.engine, writeback=True, limiter=limits(ops=1000)
        )

    def buffer(self, _queue: int, place: int, last: int, slot: int) -> tuple[int, int, bool]:
        chance = self.chance
        if place == last:
            return 0x18000 + slot, 1, True
        if place:
            return (
                chance.randrange(LOW, HIGH) & ~511,
                chance.choice((512, 4096, 65536)),
                chance.random() < 0.5,
            )
        kind = chance.choice((0, 0, 1, 1, 4, 8, 11, 13))
        self.memory.write(0x10000 + 64 * slot, struct.pack("<IIQ", kind, 0, chance.randrange(2048)))
        return 0x10000 + 64 * slot, 16, False

    def change(self) -> None:
        assert isinstance(self.device, Block)
        self.stress.counts["changes"] += 1
        if random.random() < 0.2:
            self.device.update(str(random.choice(self.files)))
        else:
            self.device.update_limiter(
                0, limits(random.choice((0, 10, 100_000)), random.choice((0, 1 << 20)))
            )


class Interface(Device):
    """A network device between two socket pairs, a TAP's and a wire's."""

    features = F_MRG_RXBUF
    bases = (0x1000, 0x8000)

    def make(self) -> Net:
        pairs = [
            socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) for _ in range(2)
        ]
        self.ends = [theirs for _, theirs in pairs]
        for end in self.ends:
            end.setblocking(False)
        tap, wire = (ours.detach() for ours, _ in pairs)
        net = Net(self.memory, tap, mac=b"\x02\0\0\0\0\1", drop_spoofed=True)
        net.detour(wire, bytes((169, 254, 169, 254)))
        return net

    def buffer(self, queue: int, _place: int, _last: int, _slot: int) -> tuple[int, int, bool]:
        return self.chance.randrange(LOW, HIGH), self.chance.choice((60, 1514, 2000, 12, 65562)), queue == 0

    def change(self) -> None:
        self.stress.counts["changes"] += 1
        for end in self.ends:
            with contextlib.suppress(BlockingIOError):
                end.send(bytes(12) + os.urandom(random.choice((60, 1514, 9000, 65000))))
            with contextlib.suppress(BlockingIOError):
                while True:
                    end.recv(70_000)
        self.device.update_limiter(random.randrange(2), limits(random.choice((0, 5, 100_000))))


def limits(ops: int, size: int = 0) -> RateLimiter:
    return RateLimiter(
        ops=TokenBucket(size=ops, refill_time=1), bandwidth=TokenBucket(size=size, refill_time=1)
    )


def device(kind: str, seconds: float, seed: int) -> int:
    stress = Stress(seconds)
    with tempfile.TemporaryDirectory(prefix="crackle-stress-") as scratch:
        made = Interface(stress, seed) if kind == "net" else Disk(stress, seed, kind, Path(scratch))
        status = stress.run()
        if not status:
            made.bench.close()
    return status


def pause(guest: str, seconds: float) -> int:
    from crackle import MicroVM

    stress = Stress(seconds)
    kernel = ROOT / "build" / "guest" / "bare" / f"{guest}.elf"
    with MicroVM(
        kernel, boot_args="tick=1000 beats=1 kinds=in,mmio n=100 slices=1000000000", memory=64
    ) as vm:
        machine = vm._machine()

        def stop_and_go() -> None:
            try:
                vm.pause()
                machine.vcpus[0].get_regs()
                vm.resume()
            except CrackleError as error:
                if vm.exit_status is None:
                    raise
                stress.counts[f"ended: {error}"] += 1
                time.sleep(seconds)
            stress.counts["pauses"] += 1

        stress.add(stop_and_go)
        stress.add(lambda: (machine.metrics(), [vcpu.status for vcpu in machine.vcpus]), 0.002)
        return stress.run()


def bus(seconds: float) -> int:
    stress, pio = Stress(seconds), Bus("pio")
    bases = (0x100, 0x200, 0x300)

    class Port:
        def __init__(self, value: int) -> None:
            self.value = value

        def read(self, _offset: int, _size: int) -> int:
            return self.value

    def change() -> None:
        for base in bases:
            pio.attach_python(base, 8, Port(base >> 8))
        for base in bases:
            pio.detach(base)
        stress.counts["changes"] += 1

    def look(base: int) -> None:
        assert pio.read(base, 1) in (0, base >> 8)
        stress.counts["looks"] += 1

    stress.add(change)
    for base in bases:
        stress.add(lambda base=base: look(base))  # type: ignore[misc]
    return stress.run()


def main() -> int:
    parser = argparse.ArgumentParser(description="Threads against each other.")
    parser.add_argument("what", choices=("device", "pause", "bus"))
    parser.add_argument("arguments", nargs="+")
    given = parser.parse_args()
    if given.what == "device":
        kind, seconds, *seed = given.arguments
        return device(kind, float(seconds), int(seed[0]) if seed else 1)
    if given.what == "pause":
        return pause(given.arguments[0], float(given.arguments[1]))
    return bus(float(given.arguments[0]))


if __name__ == "__main__":
    sys.exit(main())
