"""vhost-user-block under KVM: a guest's disk that QEMU's storage daemon serves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.kvm.conftest import BareMachine
from tests.kvm.test_bare_block import MIB, pattern

from support.vhost_user import DAEMON, StorageDaemon

pytestmark = pytest.mark.skipif(DAEMON is None, reason="no qemu-storage-daemon")


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Callable[..., StorageDaemon]]:
    running: list[StorageDaemon] = []

    def start(size: int = 2 * MIB, seed: int = 7, **options: bool) -> StorageDaemon:
        path = tmp_path / f"image{len(running)}"
        path.write_bytes(pattern(size, seed))
        running.append(StorageDaemon(path, tmp_path, **options))
        return running[-1]

    yield start
    for each in running:
        each.close()


@pytest.fixture
def run(machine: Callable[..., BareMachine]) -> Callable[..., str]:
    """Runs a guest to its clean end, and hangs up: the daemon serves one at a time. What it printed."""

    def run(guest: str, boot_args: str, **options: object) -> str:
        running = machine(guest, boot_args, **options).start()
        status = running.wait_end()
        assert status.exit_code == 0, status
        assert "FAIL" not in running.text
        running.machine.stop()
        return running.text

    return run


def drive(backend: StorageDaemon, **section: object) -> dict[str, object]:
    return {"socket": str(backend.socket), "is_read_only": None, **section}


@pytest.mark.parametrize("features", ["", "noindirect", "noevent", "irq", "noevent irq"])
def test_data_arrive_whole_with_every_way_to_talk(run, backend, features) -> None:
    first = backend()
    run("blk", f"{features} seed=7 t=check,4096,16", drives=[drive(first)])
    run("blk", f"{features} seed=99 t=fill,65536,4 t=check,4096,8", drives=[drive(first)])
    assert first.image.read_bytes() == pattern(2 * MIB, 99)


def test_beside_a_drive_of_our_own(run, backend, tmp_path) -> None:
    first, second = tmp_path / "file", backend(MIB, seed=2)
    first.write_bytes(pattern(MIB, 1))
    drives = [{"path_on_host": str(first)}, drive(second)]
    run("blk", "device=1 irq seed=2 t=check,4096,8", drives=drives)
    run("blk", "device=1 irq seed=5 t=fill,4096,8", drives=drives)
    run("blk", "device=0 irq seed=1 t=check,4096,8", drives=drives)
    assert second.image.read_bytes() == pattern(MIB, 5)


def test_the_device_works_again_after_a_reset(run, backend) -> None:
    first = backend()
    printed = run("blk", "reopen seed=4 t=fill,4096,32 t=check,4096,32", drives=[drive(first)])
    assert printed.count("blk check") == 2
    assert first.image.read_bytes() == pattern(2 * MIB, 4)


def test_nothing_is_lost_while_the_guest_is_paused_again_and_again(machine, backend) -> None:
    first = backend(MIB)
    running = machine("blk", "irq seed=6 t=fill,4096,8 t=check,4096,8", drives=[drive(first)]).start()
    pauses = 0
    while not running.ended(0):
        running.machine.pause()
        running.machine.resume()
        pauses += 1
    assert running.wait_end().exit_code == 0
    assert pauses > 20
    assert "FAIL" not in running.text
    assert first.image.read_bytes() == pattern(MIB, 6)


def test_a_read_only_back_end_refuses_writes(run, backend) -> None:
    printed = run("blk", "seed=8 t=write t=read", drives=[drive(backend(writable=False))])
    assert int(re.findall(r"offered=(\S+)", printed)[0], 16) & 1 << 5
    assert "blk write status=1\n" in printed


def test_memory_is_shared_only_for_such_a_drive(machine, backend, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    assert machine("blk", "t=read", drives=[{"path_on_host": str(path)}]).machine.memory.regions[0].fd == -1
    assert machine("blk", "t=read", drives=[drive(backend())]).machine.memory.regions[0].fd >= 0


def test_a_guest_whose_back_end_dies_can_still_be_stopped(machine, backend) -> None:
    first = backend()
    running = machine("blk", "irq ms=60000 t=randread,4096,8", drives=[drive(first)]).start()
    while not running.machine.metrics()["vhost_user_block_drive0"]["activate_time_us"]:
        assert not running.ended(0.05)
    first.kill()
    assert not running.ended(0.3)
    running.machine.pause()
    running.machine.resume()
    device = running.machine.devices["vhost_user_block", "drive0"]
    assert device.lost
    running.machine.stop()


def test_vmm_process_serves_the_guest_its_disk(vmm, backend) -> None:
    first = backend()
    process = vmm("blk", "seed=11 t=fill,4096,16 t=check,65536,2", drives=[drive(first)])
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "FAIL" not in printed
    assert first.image.read_bytes() == pattern(2 * MIB, 11)
