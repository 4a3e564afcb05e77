"""A pause succeeds in bounded time or changes nothing, whatever the guest has asked for and whoever does not answer."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crackle import MicroVM
from crackle.errors import KvmError, StateError
from crackle.schema import Drive
from support.driver import F_VERSION_1, NEXT, WRITE, Registers, Ring
from support.faults import MissingPages
from support.vhost_user import Impostor

PATIENCE = 60.0


def sparse(path: Path, size: int) -> str:
    with path.open("wb") as file:
        file.truncate(size)
    return str(path)


@contextmanager
def hostile(guests: Path, tmp_path: Path, engine: str, count: int) -> Iterator[MicroVM]:
    disk = Drive(
        "d", False, path_on_host=sparse(tmp_path / "disk", 1 << 30), is_read_only=True, io_engine=engine
    )  # type: ignore[arg-type]
    with MicroVM(guests / "hostile.elf", drives=[disk], boot_args=f"n={count}", memory=64) as vm:
        vm.console.expect("hostile")
        yield vm


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def beats(vm: MicroVM) -> None:
    """See the guest run on."""
    for _ in range(2):
        vm.console.expect("beat", timeout=PATIENCE)


@pytest.mark.parametrize("engine", ["Sync", "Async"])
def test_a_pause_does_not_wait_for_what_the_guest_has_asked_for(
    guests: Path, tmp_path: Path, engine: str
) -> None:
    with hostile(guests, tmp_path, engine, 250) as vm:
        for _ in range(20):
            vm.pause()
            done = vm.metrics()["block_d"]["read_count"]
            assert vm.state == "Paused"
            assert vm.metrics()["block_d"]["read_count"] == done < 250
            vm.resume()
            assert vm.state == "Running"
        beats(vm)


@pytest.mark.parametrize("engine", ["Sync", "Async"])
def test_what_a_pause_finds_begun_is_done_afterwards_and_once(
    guests: Path, tmp_path: Path, engine: str
) -> None:
    with hostile(guests, tmp_path, engine, 3) as vm:
        for _ in range(20):
            vm.pause()
            vm.resume()
        wait_until(lambda: vm.metrics()["block_d"]["read_count"] == 3)
        beats(vm)
        counters = vm.metrics()["block_d"]
        assert (counters["read_count"], counters["execute_fails"], counters["event_fails"]) == (3, 0, 0)


class Stuck:
    """A request that waits for a page of guest memory that nobody gives. op: 0 reads the disk, 1 writes it."""

    def __init__(self, vm: MicroVM, op: int) -> None:
        base, header, status, data = 0x2000000, 0x2010000, 0x2011000, 0x2200000
        self._machine = vm._machine()
        memory = self._machine.memory
        registers = Registers(self._machine.mmio, 0xC0001000)
        self.ring = Ring(memory, base, 8)
        assert registers.negotiate(F_VERSION_1)
        assert registers.set_up_queue(0, self.ring)
        registers.drive()
        memory.write(header, struct.pack("<IIQ", op, 0, 0))
        self.ring.write_descriptor(0, header, 16, NEXT, 1)
        self.ring.write_descriptor(1, data, 4096, NEXT | (WRITE if op == 0 else 0), 2)
        self.ring.write_descriptor(2, status, 1, WRITE, 0)
        self.pages = MissingPages(memory.regions[0].hva + data, 2 << 20)

    def submit(self) -> None:
        self.ring.offer(0)
        os.eventfd_write(self._machine.devices["block", "d"].notify_fds[0], 1)


@pytest.mark.parametrize(
    ("engine", "op", "words"),
    [
        ("Sync", 0, r"^the io thread did not stand still within 2 s, and the microVM runs on"),
        # The kernel's workers write what a file system cannot take without waiting; the thread itself is free.
        ("Async", 1, r"^what is in flight for the block device 'd' was not done within 2 s, and the microVM"),
    ],
)
def test_a_pause_under_a_disk_that_does_not_answer_fails_and_the_guest_goes_on(
    guests: Path, tmp_path: Path, engine: str, op: int, words: str
) -> None:
    path = sparse(tmp_path / "disk", 1 << 20)
    disk = Drive("d", False, path_on_host=path, is_read_only=False, io_engine=engine)  # type: ignore[arg-type]
    with MicroVM(guests / "idle.elf", drives=[disk], boot_args="tick=100 beats=10", memory=64) as vm:
        beats(vm)
        stuck = Stuck(vm, op)
        with stuck.pages:
            stuck.submit()
            for _ in range(2):
                with pytest.raises(KvmError, match=words):
                    vm.pause()
                assert vm.state == "Running"
                beats(vm)
            vm.resume()
            beats(vm)
            assert stuck.ring.used_idx == 0
        wait_until(lambda: stuck.ring.used_idx == 1)
        vm.pause()
        assert vm.state == "Paused"
        vm.resume()
        beats(vm)


def test_a_pause_does_not_wait_for_long_for_another_process(guests: Path, tmp_path: Path) -> None:
    """A guest may ask for what no back end can do: that must not keep it from being paused. It is not saved then."""
    backend = Impostor(tmp_path / "backend")
    try:
        with MicroVM(
            guests / "idle.elf",
            drives=[Drive("d", False, socket=backend.path)],
            boot_args="tick=100 beats=10",
            memory=64,
        ) as vm:
            beats(vm)
            machine = vm._machine()
            registers = Registers(machine.mmio, 0xC0001000)
            ring = Ring(machine.memory, 0x2000000, 8)
            assert registers.negotiate(F_VERSION_1)
            assert registers.set_up_queue(0, ring)
            registers.drive()
            ring.write_descriptor(0, 0x2010000, 16, WRITE, 0)
            ring.offer(0)
            vm.pause()
            assert vm.state == "Paused"
            with pytest.raises(StateError, match="has not done what the guest asked for"):
                machine.plugs.transports["vhost_user_block", "d"].save()
            vm.resume()
            beats(vm)
    finally:
        backend.close()


def test_a_pause_under_a_vcpu_that_does_not_answer_fails_and_the_guest_goes_on(guests: Path) -> None:
    with MicroVM(guests / "hammer.elf", memory=64) as vm:
        vm.console.expect("hammer")
        keyboard = vm._machine().board.i8042  # type: ignore[union-attr]
        entered, go_on, read = threading.Event(), threading.Event(), keyboard.read

        def stuck(offset: int, size: int) -> int:
            entered.set()
            go_on.wait(PATIENCE)
            return int(read(offset, size))

        keyboard.read = stuck
        assert entered.wait(PATIENCE)
        with pytest.raises(
            KvmError, match=r"^vCPU 0 did not stand still within 2 s, and the microVM runs on"
        ):
            vm.pause()
        assert vm.state == "Running"
        del keyboard.read
        go_on.set()
        before = vm.metrics()["vcpu"]["exit_io_in"]
        wait_until(lambda: vm.metrics()["vcpu"]["exit_io_in"] > before + 1000)
        vm.pause()
        assert vm.state == "Paused"


def test_a_machine_is_stopped_while_it_cannot_be_paused_once_the_disk_answers(
    guests: Path, tmp_path: Path
) -> None:
    """Stopping waits: the thread may write to guest memory for as long."""
    with hostile(guests, tmp_path, "Sync", 250) as vm:
        done = threading.Event()
        stopping = threading.Thread(target=lambda: (vm.stop(), done.set()))
        stopping.start()
        assert done.wait(PATIENCE)
        stopping.join()
        assert vm.state == "Stopped"
