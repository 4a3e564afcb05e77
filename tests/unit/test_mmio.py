"""The virtio-mmio registers, and the life of a device behind them (virtio 1.2, sections 3.1 and 4.2)."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from crackle.kvm.line import Line
from crackle.memory import GuestMemory
from crackle.runtime.iothread import IoThread
from crackle.virtio.block.device import Block
from crackle.virtio.transport.mmio import SIZE, MmioTransport
from support import driver
from support.driver import (
    ACKNOWLEDGE,
    CONFIG,
    DRIVER,
    DRIVER_OK,
    F_EVENT_IDX,
    F_INDIRECT,
    F_VERSION_1,
    FAILED,
    FEATURES_OK,
    NEEDS_RESET,
    QUEUE_READY,
    QUEUE_SEL,
    STATUS,
    Bench,
    Buffer,
    Ring,
)

MEMORY, RING, HEADER, STATUS_BYTE = 1 << 20, 0x1000, 0x8000, 0x9000
GET_ID = (8).to_bytes(16, "little")
CONFIG_CHANGE, USED_BUFFER = 2, 1  # interrupt status
F_SEG_MAX = 1 << 2


@pytest.fixture
def disk(tmp_path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def bench(disk: Path) -> Iterator[Bench]:
    with Bench(Block(GuestMemory([(0, MEMORY)]), str(disk))) as bench:
        bench.memory.write(HEADER, GET_ID)
        yield bench


def submit(ring: Ring) -> None:
    """A request that asks for the disk's name."""
    ring.offer(ring.add([Buffer(HEADER, 16), Buffer(STATUS_BYTE - 20, 21, True)]))


def serve(bench: Bench, ring: Ring) -> int:
    """Submit one request; how many came back."""
    submit(ring)
    bench.notify()
    bench.settle()
    return len(ring.reap())


# -- registers -----------------------------------------------------------------------------------------------


def test_the_registers_say_what_the_device_is(bench: Bench) -> None:
    registers = bench.registers
    assert registers[driver.MAGIC].to_bytes(4, "little") == b"virt"
    assert registers[driver.VERSION] == 2
    assert registers[driver.DEVICE_ID] == 2
    assert registers[driver.QUEUE_NUM_MAX] == 256
    assert registers[STATUS] == 0
    assert bench.transport.notify_address == Bench.ADDRESS + driver.QUEUE_NOTIFY


def test_the_features_are_offered_in_two_halves(bench: Bench) -> None:
    discards = 1 << 13 | 1 << 14  # where the file system can
    offered = bench.registers.offered() & ~discards
    assert offered == F_VERSION_1 | F_EVENT_IDX | F_INDIRECT | F_SEG_MAX
    bench.registers[driver.DEVICE_FEATURES_SEL] = 2
    assert bench.registers[driver.DEVICE_FEATURES] == 0


def test_a_queue_that_does_not_exist_has_no_entries_and_cannot_be_set_up(bench: Bench) -> None:
    bench.registers.negotiate(F_VERSION_1)
    for index in (1, 7, 8, 0xFFFFFFFF):
        bench.registers[QUEUE_SEL] = index
        assert bench.registers[driver.QUEUE_NUM_MAX] == 0
        bench.registers[QUEUE_READY] = 1
        assert bench.registers[QUEUE_READY] == 0


def test_there_is_no_shared_memory(bench: Bench) -> None:
    assert [bench.registers[driver.SHM_LEN_LOW + 4 * i] for i in range(4)] == [0xFFFFFFFF] * 4


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0x6E, 4)])
def test_only_aligned_32_bit_accesses_reach_a_register(bench: Bench, offset: int, size: int) -> None:
    assert bench.bus.read(Bench.ADDRESS + offset, size) == 0
    bench.bus.write(Bench.ADDRESS + offset, size, 0xFF)
    assert bench.device.cfg_fails == 2
    assert bench.registers[STATUS] == 0


def test_every_other_offset_reads_as_zero_and_takes_nothing(bench: Bench) -> None:
    known = {0, 4, 8, 0x10, 0x34, *range(0xB0, 0xC0, 4)}
    before = bench.transport.save()
    for offset in range(0, CONFIG, 4):
        if offset not in known:
            assert bench.registers[offset] == 0, hex(offset)
    for offset in (0, 4, 8, 0xC, 0x10, 0x34, 0x60, 0xC0, 0xFC):
        bench.registers[offset] = 0xFFFFFFFF
    assert bench.transport.save() == before


def test_the_window_ends_after_a_page(bench: Bench) -> None:
    assert bench.bus.read(Bench.ADDRESS + SIZE, 4) == 0
    assert bench.bus.unclaimed == 1


# -- configuration space -------------------------------------------------------------------------------------


def test_the_configuration_space_is_read_at_any_width(bench: Bench) -> None:
    def config(offset: int, size: int) -> int:
        return bench.bus.read(Bench.ADDRESS + CONFIG + offset, size)

    assert config(0, 8) == 8  # sectors
    assert [config(i, 1) for i in range(8)] == [8, 0, 0, 0, 0, 0, 0, 0]
    assert config(12, 4) == 254  # seg_max
    assert config(13, 1) == 0
    assert config(12, 2) == 254


@pytest.mark.parametrize("offset", [57, 60, 64, 250, 0xEF8])
def test_beyond_its_end_the_configuration_space_is_zero(bench: Bench, offset: int) -> None:
    assert bench.bus.read(Bench.ADDRESS + CONFIG + offset, 8) == 0


def test_the_drivers_writes_do_not_change_the_configuration_space(bench: Bench) -> None:
    for offset in (0, 12, 56, 0xEF8):
        bench.bus.write(Bench.ADDRESS + CONFIG + offset, 8, 0xFFFFFFFFFFFFFFFF)
    assert bench.device.cfg_fails == 4
    assert bench.bus.read(Bench.ADDRESS + CONFIG, 8) == 8
    assert bench.device.size == 4096


def test_a_change_of_the_configuration_is_announced_with_a_new_generation(bench: Bench, disk: Path) -> None:
    bench.begin(RING, 4)
    before = bench.registers[driver.CONFIG_GENERATION]
    larger = disk.with_name("larger")
    larger.write_bytes(bytes(64 * 512))
    bench.device.update(str(larger))
    assert bench.registers[driver.CONFIG_GENERATION] != before
    assert bench.interrupts() == 1
    assert bench.registers[driver.INTERRUPT_STATUS] == CONFIG_CHANGE
    assert bench.bus.read(Bench.ADDRESS + CONFIG, 8) == 64


def test_a_driver_never_mixes_two_configurations(bench: Bench, tmp_path) -> None:
    """It reads the generation before and after, and again when they differ (2.5.1)."""
    files = []
    for name, sectors in (("small", 0x1), ("large", 0x100000001)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(sectors * 512)
        files.append(str(tmp_path / name))
    bench.begin(RING, 4)
    bench.device.update(files[0])
    done = threading.Event()

    def swap() -> None:
        for n in range(600):
            bench.device.update(files[n % 2])
        done.set()

    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    while not done.is_set():
        before = bench.registers[driver.CONFIG_GENERATION]
        value = bench.registers[CONFIG] | bench.registers[CONFIG + 4] << 32
        if bench.registers[driver.CONFIG_GENERATION] == before:
            seen.add(value)
    thread.join()
    assert seen <= {0x1, 0x100000001}


def test_a_change_is_not_announced_to_a_driver_that_is_not_there(bench: Bench, disk: Path) -> None:
    bench.device.update(str(disk))
    assert bench.interrupts() == 0
    assert bench.registers[driver.INTERRUPT_STATUS] == 0


# -- initialisation (3.1.1) ----------------------------------------------------------------------------------


def test_a_driver_that_follows_the_rules_is_served(bench: Bench) -> None:
    ring = bench.begin(RING, 4, bench.registers.offered())
    assert bench.registers[STATUS] == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert [serve(bench, ring) for _ in range(10)] == [1] * 10


def test_a_request_submitted_before_driver_ok_is_served_after_it(bench: Bench) -> None:
    ring = bench.begin(RING, 4, drive=False)
    submit(ring)
    bench.notify()
    bench.settle()
    assert ring.reap() == []
    bench.registers.drive()
    bench.settle()
    assert len(ring.reap()) == 1


@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_VERSION_1 | 1 << 63, F_VERSION_1 | 1 << 5])
def test_features_that_are_not_offered_or_legacy_are_refused(bench: Bench, features: int) -> None:
    assert not bench.registers.negotiate(features)
    bench.registers[STATUS] = ACKNOWLEDGE | DRIVER | DRIVER_OK
    assert bench.registers[STATUS] == ACKNOWLEDGE | DRIVER


def test_features_are_settled_once_accepted(bench: Bench) -> None:
    assert bench.registers.negotiate(F_VERSION_1)
    bench.registers[driver.DRIVER_FEATURES_SEL] = 0
    bench.registers[driver.DRIVER_FEATURES] = F_EVENT_IDX
    assert bench.device.driver_features == F_VERSION_1


def test_features_are_not_taken_before_a_driver_is_there(bench: Bench) -> None:
    bench.registers[driver.DRIVER_FEATURES_SEL] = 1
    bench.registers[driver.DRIVER_FEATURES] = 1
    assert bench.device.driver_features == 0


def test_status_bits_are_only_added(bench: Bench) -> None:
    bench.begin(RING, 4)
    for value in (ACKNOWLEDGE, DRIVER_OK, 0xFF & ~DRIVER):
        bench.registers[STATUS] = value
        assert bench.registers[STATUS] == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK


def test_a_driver_cannot_set_needs_reset_but_can_say_that_it_failed(bench: Bench) -> None:
    bench.registers[STATUS] = ACKNOWLEDGE | NEEDS_RESET
    assert bench.registers[STATUS] == ACKNOWLEDGE
    bench.registers[STATUS] = ACKNOWLEDGE | FAILED
    assert bench.registers[STATUS] == ACKNOWLEDGE | FAILED


def test_queues_cannot_be_set_up_before_features_ok_nor_after_driver_ok(bench: Bench) -> None:
    registers = bench.registers
    ring = Ring(bench.memory, RING, 4)
    assert not registers.set_up_queue(0, ring)
    registers.negotiate(F_VERSION_1)
    assert registers.set_up_queue(0, ring)
    registers.drive()
    registers.place_queue(0, 8, 0, 0, 0)
    assert registers[QUEUE_READY] == 1
    [queue] = bench.device.queues
    assert (queue.size, queue.desc_gpa, queue.avail_gpa, queue.used_gpa) == (
        4,
        ring.desc,
        ring.avail,
        ring.used,
    )


def test_a_driver_that_runs_may_stop_using_a_queue_and_has_it_back_with_a_reset(bench: Bench) -> None:
    registers = bench.registers
    ring = Ring(bench.memory, RING, 4)
    registers.negotiate(F_VERSION_1)
    assert registers.set_up_queue(0, ring)
    registers.drive()
    registers[QUEUE_READY] = 0
    assert registers[QUEUE_READY] == 0
    fails = bench.device.cfg_fails
    registers[QUEUE_READY] = 1
    assert (registers[QUEUE_READY], bench.device.cfg_fails) == (0, fails + 1)
    registers[STATUS] = 0
    registers.negotiate(F_VERSION_1)
    assert registers.set_up_queue(0, Ring(bench.memory, RING, 4))


def test_a_queue_that_is_enabled_keeps_its_place_until_it_is_disabled(bench: Bench) -> None:
    bench.registers.negotiate(F_VERSION_1)
    ring = Ring(bench.memory, RING, 4)
    assert bench.registers.set_up_queue(0, ring)
    bench.registers.place_queue(0, 8, 0x10000, 0x20000, 0x30000)
    assert bench.device.queues[0].desc_gpa == ring.desc
    bench.registers[QUEUE_READY] = 0
    bench.registers.place_queue(0, 8, 0x10000, 0x20000, 0x30000)
    assert (bench.device.queues[0].size, bench.device.queues[0].used_gpa) == (8, 0x30000)


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used"),
    [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (512, 0x1000, 0x10000, 0x20000),
        (0x10004, 0x1000, 0x10000, 0x20000),
        (4, 0x1001, 0x2000, 0x3000),
        (4, 0x1000, 0x2001, 0x3000),
        (4, 0x1000, 0x2000, 0x3002),
        (4, MEMORY - 32, 0x2000, 0x3000),
        (4, 0x1000, MEMORY, 0x3000),
        (4, 0x1000, 0x2000, 1 << 63),
        (4, 0x1000, 0x2000, 0xFFFFFFFFFFFFFFFC),
    ],
)
def test_an_impossible_queue_is_refused_and_asks_for_a_reset(
    bench: Bench, size: int, desc: int, avail: int, used: int
) -> None:
    registers = bench.registers
    registers.negotiate(F_VERSION_1)
    registers.place_queue(0, size, desc, avail, used)
    registers[QUEUE_READY] = 1
    assert registers[QUEUE_READY] == 0
    assert registers[STATUS] & NEEDS_RESET
    registers.drive()
    bench.notify()
    bench.settle()
    ring = bench.begin(RING, 4)
    assert serve(bench, ring) == 1


def test_a_device_that_is_driven_without_a_queue_does_nothing(bench: Bench) -> None:
    bench.registers.negotiate(F_VERSION_1)
    bench.registers.drive()
    bench.notify()
    bench.settle()
    assert bench.registers[STATUS] & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK


# -- interrupts ----------------------------------------------------------------------------------------------


def test_a_used_buffer_interrupts_until_it_is_acknowledged(bench: Bench) -> None:
    ring = bench.begin(RING, 4)
    serve(bench, ring)
    assert bench.interrupts() == 1
    assert bench.registers[driver.INTERRUPT_STATUS] == USED_BUFFER
    bench.registers[driver.INTERRUPT_ACK] = CONFIG_CHANGE
    assert bench.registers[driver.INTERRUPT_STATUS] == USED_BUFFER
    bench.registers[driver.INTERRUPT_ACK] = USED_BUFFER
    assert bench.registers[driver.INTERRUPT_STATUS] == 0


def test_a_driver_that_has_not_acknowledged_one_interrupt_is_not_told_again_at_once(bench: Bench) -> None:
    ring = bench.begin(RING, 4)
    line = bench.transport.irq_fd
    told = time.monotonic()
    serve(bench, ring)
    assert os.eventfd_read(line) == 1
    pulses = 0
    for _ in range(64):
        serve(bench, ring)
        with contextlib.suppress(BlockingIOError):
            pulses += os.eventfd_read(line)
    assert pulses <= (time.monotonic() - told) * 4000
    # The last one may have been put off: it comes by itself, and not together with the next.
    while select.select([line], [], [], 0.1)[0]:
        os.eventfd_read(line)
    bench.registers[driver.INTERRUPT_ACK] = USED_BUFFER
    serve(bench, ring)
    assert os.eventfd_read(line) == 1


def test_a_driver_that_sleeps_without_having_acknowledged_is_woken_all_the_same(bench: Bench) -> None:
    ring = bench.begin(RING, 4)
    line = bench.transport.irq_fd
    for _ in range(20):
        serve(bench, ring)
        # As a guest in HLT: nothing else happens on the device.
        assert select.select([line], [], [], 20)[0]
        os.eventfd_read(line)
    assert bench.registers[driver.INTERRUPT_STATUS] == USED_BUFFER


def test_an_interrupt_that_was_put_off_ends_with_the_transport(bench: Bench) -> None:
    ring = bench.begin(RING, 4)
    for _ in range(2):
        serve(bench, ring)
    bench.transport.unplug()
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(bench.transport.irq_fd)
    assert not select.select([bench.transport.irq_fd], [], [], 0.01)[0]


def test_a_change_of_configuration_is_told_beside_used_buffers(bench: Bench) -> None:
    ring = bench.begin(RING, 4)
    serve(bench, ring)
    assert os.eventfd_read(bench.transport.irq_fd) == 1
    ring.offer(0xFFFF)  # and the device needs a reset
    bench.notify()
    bench.settle()
    assert os.eventfd_read(bench.transport.irq_fd) == 1
    assert bench.registers[driver.INTERRUPT_STATUS] == USED_BUFFER | CONFIG_CHANGE


# -- reset and hostile drivers -------------------------------------------------------------------------------


def test_a_reset_forgets_everything_and_the_device_can_be_used_again(bench: Bench) -> None:
    fresh = bench.transport.save()
    for features in (F_VERSION_1, bench.registers.offered()):
        ring = bench.begin(RING, 8, features)
        assert serve(bench, ring) == 1
        bench.registers[STATUS] = 0
        assert bench.transport.save() == fresh
        submit(ring)
        bench.notify()
        bench.settle()
        assert ring.reap() == []


def test_a_broken_queue_asks_for_a_reset_and_is_left_alone_until_then(bench: Bench) -> None:
    ring = bench.begin(RING, 4)
    bench.interrupts()
    ring.offer(9)
    bench.notify()
    bench.settle()
    assert bench.registers[STATUS] & NEEDS_RESET
    assert bench.device.fault == "descriptor index beyond its table"
    assert bench.device.broken_queues == 1
    assert bench.interrupts() == 1
    assert bench.registers[driver.INTERRUPT_STATUS] == CONFIG_CHANGE

    before = bench.memory.read(ring.used, 6 + 8 * 4)
    ring.next_avail -= 1
    submit(ring)
    bench.notify()
    bench.settle()
    assert bench.memory.read(ring.used, 6 + 8 * 4) == before
    assert bench.device.broken_queues == 1

    assert serve(bench, bench.begin(RING, 4)) == 1
    assert bench.device.fault is None
    assert not bench.registers[STATUS] & NEEDS_RESET


def test_chains_before_the_one_that_breaks_the_queue_are_served(bench: Bench) -> None:
    ring = bench.begin(RING, 8)
    submit(ring)
    submit(ring)
    ring.offer(100)
    bench.notify()
    bench.settle()
    assert len(ring.reap()) == 2
    assert bench.registers[STATUS] & NEEDS_RESET


# -- saved state ---------------------------------------------------------------------------------------------


def test_a_saved_device_goes_on_in_another_process(bench: Bench, disk: Path) -> None:
    ring = bench.begin(RING, 8, bench.registers.offered())
    ring.set_used_event(0)
    assert serve(bench, ring) == 1
    bench.io.pause()
    submit(ring)  # submitted and notified, but not served
    state = bench.transport.save()
    image = bench.memory.read(0, MEMORY)

    with Bench(Block(GuestMemory([(0, MEMORY)]), str(disk))) as other:
        other.memory.write(0, image)
        ring.memory = other.memory
        other.io.pause()
        other.transport.restore(state)
        assert other.transport.save() == state
        # The interrupt that the guest had not acknowledged comes again.
        assert other.interrupts() >= 1
        assert other.registers[driver.INTERRUPT_STATUS] == USED_BUFFER
        other.io.resume()
        other.settle()
        assert len(ring.reap()) == 1
        assert serve(other, ring) == 1


def test_a_state_that_does_not_fit_is_refused(bench: Bench, disk: Path) -> None:
    bench.begin(RING, 8)
    saved = bench.transport.save()
    good = saved.device

    def restored(**changes: object) -> None:
        transport = MmioTransport(Block(GuestMemory([(0, MEMORY)]), str(disk)), Bench.ADDRESS, Line(5))
        transport.restore(msgspec.structs.replace(saved, device=msgspec.structs.replace(good, **changes)))

    restored()
    for address, gsi in ((Bench.ADDRESS, 6), (0, 5)):
        with pytest.raises(ValueError, match="saved registers at 0xc0001000 with interrupt 5, these are at"):
            MmioTransport(Block(GuestMemory([(0, MEMORY)]), str(disk)), address, Line(gsi)).restore(saved)
    for features in (F_VERSION_1 | 0x80, F_EVENT_IDX):
        with pytest.raises(
            ValueError, match=f"saved features {features:#x} are none that this device offers"
        ):
            restored(driver_features=features)
    # Half-way through negotiation they may be anything.
    restored(driver_features=0x80, status=ACKNOWLEDGE | DRIVER)
    with pytest.raises(ValueError, match="2 saved queues, this device has 1"):
        restored(queues=good.queues * 2)
    with pytest.raises(ValueError, match="outside guest memory"):
        restored(queues=(msgspec.structs.replace(good.queues[0], desc=MEMORY),))


# -- descriptors ---------------------------------------------------------------------------------------------


def test_a_closed_device_writes_to_no_descriptor_that_was_its_own(disk: Path) -> None:
    memory = GuestMemory([(0, MEMORY)])
    device = Block(memory, str(disk))
    transport = MmioTransport(device, 0, Line(5))
    old = device.notify_fds
    for _ in range(2):
        device.close()
        transport.close()
    assert (device.notify_fds, transport.irq_fd) == ((), -1)
    others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    assert set(old) <= set(others)
    device.kick()
    device.update(str(disk))
    for fd in others:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
        os.close(fd)
    memory.close()


def test_a_device_without_a_transport_serves_and_signals_nobody(bench: Bench, disk: Path) -> None:
    ring = bench.begin(RING, 4)
    bench.io.pause()
    submit(ring)
    alone = Block(bench.memory, str(disk))
    with contextlib.closing(IoThread()) as io, contextlib.closing(alone):
        alone.attach(io)
        alone.restore(bench.device.save())
        alone.update(str(disk))
        assert io.step() == 1
        assert len(ring.reap()) == 1
        ring.offer(9)
        alone.kick()
        assert io.step() == 1
        assert alone.device_status & NEEDS_RESET
        assert alone.irq_fails == 0


def test_a_transport_that_has_gone_is_not_signalled(bench: Bench, disk: Path) -> None:
    bench.begin(RING, 4)
    bench.transport.close()
    before = bench.transport.save()
    bench.device.update(str(disk))
    assert bench.transport.save().interrupt_status == before.interrupt_status
    # Another may have the device now, and only one at a time.
    other = MmioTransport(bench.device, 0, Line(6))
    with pytest.raises(ValueError, match="has a transport already"):
        MmioTransport(bench.device, 0, Line(7))
    bench.device.update(str(disk))
    assert os.eventfd_read(other.irq_fd) == 1
    other.close()


def test_a_device_that_cannot_be_made_leaves_no_descriptor_behind(disk: Path) -> None:
    memory = GuestMemory([(0, MEMORY)])
    gc.collect()
    before = os.listdir("/proc/self/fd")
    for arguments in ((memory, "/nonexistent"), (memory, 7), (None, str(disk)), ("memory", str(disk)), ()):
        with pytest.raises(Exception, match=r"\w"):
            Block(*arguments)
    gc.collect()
    assert os.listdir("/proc/self/fd") == before
    memory.close()


def test_a_device_is_set_up_once(bench: Bench, disk: Path) -> None:
    with pytest.raises(ValueError, match="set up already"):
        bench.device.__init__(bench.memory, str(disk))
    assert serve(bench, bench.begin(RING, 4)) == 1
