"""The core by itself: a VM, a vCPU and a few bytes of real-mode code, without devices or kernel."""

import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crackle.errors import ConfigError, KvmError, StateError
from crackle.kvm import Bus, Kvm
from crackle.memory import GuestMemory

CODE = 0x1000
SIZE = 0x10000
PORT = 0x80

OUT_A = b"\xb0A\xe6\x80"  # mov al, 'A'; out 0x80, al
IN = b"\xe4\x80"  # in al, 0x80
OUT = b"\xe6\x80"  # out 0x80, al
AGAIN = b"\xeb\xfe"  # jmp $
STORE = b"\xa2\x00\x20"  # mov [0x2000], al
BEYOND = b"\xba\x00\xf0\x8e\xda\xa0\x00\x80"  # mov dx, 0xf000; mov ds, dx; mov al, [0x8000]: 0xf8000


class Box:
    """What the tests need of a machine."""

    def __init__(self, code):
        self.memory = GuestMemory([(0, SIZE)])
        self.memory.write(CODE, code)
        self.kvm = Kvm()
        self.vm = self.kvm.create_vm()
        self.vm.create_irqchip()
        self.vm.set_user_memory_region(0, 0, SIZE, self.memory.regions[0].hva)
        self.vcpu = self.vm.create_vcpu(0)
        sregs = self.vcpu.get_sregs()
        for name in ("cs", "ds", "es", "ss"):
            sregs[name] = {**sregs[name], "base": 0, "selector": 0}
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(
            {**dict.fromkeys(self.vcpu.get_regs(), 0), "rip": CODE, "rflags": 2, "rsp": 0x8000}
        )
        self.exit_fd = os.eventfd(0)
        self.pio, self.mmio = Bus("pio"), Bus("mmio")

    def start(self):
        self.vcpu.start(self.pio, self.mmio, self.exit_fd)

    def ended(self, seconds=20.0):
        return bool(select.select([self.exit_fd], [], [], seconds)[0])

    def close(self):
        self.vcpu.close()
        self.vm.close()
        self.kvm.close()
        self.memory.close()
        os.close(self.exit_fd)


@pytest.fixture
def box():
    made = []

    def make(code):
        made.append(Box(code))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Latch:
    """A device that remembers what was written, answers reads with `value`, and returns `action`."""

    def __init__(self, value=0, action=0):
        self.value, self.action, self.written = value, action, []

    def read(self, offset, size):
        assert (offset, size) == (0, 1)
        return self.value

    def write(self, offset, size, value):
        self.written.append((offset, size, value))
        return self.action


def test_run_once_reports_a_port_write(box):
    assert box(OUT_A).vcpu.run_once() == ("io", (PORT, True, 1, b"A"))


def test_an_answer_reaches_the_guest(box):
    vcpu = box(IN + OUT).vcpu
    assert vcpu.run_once()[1][:3] == (PORT, False, 1)
    vcpu.answer(b"\x5a")
    assert vcpu.run_once() == ("io", (PORT, True, 1, b"\x5a"))


def test_run_once_reports_a_memory_read_outside_memory(box):
    vcpu = box(BEYOND).vcpu
    reason, (address, is_write, length, _) = vcpu.run_once()
    assert (reason, address, is_write, length) == ("mmio", 0xF8000, False, 1)


def test_a_kick_before_the_run_is_not_lost(box):
    vcpu = box(AGAIN).vcpu
    vcpu.kick()
    assert vcpu.run_once() == ("interrupted", None)


def test_exits_reach_the_device_at_their_address(box):
    machine = box(IN + OUT + AGAIN)
    latch = Latch(value=0x42, action=1)
    machine.pio.attach_python(PORT, 1, latch)
    machine.start()
    assert machine.ended()
    assert latch.written == [(0, 1, 0x42)]
    assert machine.vcpu.status == "reset"
    assert machine.vcpu.failure is None
    assert machine.vcpu.exits["pio_in"] == 1
    assert machine.vcpu.exits["pio_out"] == 1


def test_a_device_can_switch_the_machine_off(box):
    machine = box(OUT_A)
    machine.pio.attach_python(PORT, 1, Latch(action=2))
    machine.start()
    assert machine.ended()
    assert machine.vcpu.status == "shutdown"


def test_two_devices_cannot_share_an_address(box):
    machine = box(AGAIN)
    machine.pio.attach_python(PORT, 4, Latch())
    for base, size in ((PORT, 1), (PORT - 3, 4), (PORT + 3, 8), (PORT - 1, 100)):
        with pytest.raises(ConfigError, match=f"{PORT:#x}"):
            machine.pio.attach_python(base, size, Latch())
    machine.pio.attach_python(PORT + 4, 1, Latch())
    machine.pio.attach_python(PORT - 4, 4, Latch())


def test_a_vcpu_starts_once(box):
    machine = box(AGAIN)
    machine.start()
    with pytest.raises(StateError):
        machine.start()
    with pytest.raises(StateError):
        machine.vcpu.run_once()


def test_a_vcpu_can_come_up_paused(box):
    machine = box(OUT_A + AGAIN)
    latch = Latch()
    machine.pio.attach_python(PORT, 1, latch)
    machine.vcpu.start(machine.pio, machine.mmio, machine.exit_fd, paused=True)
    machine.vcpu.wait_paused()
    assert machine.vcpu.get_regs()["rip"] == CODE
    assert latch.written == []
    machine.vcpu.resume()
    deadline = time.monotonic() + 20
    while not latch.written and time.monotonic() < deadline:
        time.sleep(0.001)
    assert latch.written


def test_registers_written_while_paused_take_effect(box):
    machine = box(AGAIN + OUT_A)
    latch = Latch(action=1)
    machine.pio.attach_python(PORT, 1, latch)
    machine.start()
    machine.vcpu.pause()
    assert machine.vcpu.get_regs()["rip"] == CODE
    machine.vcpu.set_regs({**machine.vcpu.get_regs(), "rip": CODE + 2})
    machine.vcpu.resume()
    assert machine.ended()
    assert latch.written == [(0, 1, ord("A"))]


def test_many_threads_may_pause_and_resume_at_once(box):
    machine = box(AGAIN)
    machine.start()

    def toggle():
        for _ in range(50):
            machine.vcpu.request_pause()
            machine.vcpu.resume()

    threads = [threading.Thread(target=toggle) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    machine.vcpu.pause()
    assert machine.vcpu.status == "paused"
    machine.vcpu.stop()
    assert machine.vcpu.status == "stopped"


def test_code_outside_memory_is_a_failure_that_shows_registers(box):
    machine = box(AGAIN)
    machine.vcpu.set_regs({**machine.vcpu.get_regs(), "rip": 0xE000})
    sregs = machine.vcpu.get_sregs()
    machine.vcpu.set_sregs(sregs | {"cs": {**sregs["cs"], "base": 0xF0000, "selector": 0xF000}})
    machine.start()
    assert machine.ended()
    assert machine.vcpu.status in ("internal-error", "triple-fault")
    assert machine.vcpu.failure
    assert "rip=0x" in machine.vcpu.description


def test_an_ioeventfd_takes_the_write_without_an_exit(box):
    machine = box(OUT_A + b"\xb0B" + OUT + AGAIN)
    fd = os.eventfd(0)
    machine.vm.ioeventfd(fd, PORT, 1, datamatch=ord("A"), pio=True)
    latch = Latch(action=1)
    machine.pio.attach_python(PORT, 1, latch)
    machine.start()
    assert machine.ended()
    assert os.eventfd_read(fd) == 1
    assert latch.written == [(0, 1, ord("B"))]
    machine.vm.ioeventfd(fd, PORT, 1, datamatch=ord("A"), pio=True, assign=False)
    os.close(fd)


def test_an_ioeventfd_cannot_be_attached_twice(box):
    machine = box(AGAIN)
    fd = os.eventfd(0)
    machine.vm.ioeventfd(fd, PORT, 1, pio=True)
    with pytest.raises(KvmError):
        machine.vm.ioeventfd(fd, PORT, 1, pio=True)
    os.close(fd)


def test_the_dirty_log_names_the_pages_the_guest_wrote(box):
    machine = box(STORE + OUT_A)
    log_dirty_pages = 1
    machine.vm.set_user_memory_region(0, 0, SIZE, machine.memory.regions[0].hva, log_dirty_pages)
    machine.vm.get_dirty_log(0)
    assert machine.vcpu.run_once()[0] == "io"
    stored, code = 1 << 0x2000 // 4096, 1 << CODE // 4096
    # Some hosts map the page that holds the code writable, and count that as written.
    assert int.from_bytes(machine.vm.get_dirty_log(0), "little") in (stored, stored | code)
    assert int.from_bytes(machine.vm.get_dirty_log(0), "little") == 0


def test_state_survives_a_round_trip(box):
    vcpu = box(AGAIN).vcpu
    for name in ("regs", "sregs", "lapic", "mp_state", "xsave", "xcrs", "debugregs", "vcpu_events", "fpu"):
        before = getattr(vcpu, f"get_{name}")()
        getattr(vcpu, f"set_{name}")(before)
        assert getattr(vcpu, f"get_{name}")() == before, name


def test_a_closed_vcpu_says_so(box):
    vcpu = box(AGAIN).vcpu
    vcpu.close()
    vcpu.close()
    with pytest.raises(KvmError, match="closed"):
        vcpu.get_regs()


def test_a_missing_kvm_is_one_sentence(tmp_path):
    with pytest.raises(KvmError, match=r"^cannot open .*: No such file or directory$"):
        Kvm(str(tmp_path / "kvm"))


NEVER_RUNS = """
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/kvm.h>

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == KVM_RUN) {
        errno = EAGAIN;
        return -1;
    }
    return (int)syscall(SYS_ioctl, fd, request, argument);
}
"""

WAITS_FOR_THE_END = """
import sys
from crackle import MicroVM
vm = MicroVM(sys.argv[1], memory=64)
vm.start()
try:
    vm.wait(60)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_kvm_that_never_runs_the_vcpu_ends_it_with_a_reason_and_without_burning_a_cpu(
    guests: Path, tmp_path: Path
) -> None:
    """As where a limit of processes keeps KVM from a thread of its own."""
    library = tmp_path / "never.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", str(library), "-x", "c", "-"], input=NEVER_RUNS.encode(), check=True
    )
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", WAITS_FOR_THE_END, str(guests / "hello.elf")],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"LD_PRELOAD": str(library)},
    )
    after = os.times()
    assert "GuestError" in done.stdout, done
    assert "KVM_RUN failed: Resource temporarily unavailable; KVM could not start a thread" in done.stdout
    assert after.children_user + after.children_system - before.children_user - before.children_system < 30
