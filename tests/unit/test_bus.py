"""The PIO and MMIO address spaces: who answers where, and what happens where nobody does."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError
from crackle.kvm.bus import Bus


class Recorder:
    """Remembers each access; reads give `value`, writes ask for `action`."""

    def __init__(self, value: int = 0, action: int = 0) -> None:
        self.value, self.action = value, action
        self.calls: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.calls.append((offset, size))
        return self.value

    def write(self, offset: int, size: int, value: int) -> int:
        self.calls.append((offset, size, value))
        return self.action


@pytest.fixture
def bus() -> Bus:
    return Bus("mmio")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_an_access_reaches_its_device_with_offset_size_and_value(bus: Bus, size: int) -> None:
    device = Recorder(value=0x8877665544332211)
    bus.attach_python(0x1000, 0x100, device)
    mask = (1 << 8 * size) - 1
    assert bus.read(0x1010, size) == 0x8877665544332211 & mask
    assert bus.write(0x1018, size, 0xF1E2D3C4B5A69788) == 0
    assert device.calls == [(0x10, size), (0x18, size, 0xF1E2D3C4B5A69788 & mask)]


def test_where_nobody_answers_reads_are_zero_and_writes_are_lost(bus: Bus) -> None:
    device = Recorder()
    bus.attach_python(0x1000, 0x10, device)
    assert [bus.read(0x2000, size) for size in (1, 2, 4, 8)] == [0, 0, 0, 0]
    assert bus.write(0xFFFFFFFFFFFFFFFF, 1, 7) == 0
    assert bus.unclaimed == 5
    assert device.calls == []


@pytest.mark.parametrize("address", [0xFFF, 0x100D, 0x100F, 0x1010])
def test_an_access_that_crosses_a_devices_end_reaches_nobody(bus: Bus, address: int) -> None:
    device = Recorder(value=7)
    bus.attach_python(0x1000, 0x10, device)
    assert bus.read(address, 4) == 0
    assert device.calls == []
    assert bus.read(0x100C, 4) == 7


@pytest.mark.parametrize("size", [0, 3, 9])
def test_an_access_has_a_size_a_cpu_can_make(bus: Bus, size: int) -> None:
    with pytest.raises(ValueError, match=f"1, 2, 4 or 8 bytes, not {size}"):
        bus.read(0, size)
    with pytest.raises(ValueError, match=f"1, 2, 4 or 8 bytes, not {size}"):
        bus.write(0, size, 0)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=30))
def test_the_first_to_claim_an_address_answers_there_and_nobody_else_gets_it(
    ranges: list[tuple[int, int]],
) -> None:
    bus, owner = Bus("pio"), {}
    for n, (base, size) in enumerate(ranges):
        wanted = range(base, base + size)
        if any(address in owner for address in wanted):
            with pytest.raises(ConfigError, match="overlaps the device at"):
                bus.attach_python(base, size, Recorder(n + 1))
        else:
            bus.attach_python(base, size, Recorder(n + 1))
            owner |= dict.fromkeys(wanted, n + 1)
    assert [bus.read(address, 1) for address in range(345)] == [owner.get(a, 0) for a in range(345)]


@pytest.mark.parametrize(("base", "size"), [(0x1000, 0), (1 << 63, 1 << 63), ((1 << 64) - 1, 2)])
def test_a_range_that_is_empty_or_wraps_around_is_refused(bus: Bus, base: int, size: int) -> None:
    with pytest.raises(ConfigError, match="is empty or wraps around"):
        bus.attach_python(base, size, Recorder())


@pytest.mark.parametrize("action", [0, 1, 2])
def test_a_device_can_ask_the_vcpu_for_a_reset_or_to_switch_off(bus: Bus, action: int) -> None:
    bus.attach_python(0, 1, Recorder(action=action))
    assert bus.write(0, 1, 0) == action


@pytest.mark.parametrize("answer", [KeyError("lost"), None, -1, 1 << 64, "text"])
def test_a_python_device_that_fails_is_reported_and_reads_as_ones(
    bus: Bus, answer: object, monkeypatch
) -> None:
    class Faulty:
        def read(self, *_: int) -> object:
            if isinstance(answer, Exception):
                raise answer
            return answer

        write = read

    reported = []
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append(report.exc_type))
    bus.attach_python(0, 8, Faulty())
    assert bus.read(0, 4) == 0xFFFFFFFF
    if answer != -1:
        assert bus.write(0, 4, 0) == 0
    assert len(reported) == (1 if answer == -1 else 2)


def test_the_bus_keeps_its_devices_alive_and_lets_them_go_with_it(bus: Bus) -> None:
    bus = Bus("pio")
    device = Recorder(value=7)
    kept = weakref.ref(device)
    bus.attach_python(0, 1, device)
    del device
    gc.collect()
    assert bus.read(0, 1) == 7
    del bus
    gc.collect()
    assert kept() is None


def test_a_device_that_is_refused_is_not_kept(bus: Bus) -> None:
    bus.attach_python(0, 8, Recorder())
    device = Recorder()
    kept = weakref.ref(device)
    with pytest.raises(ConfigError):
        bus.attach_python(4, 8, device)
    del device
    gc.collect()
    assert kept() is None


# -- detaching -----------------------------------------------------------------------------------------------


def test_a_detached_device_answers_no_more_and_is_let_go_of(bus: Bus) -> None:
    devices = [Recorder(value=n) for n in range(3)]
    for n, device in enumerate(devices):
        bus.attach_python(0x1000 * n, 0x10, device)
    gone = weakref.ref(devices[1])
    bus.detach(0x1000)
    assert [bus.read(0x1000 * n, 1) for n in range(3)] == [0, 0, 2]
    assert bus.unclaimed == 1
    del device, devices[1]
    gc.collect()
    assert gone() is None
    bus.attach_python(0x1008, 0x10, Recorder(value=9))
    assert bus.read(0x1010, 1) == 9


@pytest.mark.parametrize("base", [0, 0x1001, 0x1010, 0xFFFFFFFFFFFFFFFF])
def test_only_what_begins_there_is_detached(bus: Bus, base: int) -> None:
    bus.attach_python(0x1000, 0x10, Recorder(value=7))
    with pytest.raises(ConfigError, match=f"no mmio range begins at {base:#x}"):
        bus.detach(base)
    assert bus.read(0x1000, 1) == 7


class Blocking(Recorder):
    """A device whose read waits until it is told to return."""

    def __init__(self) -> None:
        super().__init__(value=5)
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.returned = False

    def read(self, offset: int, size: int) -> int:
        self.entered.set()
        assert self.go_on.wait(20)
        self.returned = True
        return super().read(offset, size)


def attached(bus: Bus, device: Recorder) -> bool:
    """Whether there was room for it at 0."""
    try:
        bus.attach_python(0, 8, device)
    except ConfigError:
        return False
    return True


def test_detaching_waits_for_the_handlers_that_are_running_and_for_no_others(bus: Bus) -> None:
    device = Blocking()
    bus.attach_python(0, 8, device)
    reader = threading.Thread(target=bus.read, args=(0, 1))
    reader.start()
    assert device.entered.wait(20)
    seen: list[bool] = []
    detacher = threading.Thread(target=lambda: (bus.detach(0), seen.append(device.returned)))
    detacher.start()
    # What comes in its place answers at once, to others.
    while not attached(bus, Recorder(value=8)):
        pass
    assert bus.read(0, 1) == 8
    assert seen == []
    device.go_on.set()
    detacher.join(20)
    reader.join(20)
    assert seen == [True]


def test_a_device_detaches_itself_and_others_from_inside_its_handler(bus: Bus) -> None:
    class Leaving(Recorder):
        def read(self, offset: int, size: int) -> int:
            if self.value:
                bus.detach(0x1000)
                bus.detach(0x2000)
            return super().read(offset, size)

    device, other = Leaving(value=3), Recorder(value=4)
    bus.attach_python(0x1000, 8, device)
    bus.attach_python(0x2000, 8, other)
    assert bus.read(0x1000, 1) == 3
    assert bus.read(0x1000, 1) == bus.read(0x2000, 1) == 0
    gone = [weakref.ref(device), weakref.ref(other)]
    del device, other
    # The next change finds nobody inside.
    bus.attach_python(0x3000, 8, Recorder())
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_two_devices_that_detach_each_other_do_not_wait_for_each_other(bus: Bus) -> None:
    meeting = threading.Barrier(2)

    class Rival(Recorder):
        def __init__(self, rival: int) -> None:
            super().__init__()
            self.rival = rival

        def read(self, offset: int, size: int) -> int:
            meeting.wait(20)
            bus.detach(self.rival)
            return super().read(offset, size)

    bus.attach_python(0x1000, 8, Rival(0x2000))
    bus.attach_python(0x2000, 8, Rival(0x1000))
    readers = [threading.Thread(target=bus.read, args=(base, 1)) for base in (0x1000, 0x2000)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(20)
    assert not any(reader.is_alive() for reader in readers)


def test_devices_come_and_go_while_others_look() -> None:
    bus, stop = Bus("pio"), threading.Event()
    bus.attach_python(0x8000, 8, Recorder(value=1))
    wrong: list[int] = []

    def look(base: int) -> None:
        while not stop.is_set():
            if bus.read(base, 1) not in (0, base >> 8):
                wrong.append(base)
            if bus.read(0x8000, 1) != 1:
                wrong.append(0)

    bases = (0x100, 0x200, 0x300)
    readers = [threading.Thread(target=look, args=(base,)) for base in bases]
    for reader in readers:
        reader.start()
    for _ in range(300):
        for base in bases:
            bus.attach_python(base, 8, Recorder(value=base >> 8))
        for base in bases:
            bus.detach(base)
    stop.set()
    for reader in readers:
        reader.join(20)
    assert wrong == []
