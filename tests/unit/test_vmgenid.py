"""The VM generation ID: random, and another one wherever a microVM goes on."""

from __future__ import annotations

import os

import msgspec
import pytest

from crackle.arch.x86_64 import layout
from crackle.arch.x86_64.board import BoardState
from crackle.devices.vmgenid import SIZE, VmGenId
from crackle.memory import GuestMemory
from support.snapshots import STATE

ADDRESS = layout.VMGENID_ADDR


def test_each_guest_begins_with_an_id_of_its_own() -> None:
    found = set()
    for _ in range(3):
        with GuestMemory([(0, 1 << 20)]) as memory:
            VmGenId(memory, ADDRESS, -1).start()
            found.add(memory.read(ADDRESS, SIZE))
    assert len(found) == 3
    assert bytes(SIZE) not in found


def test_a_guest_that_goes_on_is_told_of_another_id() -> None:
    interrupt = os.eventfd(0, os.EFD_NONBLOCK)
    with GuestMemory([(0, 1 << 20)]) as memory:
        memory.track_dirty(True)
        device = VmGenId(memory, ADDRESS, interrupt)
        device.start()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(interrupt)
        before, saved = memory.read(ADDRESS, SIZE), device.save()
        assert saved.address == ADDRESS
        memory.take_dirty(0)
        device.restore(saved)
        assert memory.read(ADDRESS, SIZE) != before
        assert os.eventfd_read(interrupt) == 1
        assert any(memory.take_dirty(0)), "a differential snapshot has it"
    os.close(interrupt)


def test_the_state_of_a_guest_without_one_is_read() -> None:
    state = msgspec.to_builtins(STATE.board)
    del state["vmgenid"]
    assert msgspec.convert(state, BoardState).vmgenid is None
