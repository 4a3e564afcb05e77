"""Memory that a running guest is given and loses."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from crackle.errors import KvmError
from crackle.kvm import Bus, Kvm
from crackle.memory import GuestMemory
from crackle.vmm.slots import MemorySlots

CODE, SIZE, PORT = 0x1000, 0x10000, 0x80
PAGE = 4096
PLACE = 0xF8000

# mov dx, 0xf000; mov ds, dx; again: mov al, [0x8000]; out 0x80, al; jmp again
LOOK = b"\xba\x00\xf0\x8e\xda\xa0\x00\x80\xe6\x80\xeb\xf9"


class Seen:
    """What the guest last read at PLACE."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.value = -1

    def write(self, _offset: int, _size: int, value: int) -> int:
        with self.changed:
            if value != self.value:
                self.value = value
                self.changed.notify_all()
        return 0

    def becomes(self, value: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.value == value, 30)


class Guest:
    def __init__(self) -> None:
        self.memory = GuestMemory([(0, SIZE)])
        self.memory.write(CODE, LOOK)
        self.kvm = Kvm()
        self.vm = self.kvm.create_vm()
        self.vm.create_irqchip()
        self.slots = MemorySlots(self.vm, self.memory, log_dirty_pages=True)
        self.vcpu = self.vm.create_vcpu(0)
        sregs = self.vcpu.get_sregs()
        for name in ("cs", "ds", "es", "ss"):
            sregs[name] = {**sregs[name], "base": 0, "selector": 0}
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs({**dict.fromkeys(self.vcpu.get_regs(), 0), "rip": CODE, "rflags": 2})
        self.seen = Seen()
        self.pio, self.mmio = Bus("pio"), Bus("mmio")
        self.pio.attach_python(PORT, 1, self.seen)
        self.vcpu.start(self.pio, self.mmio)

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()
        self.kvm.close()
        self.memory.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def test_a_running_guest_finds_what_is_added_and_loses_what_is_removed(guest: Guest) -> None:
    assert guest.seen.becomes(0), "nobody answers"
    for value in (65, 66):
        added = guest.memory.add_region(PLACE, PAGE)
        guest.memory.write(PLACE, bytes((value,)))
        assert guest.seen.becomes(value)
        guest.memory.remove_region(added)
        assert guest.seen.becomes(0)
    assert guest.vcpu.status == "running"


def test_slots_are_numbered_anew_from_the_lowest_that_is_free(guest: Guest) -> None:
    first, second = (guest.memory.add_region(place, PAGE) for place in (0x20000, 0x40000))
    assert [guest.slots.slot(region) for region in guest.memory.regions] == [0, 1, 2]
    guest.memory.remove_region(first)
    third = guest.memory.add_region(0x60000, PAGE)
    assert (guest.slots.slot(second), guest.slots.slot(third)) == (2, 1)
    with pytest.raises(KeyError):
        guest.slots.slot(first)


def test_what_the_guest_writes_to_added_memory_is_in_kvms_log(guest: Guest) -> None:
    added = guest.memory.add_region(0x20000, 3 * PAGE)
    slot = guest.slots.slot(added)
    guest.vm.get_dirty_log(slot)
    assert guest.vm.get_dirty_log(slot) == bytes(8)
    # al is what the guest read last: have it write that to 0x21000 instead of a port.
    guest.vcpu.pause()
    guest.memory.write(CODE, b"\xba\x00\x20\x8e\xda\xa2\x00\x10\xeb\xfe")  # mov ds, 0x2000; mov [0x1000], al
    guest.vcpu.set_regs({**guest.vcpu.get_regs(), "rip": CODE, "rax": 7})
    guest.vcpu.resume()
    deadline = time.monotonic() + 30
    while guest.memory.read(0x21000, 1) != b"\x07":
        assert time.monotonic() < deadline
    assert guest.vm.get_dirty_log(slot) == (1 << 1).to_bytes(8, "little")


def test_a_region_that_kvm_refuses_is_not_added(guest: Guest) -> None:
    guest.vm.set_user_memory_region(9, 0x30000, PAGE, guest.memory.regions[0].hva)
    with pytest.raises(KvmError, match="set memory slot"):
        guest.memory.add_region(0x30000, PAGE)
    assert len(guest.memory.regions) == 1
