"""What the platform makes, describes and saves of a machine."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from crackle.arch import platform
from crackle.arch.x86_64.board import BoardState
from crackle.arch.x86_64.state import VcpuState, VmState
from crackle.kvm import Bus, Kvm
from crackle.memory import GuestMemory
from crackle.vmm.slots import MemorySlots

CODE, SIZE, PORT = 0x1000, 0x10000, 0x80
# again: inc ax; out 0x80, ax; jmp again
COUNT = b"\x40\xe7\x80\xeb\xfb"


class Counter:
    """What the guest says it has counted to."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.changed = threading.Condition()

    def read(self, _offset: int, _size: int) -> int:
        return 0

    def write(self, _offset: int, _size: int, value: int) -> int:
        with self.changed:
            self.values.append(value)
            self.changed.notify_all()
        return 0

    def wait(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.values) >= count, 30)


class Guest:
    """A VM as the shell makes it, in memory that outlives it."""

    def __init__(self, memory: GuestMemory) -> None:
        self.kvm = Kvm()
        self.vm = self.kvm.create_vm()
        platform.create_chips(self.vm)
        self.vcpu = self.vm.create_vcpu(0)
        self.slots = MemorySlots(self.vm, memory)
        self.counter = Counter()
        self.pio = Bus("pio")
        self.pio.attach_python(PORT, 2, self.counter)

    def enter(self) -> None:
        platform.prepare_vcpus(self.kvm, [self.vcpu], smt=False)
        sregs = self.vcpu.get_sregs()
        sregs["cs"] = {**sregs["cs"], "base": 0, "selector": 0}
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs({**dict.fromkeys(self.vcpu.get_regs(), 0), "rip": CODE, "rflags": 2, "rbx": 77})

    def start(self) -> None:
        self.vcpu.start(self.pio, Bus("mmio"))

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()
        self.kvm.close()


def test_a_guest_goes_on_in_another_vm_where_it_was_saved() -> None:
    with GuestMemory([(0, SIZE)]) as memory:
        memory.write(CODE, COUNT)
        first = Guest(memory)
        try:
            first.enter()
            first.start()
            first.counter.wait(100)
            first.vcpu.pause()
            last = first.counter.values[-1]
            saved = platform.save_vm(first.vm), platform.save_vcpu(first.kvm, first.vcpu)
        finally:
            first.close()
        # As a file would hold it.
        chips = msgspec.msgpack.decode(msgspec.msgpack.encode(saved[0]), type=VmState)
        cpu = msgspec.msgpack.decode(msgspec.msgpack.encode(saved[1]), type=VcpuState)
        assert cpu.regs["rbx"] == 77
        second = Guest(memory)
        try:
            platform.restore_vcpus(second.kvm, [second.vcpu], [cpu])
            platform.restore_vm(second.vm, chips)
            again = platform.save_vcpu(second.kvm, second.vcpu)
            assert (again.regs, again.sregs, again.cpuid) == (cpu.regs, cpu.sregs, cpu.cpuid)
            assert (again.lapic, again.xcrs, again.debugregs) == (cpu.lapic, cpu.xcrs, cpu.debugregs)
            assert again.msrs.keys() == cpu.msrs.keys()
            second.start()
            second.counter.wait(3)
            assert second.counter.values[:3] == [(last + i) & 0xFFFF for i in (1, 2, 3)]
        finally:
            second.close()


def test_page_directory_pointers_are_those_that_the_cpu_has_and_not_those_in_memory() -> None:
    """Of a guest that pages by PAE, and has changed the table since it wrote cr3 (Intel SDM volume 3, 4.4.1)."""
    pdptrs = (0x9001, 0, 0, 0xA001)
    with GuestMemory([(0, SIZE)]) as memory:
        guest = Guest(memory)
        try:
            guest.enter()
            assert platform.save_vcpu(guest.kvm, guest.vcpu).pdptrs == ()
            sregs = guest.vcpu.get_sregs()
            pae = {**sregs, "cr0": 0x8000_0011, "cr3": 0x8000, "cr4": 1 << 5, "efer": 0}
            guest.vcpu.set_sregs_with_pdptrs(pae, pdptrs)
            saved = platform.save_vcpu(guest.kvm, guest.vcpu)
            if not saved.pdptrs:
                pytest.skip("this KVM does not tell PDPTRs")
            assert saved.pdptrs == pdptrs
            guest.enter()
            platform.restore_vcpus(guest.kvm, [guest.vcpu], [saved])
            assert platform.save_vcpu(guest.kvm, guest.vcpu).pdptrs == pdptrs
        finally:
            guest.close()


def test_the_boards_devices_are_saved_and_restored(machine: Callable[..., Any]) -> None:
    running = machine("echo").start()
    running.wait_for("echo\n")
    running.machine.pause()
    state = running.machine.board.save()
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=BoardState)
    assert copy == state
    other = machine("echo")
    assert other.machine.board.save() != state
    other.machine.board.restore(copy)
    # But for what tells the guest that it goes on.
    after = other.machine.board.save()
    assert after == msgspec.structs.replace(state, vmclock=after.vmclock, hotplug=after.hotplug)


def test_windows_and_lines_for_devices_are_apart_from_the_boards() -> None:
    windows, lines = platform.DEVICE_WINDOWS, platform.DEVICE_LINES
    assert windows[0] == 0xC000_1000
    assert windows.step == 0x1000
    assert len(windows) >= len(lines) == 18
    for gpa, size in platform.memory_layout(5 << 30):
        assert not set(range(gpa, gpa + size, windows.step)) & {windows[0], windows[-1]}


@pytest.mark.parametrize("missing", ["parisc64", "sparc"])
def test_another_processor_is_refused_in_a_sentence(missing: str) -> None:
    script = (
        f"import os\nos.uname = lambda: os.uname_result(('Linux', 'host', '6', '1', {missing!r}))\n"
        "from crackle.errors import ConfigError\n"
        "try:\n    import crackle.arch\nexcept ConfigError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout == f"this host is {missing}; only x86_64 hosts are supported yet\n"
