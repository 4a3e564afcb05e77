"""VMClock's page: as <linux/vmclock-abi.h> has it, and changed wherever a microVM goes on."""

from __future__ import annotations

import os
import struct

import msgspec
import pytest

from crackle.arch.x86_64 import layout
from crackle.arch.x86_64.board import BoardState
from crackle.devices.state import VmClockState
from crackle.devices.vmclock import SIZE, VmClock
from crackle.memory import GuestMemory
from support.snapshots import STATE

ADDRESS = layout.VMCLOCK_ADDR


@pytest.fixture
def interrupt() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK)


def test_the_page_is_as_the_header_has_it(interrupt: int) -> None:
    with GuestMemory([(0, 1 << 20)]) as memory:
        memory.write(ADDRESS, b"\xff" * SIZE)
        VmClock(memory, ADDRESS, interrupt).start()
        page = memory.read(ADDRESS, SIZE)
    magic, size, version, counter = struct.unpack_from("<IIHB", page)
    assert (magic, size, version, counter) == (0x4B4C4356, SIZE, 1, 0xFF)
    (flags,) = struct.unpack_from("<Q", page, 24)
    assert flags == 1 << 8 | 1 << 9, "there is a generation counter, and an interrupt"
    assert not any(page[12:24] + page[32:]), "nothing else"
    with pytest.raises(BlockingIOError):
        os.eventfd_read(interrupt)


def test_a_guest_that_goes_on_finds_another_marker_and_is_told(interrupt: int) -> None:
    most = (1 << 64) - 1
    state = VmClockState(address=ADDRESS, sequence=(1 << 32) - 2, marker=most, generation=6)
    with GuestMemory([(0, 1 << 20)]) as memory:
        memory.track_dirty(True)
        device = VmClock(memory, ADDRESS, interrupt)
        device.restore(state)
        page = memory.read(ADDRESS, SIZE)
        assert any(memory.take_dirty(0)), "a differential snapshot has it"
    assert struct.unpack_from("<IQ", page, 12) == (0, 0), "they go round, and the sequence is even"
    assert struct.unpack_from("<Q", page, 104) == (7,)
    assert device.save() == VmClockState(address=ADDRESS, generation=7)
    assert os.eventfd_read(interrupt) == 1


def test_the_state_of_a_guest_without_one_is_read() -> None:
    state = msgspec.to_builtins(STATE.board)
    state.pop("vmclock", None)
    assert msgspec.convert(state, BoardState).vmclock is None
