"""A vCPU's thread and descriptors, as far as they can be seen without KVM: here, KVM_RUN fails."""

from __future__ import annotations

import gc
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from crackle.errors import KvmError, StateError
from crackle.kvm import Bus, Kvm, Vcpu

RUN_SIZE = 4096


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def vcpu() -> Iterator[Vcpu]:
    fd = os.memfd_create("kvm_run")
    os.ftruncate(fd, RUN_SIZE)
    vcpu = Vcpu(fd, 3, RUN_SIZE)
    yield vcpu
    vcpu.close()


@pytest.fixture
def exit_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def start(vcpu: Vcpu, exit_fd: int = -1) -> None:
    vcpu.start(Bus("pio"), Bus("mmio"), exit_fd)


def test_a_vcpu_that_cannot_run_says_why_and_signals_its_end(vcpu: Vcpu, exit_fd: int) -> None:
    assert (vcpu.status, vcpu.failure, vcpu.description) == ("new", None, None)
    start(vcpu, exit_fd)
    assert select.select([exit_fd], [], [], 10)[0]
    assert vcpu.status == "run-failed"
    assert vcpu.failure == "vCPU 3: KVM_RUN failed: Inappropriate ioctl for device"
    assert vcpu.exits["pio_out"] == vcpu.exits["mmio_read"] == 0


def test_orders_to_a_vcpu_that_has_ended_do_nothing(vcpu: Vcpu, exit_fd: int) -> None:
    start(vcpu, exit_fd)
    select.select([exit_fd], [], [], 10)
    vcpu.pause()
    vcpu.resume()
    vcpu.request_stop()
    vcpu.stop()
    vcpu.stop()
    assert vcpu.status == "run-failed"
    os.eventfd_read(exit_fd)
    with pytest.raises(StateError, match="vCPU 3 has been started already"):
        start(vcpu)


def test_orders_to_a_vcpu_that_was_never_started_do_nothing(vcpu: Vcpu) -> None:
    vcpu.pause()
    vcpu.resume()
    vcpu.request_pause()
    vcpu.wait_paused()
    vcpu.stop()
    assert vcpu.status == "new"


def test_the_end_can_be_watched_from_another_thread_while_it_happens() -> None:
    for _ in range(200):
        fd = os.memfd_create("kvm_run")
        os.ftruncate(fd, RUN_SIZE)
        vcpu = Vcpu(fd, 0, RUN_SIZE)
        start(vcpu)
        while (status := vcpu.status) != "run-failed":
            assert status == "running"
        vcpu.close()


def test_threads_stopping_it_at_once_all_return(vcpu: Vcpu) -> None:
    start(vcpu)
    stopping = [threading.Thread(target=vcpu.stop) for _ in range(4)]
    for thread in stopping:
        thread.start()
    for thread in stopping:
        thread.join(10)
    assert not any(thread.is_alive() for thread in stopping)


def test_a_closed_vcpu_refuses_everything_that_needs_one(vcpu: Vcpu) -> None:
    vcpu.close()
    vcpu.close()
    vcpu.kick()
    assert vcpu.fd == -1
    for order in (
        lambda: start(vcpu),
        vcpu.run_once,
        lambda: vcpu.answer(b""),
        lambda: vcpu.time_exits(1),
        vcpu.get_regs,
        lambda: vcpu.set_lapic(bytes(1024)),
    ):
        with pytest.raises((StateError, KvmError), match="closed"):
            order()


def test_the_descriptor_is_closed_with_its_vcpu_and_when_it_cannot_be_one() -> None:
    gc.collect()
    before = fds()
    fd = os.memfd_create("kvm_run")
    os.ftruncate(fd, RUN_SIZE)
    vcpu = Vcpu(fd, 0, RUN_SIZE)
    start(vcpu)
    del vcpu
    assert fds() == before
    for fd in (os.open("/dev/null", os.O_RDONLY), *os.pipe()):
        with pytest.raises(KvmError, match="cannot map the kvm_run page of vCPU 5"):
            Vcpu(fd, 5, RUN_SIZE)
    assert fds() == before


WRONG_ARGUMENTS = """
import os
from crackle.kvm import Vcpu
from crackle.memory import GuestMemory
from crackle.virtio.block.device import Block

for kind, *arguments in ((Vcpu,), (Vcpu, "fd", 0, 0), (Vcpu, 0, "index", 0), (Block,), (Block, 7, "path")):
    try:
        kind(*arguments)
    except TypeError:
        os.fstat(0)
"""


def test_wrong_arguments_close_no_descriptor_that_was_not_given() -> None:
    """An object that was never initialised has zeros for descriptors."""
    subprocess.run([sys.executable, "-c", WRONG_ARGUMENTS], check=True, timeout=60, stdin=subprocess.PIPE)


@pytest.mark.parametrize(
    ("setter", "size"), [("set_lapic", 1024), ("set_xsave", 4096), ("set_xcrs", 392), ("set_debugregs", 128)]
)
def test_a_state_of_a_wrong_size_is_refused(vcpu: Vcpu, setter: str, size: int) -> None:
    for wrong in (bytes(size - 1), bytes(size + 1), b""):
        with pytest.raises(ValueError, match=f"is {size} bytes, not {len(wrong)}"):
            getattr(vcpu, setter)(wrong)
    with pytest.raises(KvmError, match="of vCPU 3: Inappropriate ioctl"):
        getattr(vcpu, setter)(bytes(size))


def test_too_many_cpuid_leaves_are_refused(vcpu: Vcpu) -> None:
    with pytest.raises(KvmError, match="257 CPUID leaves, KVM takes 256"):
        vcpu.set_cpuid2([(0,) * 7] * 257)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/nonexistent", "No such file or directory"),
        ("/dev/null", "Inappropriate ioctl"),
        ("/", "Is a directory"),
    ],
)
def test_what_is_not_kvm_is_refused_and_closed(path: str, why: str) -> None:
    before = fds()
    with pytest.raises(KvmError, match=why):
        Kvm(path)
    assert fds() == before
