"""Who gives out windows and interrupt lines, and takes them back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crackle.arch import DeviceInfo
from crackle.arch.x86_64 import acpi, aml, build_cmdline, layout
from crackle.errors import ConfigError, KvmError
from crackle.kvm import Bus
from crackle.memory import GuestMemory
from crackle.runtime.iothread import IoThread
from crackle.virtio.block.device import Block
from crackle.virtio.transport.mmio import MmioTransport
from crackle.vmm.places import Lines, Places, Pool
from support.driver import STATUS, Bench, Buffer, Registers, Ring

LINES = layout.GSI_LAST - layout.GSI_FIRST + 1
RING, HEADER = 0x1000, 0x8000


def test_the_lowest_that_is_free_is_given_and_what_comes_back_is_given_again() -> None:
    pool = Pool("places", 10, 40, 10)
    assert [pool.take() for _ in range(3)] == [10, 20, 30]
    pool.release(20)
    pool.release(10)
    assert [pool.take() for _ in range(3)] == [10, 20, 40]
    with pytest.raises(ConfigError, match="room for 4 places; remove one"):
        pool.take()
    with pytest.raises(KeyError):
        pool.release(50)


def test_a_saved_devices_number_is_its_own_again_and_nobody_elses() -> None:
    pool = Pool("places", 10, 40, 10)
    assert pool.claim(30) == 30
    assert [pool.take() for _ in range(3)] == [10, 20, 40]
    for number in (30, 15, 50):
        with pytest.raises(ConfigError, match=f"{number:#x} is not free among the places"):
            pool.claim(number)


def test_every_device_has_a_line_of_its_own_as_long_as_there_are_any() -> None:
    lines = Lines(5, 7)
    given = [lines.take() for _ in range(7)]
    assert [line.gsi for line in given] == [5, 6, 7, 5, 6, 7, 5]
    assert given[0] is given[3] is given[6]
    for line in given[1], given[4]:
        lines.release(line)
    assert lines.take().gsi == 6
    assert lines.claim(7) is given[2]
    with pytest.raises(ConfigError, match="interrupt 4 is none for devices: these are 5 to 7"):
        lines.claim(4)
    lines.close()


def test_a_saved_device_may_have_a_line_that_no_new_one_gets() -> None:
    lines = Lines(5, 6, 7)
    assert lines.claim(7).gsi == 7
    assert [lines.take().gsi for _ in range(4)] == [5, 6, 5, 6]
    with pytest.raises(ConfigError, match="interrupt 8 is none for devices: these are 5 to 7"):
        lines.claim(8)
    lines.close()


def test_the_descriptors_of_lines_come_back() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    lines = Lines(5, 7)
    given = [lines.take() for _ in range(5)]
    for line in given[:3]:
        lines.release(line)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    lines.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_the_guest_is_told_which_lines_are_shared() -> None:
    devices = [DeviceInfo(layout.VIRTIO_MMIO_START + 0x1000 * n, 0x1000, 5 + n % 2) for n in range(3)]
    table = acpi.dsdt(devices, power_gsi=None, sleep_port=None)
    assert table.count(aml.interrupt(5, shared=True)) == 2
    assert table.count(aml.interrupt(6)) == 1
    assert aml.interrupt(5, shared=True) == bytes.fromhex("89 06 00 0b 01 05 00 00 00")


def test_kernels_without_acpi_are_told_of_as_many_devices_as_there_is_room_for() -> None:
    places = Places()
    devices = [DeviceInfo(places.windows.take(), 0x1000, layout.GSI_FIRST + n % LINES) for n in range(1000)]
    with pytest.raises(ConfigError, match="room for 1000 devices"):
        places.windows.take()
    told = build_cmdline(None, devices=devices).split()
    found = [word for word in told if word.startswith(b"virtio_mmio.device=")]
    assert found == build_cmdline(None, devices=devices[: len(found)]).split()[-len(found) :]
    assert 19 < len(found) < 1000
    # Those with a line of their own are never left out in silence.
    with pytest.raises(ConfigError, match="too long"):
        build_cmdline("x" * 1800, devices=devices[:LINES])


# -- plug and unplug -----------------------------------------------------------------------------------------


class FakeVm:
    """What KVM has been told, with an error after so many calls."""

    def __init__(self, fail_after: int = 1 << 30) -> None:
        self.irqs: dict[int, int] = {}
        self.notifications: dict[tuple[int, int], int] = {}
        self.left = fail_after

    def _call(self, table: dict[Any, int], key: Any, fd: int, assign: bool) -> None:
        if assign:
            if not self.left:
                raise KvmError("no more")
            self.left -= 1
            assert key not in table
            table[key] = fd
        else:
            assert table.pop(key) == fd

    def irqfd(self, fd: int, gsi: int, *, assign: bool = True) -> None:
        self._call(self.irqs, gsi, fd, assign)

    def ioeventfd(self, fd: int, address: int, length: int, *, datamatch: int, assign: bool = True) -> None:
        assert length == 4
        self._call(self.notifications, (address, datamatch), fd, assign)


@pytest.fixture
def disk(tmp_path: Path) -> str:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    return str(path)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(0, 1 << 20)]) as memory:
        yield memory


def test_what_is_plugged_is_taken_back_and_can_be_plugged_again(disk: str, memory: GuestMemory) -> None:
    vm: Any = FakeVm()
    bus, io, places = Bus("mmio"), IoThread(), Places()
    io.start()
    transports = []
    for _ in range(3):
        device = Block(memory, disk, read_only=True)
        transports.append(MmioTransport(device, places.windows.take(), places.lines.take()))
        transports[-1].plug(bus, io, vm)
    with pytest.raises(ValueError, match="plugged already"):
        transports[0].plug(bus, io, vm)
    assert sorted(vm.irqs) == [5, 6, 7]
    assert sorted(vm.notifications) == [(each.notify_address, 0) for each in transports]

    one = transports[1]
    one.unplug()
    one.unplug()
    assert sorted(vm.irqs) == [5, 7]
    assert (one.notify_address, 0) not in vm.notifications
    assert bus.read(one.address, 4) == 0
    assert bus.read(transports[2].address, 4) != 0
    one.plug(bus, io, vm)
    registers = Registers(bus, one.address)
    registers.negotiate(1 << 32)
    ring = Ring(memory, RING, 4)
    registers.set_up_queue(0, ring)
    registers.drive()
    memory.write(HEADER, (8).to_bytes(16, "little"))
    ring.offer(ring.add([Buffer(HEADER, 16), Buffer(HEADER + 64, 21, True)]))
    os.eventfd_write(one.device.notify_fds[0], 1)
    io.pause()
    io.resume()
    assert len(ring.reap()) == 1
    for transport in transports:
        transport.unplug()
        transport.device.close()
        transport.close()
    assert not vm.irqs
    assert not vm.notifications
    io.close()
    places.lines.close()


@pytest.mark.parametrize("calls", [0, 1])
def test_a_plug_that_fails_half_way_leaves_nothing_behind(disk: str, memory: GuestMemory, calls: int) -> None:
    vm: Any = FakeVm(calls)
    bus, io, places = Bus("mmio"), IoThread(), Places()
    device = Block(memory, disk, read_only=True)
    transport = MmioTransport(device, places.windows.take(), places.lines.take())
    with pytest.raises(KvmError, match="no more"):
        transport.plug(bus, io, vm)
    assert not vm.irqs
    assert not vm.notifications
    assert bus.read(transport.address, 4) == 0
    device.kick()
    assert io.step() == 0
    # A window that somebody has: the last step.
    vm.left = 99
    other = MmioTransport(Block(memory, disk, read_only=True), transport.address + 0x800, places.lines.take())
    other.plug(bus, io, vm)
    with pytest.raises(ConfigError, match="overlaps"):
        transport.plug(bus, io, vm)
    assert list(vm.irqs) == [6]


def test_a_line_of_several_devices_is_there_until_the_last_goes(disk: str, memory: GuestMemory) -> None:
    vm: Any = FakeVm()
    bus, io = Bus("mmio"), IoThread()
    lines = Lines(5, 5)
    transports = [
        MmioTransport(Block(memory, disk, read_only=True), 0x1000 * n, lines.take()) for n in range(1, 3)
    ]
    for transport in transports:
        transport.plug(bus, io, vm)
    assert vm.irqs == {5: transports[0].irq_fd}
    assert transports[0].irq_fd == transports[1].irq_fd
    transports[0].unplug()
    assert list(vm.irqs) == [5]
    transports[1].unplug()
    assert not vm.irqs


def test_a_device_is_taken_away_while_a_driver_uses_it(disk: str) -> None:
    """Registers and queue from another thread, all the time."""
    with Bench(Block(GuestMemory([(0, 1 << 20)]), disk)) as bench:
        bench.memory.write(HEADER, (8).to_bytes(16, "little"))
        stop = threading.Event()

        def drive() -> None:
            while not stop.is_set():
                bench.bus.write(bench.ADDRESS + STATUS, 4, 0)
                bench.bus.read(bench.ADDRESS + STATUS, 4)
                os.eventfd_write(bench.device.notify_fds[0], 1)

        thread = threading.Thread(target=drive)
        thread.start()
        for _ in range(200):
            bench.transport.unplug()
            events = bench.device.queue_events
            os.eventfd_write(bench.device.notify_fds[0], 1)
            assert bench.device.queue_events == events
            bench.transport.plug(bench.bus, bench.io)
        stop.set()
        thread.join()
