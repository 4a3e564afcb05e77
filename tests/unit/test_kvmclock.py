"""The guest's clock in a snapshot, where KVM says what time it was and where it does not."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from crackle.arch.x86_64.state import VmState, restore_vm, save_vm
from crackle.errors import ConfigError

SECOND = 1_000_000_000


class Chips:
    """As far as the clock is concerned, a Vm."""

    def __init__(self, realtime: int | None) -> None:
        self.realtime = realtime
        self.set: list[int] = []

    def get_clock(self) -> tuple[int, int | None]:
        return 7 * SECOND, self.realtime

    def set_clock(self, nanoseconds: int) -> None:
        self.set.append(nanoseconds)

    def get_irqchip(self, _chip: int) -> bytes:
        return b""

    def get_pit2(self) -> bytes:
        return b""

    def set_irqchip(self, _data: bytes) -> None:
        """No chips here."""

    set_pit2 = set_irqchip


@pytest.mark.parametrize("kvm_says", [True, False])
def test_the_clock_goes_on_by_the_time_that_has_passed(kvm_says: bool) -> None:
    vm: Any = Chips(time.time_ns() if kvm_says else None)
    state = save_vm(vm)
    assert state.realtime_ns is not None
    assert abs(state.realtime_ns - time.time_ns()) < SECOND
    earlier = msgspec.structs.replace(state, realtime_ns=state.realtime_ns - 100 * SECOND)
    restore_vm(vm, earlier, realtime=True)
    restore_vm(vm, earlier)
    assert 107 * SECOND <= vm.set[0] < 108 * SECOND
    assert vm.set[1] == 7 * SECOND


def test_the_clock_never_goes_back() -> None:
    vm: Any = Chips(time.time_ns() + 1000 * SECOND)
    restore_vm(vm, save_vm(vm), realtime=True)
    assert vm.set == [7 * SECOND]


def test_a_snapshot_that_does_not_say_what_time_it_was_is_refused() -> None:
    vm: Any = Chips(None)
    state = VmState(irqchips=(), pit=b"", clock_ns=1)
    with pytest.raises(ConfigError, match="does not say what time it was"):
        restore_vm(vm, state, realtime=True)
