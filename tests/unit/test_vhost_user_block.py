"""vhost-user-block against QEMU's storage daemon, with this process as the guest."""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError, StateError
from crackle.memory import GuestMemory
from crackle.virtio.block.device import Block
from crackle.virtio.vhost_user.block import VhostUserBlock, connect
from support.driver import (
    CONFIG,
    CONFIG_GENERATION,
    DRIVER_OK,
    F_EVENT_IDX,
    F_INDIRECT,
    F_VERSION_1,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    NEEDS_RESET,
    STATUS,
    Bench,
    Buffer,
    Ring,
    through_a_file,
)
from support.vhost_user import (
    DAEMON,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    Impostor,
    Relay,
    StorageDaemon,
    config_space,
)

MIB = 1 << 20
RING, HEADERS, DATA = 0x10000, 0x20000, 0x100000
READ, WRITE, FLUSH = 0, 1, 4
VRING, CHANGED = 1, 2

needs_daemon = pytest.mark.skipif(DAEMON is None, reason="no qemu-storage-daemon")


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(0, 4 * MIB), (64 * MIB, 4 * MIB)], backing="memfd") as memory:
        yield memory


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., StorageDaemon]]:
    running: list[StorageDaemon] = []

    def start(content: bytes, **options: bool) -> StorageDaemon:
        image = tmp_path / f"image{len(running)}"
        image.write_bytes(content)
        running.append(StorageDaemon(image, tmp_path, **options))
        return running[-1]

    yield start
    for each in running:
        each.close()


class Guest:
    """A driver of a virtio disk that waits for interrupts, not for the I/O thread."""

    def __init__(self, bench: Bench, base: int = RING, features: int = F_VERSION_1) -> None:
        self.bench, self.memory = bench, bench.memory
        self.ring = bench.begin(base, 64, features)

    def submit(self, kind: int, sector: int, size: int, place: int = DATA) -> int:
        header = HEADERS + 64 * len(self.ring.chains)
        self.memory.write(header, struct.pack("<IIQ", kind, 0, sector) + b"\xff")
        data = [Buffer(place, size, kind == READ)] if size else []
        head = self.ring.add([Buffer(header, 16), *data, Buffer(header + 16, 1, True)])
        self.ring.offer(head)
        self.bench.notify()
        return header + 16

    def wait(self, count: int = 1) -> None:
        """Until so many requests are done."""
        done: list[tuple[int, int]] = []
        deadline = time.monotonic() + 20
        while len(done) < count:
            assert time.monotonic() < deadline, "the back end does not answer"
            select.select([self.bench.transport.irq_fd], [], [], 0.1)
            self.bench.interrupts()
            done += self.ring.reap()

    def request(self, kind: int, sector: int = 0, size: int = 0, place: int = DATA) -> int:
        """The status of a request."""
        status = self.submit(kind, sector, size, place)
        self.wait()
        return self.memory.read(status, 1)[0]


@needs_daemon
@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_INDIRECT | F_EVENT_IDX])
def test_data_go_both_ways_through_the_other_process(
    memory: GuestMemory, daemon: Callable[..., StorageDaemon], features: int
) -> None:
    content = os.urandom(MIB)
    backend = daemon(content)
    with Bench(VhostUserBlock(memory, str(backend.socket))) as bench:
        guest = Guest(bench, features=F_VERSION_1 | features)
        assert bench.registers[STATUS] & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
        assert guest.request(READ, 8, 65536) == 0
        assert memory.read(DATA, 65536) == content[4096 : 4096 + 65536]
        # Every region is shared, not only the first.
        written = os.urandom(4096)
        memory.write(65 * MIB, written)
        assert guest.request(WRITE, 100, 4096, 65 * MIB) == 0
        assert backend.image.read_bytes()[51200 : 51200 + 4096] == written


@needs_daemon
def test_many_requests_at_once_are_all_done(
    memory: GuestMemory, daemon: Callable[..., StorageDaemon]
) -> None:
    content = os.urandom(MIB)
    backend = daemon(content)
    with Bench(VhostUserBlock(memory, str(backend.socket))) as bench:
        guest = Guest(bench)
        for number in range(20):
            guest.submit(READ, 64 * number, 4096, DATA + 4096 * number)
        guest.wait(20)
        for number in range(20):
            assert memory.read(DATA + 4096 * number, 4096) == content[32768 * number :][:4096]


@needs_daemon
def test_the_disk_works_again_after_a_reset(
    memory: GuestMemory, daemon: Callable[..., StorageDaemon]
) -> None:
    content = os.urandom(MIB)
    backend = daemon(content)
    with Bench(VhostUserBlock(memory, str(backend.socket))) as bench:
        for base in (RING, RING + 0x4000, RING):
            guest = Guest(bench, base)
            for sector in range(3):
                assert guest.request(READ, sector, 512) == 0
                assert memory.read(DATA, 512) == content[512 * sector :][:512]
        bench.registers[STATUS] = 0
        assert not bench.device.started


@needs_daemon
def test_a_new_size_is_read_and_told_on_request(
    memory: GuestMemory, daemon: Callable[..., StorageDaemon]
) -> None:
    backend = daemon(bytes(MIB))
    with Relay(backend) as relay, Bench(VhostUserBlock(memory, str(relay.socket))) as bench:
        guest = Guest(bench)
        assert bench.registers[CONFIG] == MIB // 512
        generation = bench.registers[CONFIG_GENERATION]
        backend.resize(3 * MIB)
        assert bench.registers[CONFIG] == MIB // 512
        bench.device.update()
        assert bench.registers[CONFIG] == 3 * MIB // 512
        assert bench.registers[CONFIG_GENERATION] != generation
        assert bench.interrupts()
        assert bench.registers[INTERRUPT_STATUS] & CHANGED
        bench.registers[INTERRUPT_ACK] = CHANGED
        assert bench.registers[INTERRUPT_STATUS] == VRING
        assert guest.request(READ, 2 * MIB // 512, 512) == 0
        assert bench.device.counters()["config_change_time_us"] > 0


@needs_daemon
def test_a_back_end_that_allows_no_writing_makes_a_read_only_disk(
    memory: GuestMemory, daemon: Callable[..., StorageDaemon]
) -> None:
    backend = daemon(bytes(MIB), writable=False)
    with Bench(VhostUserBlock(memory, str(backend.socket))) as bench:
        assert bench.device.read_only
        assert bench.registers.offered() & F_RO
        guest = Guest(bench, features=F_VERSION_1 | F_RO)
        assert guest.request(WRITE, 0, 512) == 1
    with Bench(VhostUserBlock(GuestMemory([(0, MIB)]), str(daemon(bytes(MIB)).socket))) as bench:
        assert not bench.registers.offered() & F_RO


@needs_daemon
def test_flush_is_offered_with_writeback_only(
    memory: GuestMemory, daemon: Callable[..., StorageDaemon]
) -> None:
    with Bench(VhostUserBlock(memory, str(daemon(bytes(MIB)).socket), writeback=True)) as bench:
        assert bench.registers.offered() & F_FLUSH
        assert Guest(bench, features=F_VERSION_1 | F_FLUSH).request(FLUSH) == 0
    with Bench(VhostUserBlock(GuestMemory([(0, MIB)]), str(daemon(bytes(MIB)).socket))) as bench:
        assert not bench.registers.offered() & F_FLUSH


@needs_daemon
def test_a_killed_back_end_breaks_its_own_disk_and_nothing_else(
    memory: GuestMemory, daemon: Callable[..., StorageDaemon]
) -> None:
    backend = daemon(bytes(MIB))
    with Bench(VhostUserBlock(memory, str(backend.socket))) as bench:
        guest = Guest(bench)
        assert guest.request(READ, 0, 512) == 0
        backend.kill()
        wait_for(lambda: bench.registers[STATUS] & NEEDS_RESET)
        assert bench.device.lost
        assert bench.interrupts()
        guest.submit(READ, 0, 512)
        bench.settle()
        before = bench.io.wakeups
        time.sleep(0.2)
        assert bench.io.wakeups - before <= 1
        with pytest.raises(ConfigError, match="hung up"):
            bench.device.update()
        bench.registers[STATUS] = 0
        bench.begin(RING, 64)
        assert bench.registers[STATUS] & NEEDS_RESET
        assert bench.device.counters()["activate_fails"] == 1
        assert "hung up" in bench.device.fault


@needs_daemon
def test_a_saved_disk_goes_on_with_another_back_end(
    memory: GuestMemory, daemon: Callable[..., StorageDaemon]
) -> None:
    content = os.urandom(MIB)
    backend = daemon(content)
    with Bench(VhostUserBlock(memory, str(backend.socket))) as bench:
        guest = Guest(bench, features=F_VERSION_1 | F_EVENT_IDX)
        for sector in range(5):
            assert guest.request(READ, sector, 512) == 0
        guest.submit(READ, 7, 512)
        bench.io.pause()
        bench.device.drain()
        state = bench.transport.save()
        assert state.device.queues[0].next_avail == state.device.queues[0].next_used == 6
        bench.io.resume()
        backend.kill()
        second = daemon(content + bytes(MIB))
        with Bench(VhostUserBlock(memory, str(second.socket))) as restored:
            restored.transport.restore(through_a_file(state))
            # The first back end's answer, and an interrupt in any case.
            assert restored.interrupts()
            assert [written for _, written in guest.ring.reap()] == [513]
            assert restored.registers[INTERRUPT_STATUS] & CHANGED, "the new back end's disk is larger"
            guest.bench = restored
            assert guest.request(READ, 9, 512) == 0
            assert memory.read(DATA, 512) == content[9 * 512 :][:512]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# -- with a back end that does as it is told -----------------------------------------------------------------------


def test_the_guest_sees_one_queue_and_no_feature_that_needs_this_process(
    memory: GuestMemory, impostor: Callable[..., Impostor]
) -> None:
    with Bench(VhostUserBlock(memory, impostor().path)) as bench:
        offered = bench.registers.offered()
        assert offered & F_SEG_MAX
        assert not offered & F_MQ
        assert bench.device.size == 2048 * 512
        assert bench.bus.read(bench.ADDRESS + CONFIG + 34, 2) == 1


def test_features_that_the_back_end_lacks_are_not_offered(
    memory: GuestMemory, impostor: Callable[..., Impostor]
) -> None:
    backend = impostor(features=F_VERSION_1 | 1 << 30)
    with Bench(VhostUserBlock(memory, backend.path)) as bench:
        assert bench.registers.offered() == F_VERSION_1


def test_the_back_end_is_given_memory_ring_and_eventfds(
    memory: GuestMemory, impostor: Callable[..., Impostor]
) -> None:
    backend = impostor()
    with Bench(VhostUserBlock(memory, backend.path)) as bench:
        assert "SET_MEM_TABLE" not in backend.names()
        ring = bench.begin(RING, 64)
        told = dict(backend.told)
        first, second = memory.regions
        assert told["SET_MEM_TABLE"] == struct.pack("=II", 2, 0) + b"".join(
            struct.pack("=QQQQ", r.gpa, r.size, r.hva, r.offset) for r in (first, second)
        )
        assert told["SET_VRING_NUM"] == struct.pack("=II", 0, 64)
        assert told["SET_VRING_ADDR"] == struct.pack(
            "=IIQQQQ", 0, 0, first.hva + ring.desc, first.hva + ring.used, first.hva + ring.avail, 0
        )
        assert told["SET_VRING_BASE"] == bytes(8)
        assert told["SET_VRING_ENABLE"] == struct.pack("=II", 0, 1)
        assert told["SET_FEATURES"] == struct.pack("=Q", F_VERSION_1 | 1 << 30)
        fds = dict(backend.fds)
        assert os.fstat(fds["SET_MEM_TABLE"]).st_size == memory.size
        # The driver's notifications reach the back end, and its interrupts the guest.
        assert os.eventfd_read(fds["SET_VRING_KICK"]) == 1
        bench.notify()
        assert os.eventfd_read(fds["SET_VRING_KICK"]) == 1
        os.eventfd_write(fds["SET_VRING_CALL"], 1)
        assert bench.interrupts() == 1
        assert bench.registers[INTERRUPT_STATUS] == VRING
        bench.registers[STATUS] = 0
        assert backend.names()[-1] == "GET_VRING_BASE"


def test_only_devices_of_other_processes_always_claim_their_interrupts(
    memory: GuestMemory, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    with Bench(Block(memory, str(path))) as bench:
        assert bench.registers[INTERRUPT_STATUS] == 0


def test_memory_that_is_not_shared_is_said_so(impostor: Callable[..., Impostor]) -> None:
    with Bench(VhostUserBlock(GuestMemory([(0, MIB)]), impostor().path)) as bench:
        bench.begin(RING, 64)
        assert bench.registers[STATUS] & NEEDS_RESET
        assert "not shared" in bench.device.fault
        assert bench.device.activate_fails == 1


@pytest.mark.parametrize("message", ["SET_FEATURES", "SET_MEM_TABLE", "SET_VRING_KICK", "SET_VRING_ENABLE"])
@pytest.mark.parametrize("how", ["hangs up", "refuses"])
def test_a_back_end_that_fails_when_it_is_to_start_leaves_a_device_to_reset(
    memory: GuestMemory, impostor: Callable[..., Impostor], message: str, how: str
) -> None:
    number = {"SET_FEATURES": 2, "SET_MEM_TABLE": 5, "SET_VRING_KICK": 12, "SET_VRING_ENABLE": 18}[message]
    refusal = struct.pack("=IIIQ", number, 5, 8, 22)
    backend = impostor(answers={message: refusal if how == "refuses" else None})
    with Bench(VhostUserBlock(memory, backend.path)) as bench:
        bench.begin(RING, 64)
        assert bench.registers[STATUS] & NEEDS_RESET
        assert message in bench.device.fault
        bench.registers[STATUS] = 0
        bench.begin(RING, 64)
        assert bench.device.activate_fails == 2


def test_a_back_end_that_is_silent_at_the_end_keeps_nobody_for_long(
    memory: GuestMemory, impostor: Callable[..., Impostor]
) -> None:
    backend = impostor(silent={"GET_VRING_BASE"})
    from crackle.virtio.vhost_user.block import NEEDED, WANTED
    from crackle.virtio.vhost_user.protocol import VhostUser

    quick = VhostUser(backend.path, wanted=WANTED, needed=NEEDED, timeout=0.3)
    with Bench(VhostUserBlock(memory, quick)) as bench:
        bench.begin(RING, 64)
        bench.registers[STATUS] = 0
        assert "did not answer GET_VRING_BASE within 0.3 s" in bench.device.fault
        assert bench.registers[STATUS] == 0


def test_what_is_not_done_cannot_be_saved(memory: GuestMemory, impostor: Callable[..., Impostor]) -> None:
    with Bench(VhostUserBlock(memory, impostor().path)) as bench:
        guest = Guest(bench)
        guest.submit(READ, 0, 512)
        bench.io.pause()
        bench.device.drain()
        with pytest.raises(StateError, match="has not done"):
            bench.transport.save()


def test_a_driver_without_a_queue_needs_no_back_end(
    memory: GuestMemory, impostor: Callable[..., Impostor]
) -> None:
    backend = impostor()
    with Bench(VhostUserBlock(memory, backend.path)) as bench:
        assert bench.registers.negotiate(F_VERSION_1)
        bench.registers.drive()
        assert not bench.registers[STATUS] & NEEDS_RESET
        assert not bench.device.started
        assert backend.names()[-1] == "GET_CONFIG"


def test_a_closed_device_has_hung_up(memory: GuestMemory, impostor: Callable[..., Impostor]) -> None:
    device = VhostUserBlock(memory, connect(impostor().path))
    device.close()
    device.close()
    assert device.backend.fileno() == -1


def test_a_configuration_that_changed_by_itself_is_not_seen(
    memory: GuestMemory, impostor: Callable[..., Impostor]
) -> None:
    backend = impostor()
    with Bench(VhostUserBlock(memory, backend.path)) as bench:
        backend.config = config_space(4096)
        assert bench.registers[CONFIG] == 2048
        backend.answers["GET_CONFIG"] = struct.pack("=III", 24, 5, 0)
        with pytest.raises(ConfigError, match="no configuration space"):
            bench.device.update()
        assert bench.registers[CONFIG] == 2048
        assert bench.device.cfg_fails == 1


def test_rings_of_the_back_end_are_not_read_here(
    memory: GuestMemory, impostor: Callable[..., Impostor]
) -> None:
    with Bench(VhostUserBlock(memory, impostor().path)) as bench:
        guest = Guest(bench)
        ring: Ring = guest.ring
        memory.write(ring.avail + 2, b"\xff\xff")
        bench.notify()
        bench.settle()
        assert not bench.registers[STATUS] & NEEDS_RESET


registers = st.sampled_from([*range(0, 0x110, 4), 0xFFC])
values = st.sampled_from([0, 1, 3, 11, 15, 64, 128, 256, RING, 0xFFFFFFFF]) | st.integers(0, 0xFFFFFFFF)


@given(writes=st.lists(st.tuples(registers, values), max_size=40), resets=st.integers(1, 2))
def test_whatever_a_driver_writes_the_device_can_be_used_afterwards(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, int]], resets: int
) -> None:
    memory = GuestMemory([(0, MIB)], backing="memfd")
    path = tmp_path_factory.mktemp("driver") / "socket"
    with Impostor(path) as backend, Bench(VhostUserBlock(memory, backend.path)) as bench:
        for _ in range(resets):
            bench.begin(RING, 64)
            for register, value in writes:
                if (register, value) != (STATUS, 0):
                    bench.registers[register] = value
            assert bench.device.started
            bench.registers[STATUS] = 0
            assert not bench.device.started
        bench.begin(RING, 64)
        assert bench.registers[STATUS] & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
        assert backend.names().count("GET_VRING_BASE") == resets
