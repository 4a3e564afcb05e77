"""The PIO and MMIO address spaces: who answers where, and what happens where nobody does."""

from __future__ import annotations

import gc
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
