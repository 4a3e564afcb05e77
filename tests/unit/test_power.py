"""The ACPI sleep registers: only soft-off does anything."""

from __future__ import annotations

import pytest

from crackle.devices.power import SleepControl
from crackle.kvm.bus import CONTINUE, SHUTDOWN, Bus

ENABLE, S5 = 1 << 5, 5


@pytest.fixture
def bus() -> Bus:
    bus = Bus("pio")
    bus.attach_python(0x600, 2, SleepControl(S5))
    return bus


def test_only_soft_off_with_sleep_enable_switches_the_machine_off(bus: Bus) -> None:
    off = {value for value in range(256) if bus.write(0x600, 1, value) == SHUTDOWN}
    assert {value & 0x3C for value in off} == {ENABLE | S5 << 2}
    assert len(off) == 16  # the other four bits are reserved and ignored


def test_the_status_register_is_never_set_and_takes_no_command(bus: Bus) -> None:
    assert bus.write(0x601, 1, ENABLE | S5 << 2) == CONTINUE
    assert [bus.read(0x600, 1), bus.read(0x601, 1)] == [0, 0]
