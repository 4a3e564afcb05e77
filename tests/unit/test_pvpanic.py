"""pvpanic: a guest's kernel says that it has panicked (QEMU, docs/specs/pvpanic.rst)."""

from __future__ import annotations

import pytest

from crackle.devices.pvpanic import PvPanic
from crackle.kvm.bus import CONTINUE, PANIC, Bus

PORT = 0x505
PANICKED, CRASH_LOADED = 1, 2


class Guest:
    def __init__(self, ends: bool) -> None:
        self.told: list[str] = []
        self.device = PvPanic(self.told.append, ends=ends)
        self.bus = Bus("pio")
        self.bus.attach_python(PORT, 1, self.device)


def test_the_driver_finds_which_events_can_be_told() -> None:
    assert Guest(True).bus.read(PORT, 1) == PANICKED | CRASH_LOADED


@pytest.mark.parametrize(("ends", "action"), [(True, PANIC), (False, CONTINUE)])
@pytest.mark.parametrize("value", [PANICKED, PANICKED | CRASH_LOADED, 0xFF])
def test_a_panic_is_noted_and_ends_the_guest_where_that_is_wanted(
    ends: bool, action: int, value: int
) -> None:
    guest = Guest(ends)
    assert not guest.device.panicked
    assert guest.bus.write(PORT, 1, value) == action
    assert guest.device.panicked
    assert guest.told == ["The guest's kernel has panicked."]


def test_a_kernel_with_a_crash_kernel_goes_on() -> None:
    guest = Guest(True)
    assert guest.bus.write(PORT, 1, CRASH_LOADED) == CONTINUE
    assert not guest.device.panicked
    assert guest.told == ["The guest's kernel has panicked, and goes on with its crash kernel."]


@pytest.mark.parametrize("value", [0, 4, 0xFC])
def test_what_it_does_not_know_is_ignored(value: int) -> None:
    guest = Guest(True)
    assert guest.bus.write(PORT, 1, value) == CONTINUE
    assert (guest.device.panicked, guest.told) == (False, [])


def test_that_it_panicked_is_not_forgotten_over_save_and_restore() -> None:
    before, after = Guest(False), Guest(False)
    before.bus.write(PORT, 1, PANICKED)
    after.device.restore(before.device.save())
    assert after.device.panicked
    assert after.told == []
