"""Guests whose memory comes from a page-fault handler, by Firecracker's protocol."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crackle import ConfigError, Drive, KvmError, MicroVM
from crackle.snapshot import handover
from crackle.snapshot.inspect import rebase
from crackle.vmm import machine as machine_module
from support.driver import F_VERSION_1, Buffer, Registers, Ring

from .conftest import PATIENCE, Process
from .test_snapshot import saved

SUPPORT = Path(__file__).parents[1]


class Handler:
    """Another process that gives the pages of the memory file `directory`/m, as `how` says."""

    def __init__(self, directory: Path, how: str = "serve") -> None:
        self.path = directory / f"handler{time.monotonic_ns()}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.page_handler", str(self.path), str(directory / "m"), how],
            cwd=SUPPORT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[Callable[..., Handler]]:
    """Starts a page-fault handler for the snapshot in `tmp_path`."""
    started: list[Handler] = []

    def start(how: str = "serve") -> Handler:
        started.append(Handler(tmp_path, how))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def by_handler(directory: Path, handler: Handler, **fields: Any) -> dict[str, Any]:
    """The body of a load."""
    backend = {"backend_type": "Uffd", "backend_path": str(handler.path)}
    return {"snapshot_path": str(directory / "s"), "mem_backend": backend, **fields}


def contents(vm: MicroVM) -> bytes:
    """Of all memory, of a guest that is paused, page by page."""
    memory = vm._machine().memory
    return b"".join(memory.read(region.gpa, region.size) for region in memory.regions)


def test_a_guest_goes_on_from_the_pages_that_a_handler_gives(
    spawn: Callable[..., Process], handler: Callable[..., Handler], guests: Path, tmp_path: Path
) -> None:
    saved(guests, tmp_path)
    serving, process = handler(), spawn()
    process.api.ask("PUT", "/snapshot/load", by_handler(tmp_path, serving, resume_vm=True))
    process.counted(5)
    (mapping,) = json.loads(serving.line())
    address = mapping.pop("base_host_virt_addr")
    assert address % 4096 == 0
    assert mapping == {"size": 64 << 20, "offset": 0, "page_size": 4096, "page_size_kib": 4096}
    process.api.ask("PATCH", "/vm", {"state": "Paused"})
    process.api.ask("PATCH", "/vm", {"state": "Resumed"})
    process.counted(process.numbers()[-1] + 2)


def test_regions_are_handed_over_in_the_order_of_the_memory_file(
    handler: Callable[..., Handler], guests: Path, tmp_path: Path
) -> None:
    saved(guests, tmp_path, track_dirty_pages=False)
    high = (1 << 32) + (300 << 20)
    with MicroVM(guests / "count.elf", boot_args="", memory=3584) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        vm.pause()
        vm._machine().memory.write(high, b"high" * 1024)
        vm.snapshot(tmp_path / "s", tmp_path / "m")
    serving = handler()
    with MicroVM.restore(tmp_path / "s", tmp_path / "m", handler=serving.path) as vm:
        low, above = json.loads(serving.line())
        assert above["offset"] == low["size"]
        assert low["size"] + above["size"] == 3584 << 20
        assert vm._machine().memory.read(high, 4096) == b"high" * 1024
        vm.console.expect("count 5\n", timeout=PATIENCE)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("refuse", "it has closed its connection without taking what it was sent"),
        ("leave", "it has closed its connection"),
    ],
)
def test_a_handler_that_does_not_serve_leaves_the_process_unconfigured(
    spawn: Callable[..., Process],
    handler: Callable[..., Handler],
    guests: Path,
    tmp_path: Path,
    how: str,
    sentence: str,
) -> None:
    saved(guests, tmp_path)
    bad, process = handler(how), spawn()
    fault = process.api.ask("PUT", "/snapshot/load", by_handler(tmp_path, bad, resume_vm=True), expect=400)
    assert fault["fault_message"] == (
        "Load snapshot error: Failed to restore from snapshot: Failed to load guest memory: "
        f"The page-fault handler failed: {sentence}: {bad.path}"
    )
    assert process.api.ask("GET", "/", expect=200)["state"] == "Not started"
    process.api.ask("PUT", "/snapshot/load", by_handler(tmp_path, handler(), resume_vm=True))
    process.counted(4)


def test_a_load_ends_when_no_page_comes(
    handler: Callable[..., Handler], guests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "LOAD_TIMEOUT", 0.3)
    saved(guests, tmp_path)
    with pytest.raises(ConfigError, match=r"The page-fault handler failed: it gave no page within 0.3 s: "):
        MicroVM.restore(tmp_path / "s", tmp_path / "m", handler=handler("silent").path)


def test_the_death_of_a_handler_is_told(
    spawn: Callable[..., Process], handler: Callable[..., Handler], guests: Path, tmp_path: Path
) -> None:
    saved(guests, tmp_path)
    dying, process = handler(), spawn("--level", "Error")
    process.api.ask("PUT", "/snapshot/load", by_handler(tmp_path, dying))
    dying.kill()
    deadline = time.monotonic() + PATIENCE
    while "has closed its connection. If it has ended, the microVM stands still" not in process.text:
        assert time.monotonic() < deadline, process.text
        process.read(0.1)
    process.api.ask("PATCH", "/vm", {"state": "Resumed"})
    # What it does next, nobody can say; but it can be asked, and ended.
    assert process.api.ask("GET", "/", expect=200)["state"] == "Running"
    process.process.terminate()
    process.process.wait(PATIENCE)


@pytest.mark.parametrize("tracking", [False, True])
def test_snapshots_of_a_guest_whose_pages_are_not_all_there_are_complete(
    handler: Callable[..., Handler], guests: Path, tmp_path: Path, tracking: bool
) -> None:
    """What was never asked for is fetched for a full one, and no part of a differential one."""
    with MicroVM(guests / "count.elf", boot_args="", memory=64) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        vm.pause()
        for page in range(1 << 13, 1 << 14, 64):
            vm._machine().memory.write(page << 12, page.to_bytes(8, "little") * 512)
        vm.snapshot(tmp_path / "s", tmp_path / "m")
    with MicroVM.restore(
        tmp_path / "s", tmp_path / "m", handler=handler().path, track_dirty_pages=tracking
    ) as vm:
        vm.console.expect("count 4\n", timeout=PATIENCE)
        vm.pause()
        vm.snapshot(tmp_path / "s2", tmp_path / "diff", differential=True)
        assert (tmp_path / "diff").stat().st_blocks * 512 < 8 << 20
        vm.snapshot(tmp_path / "s3", tmp_path / "full")
        expected = contents(vm)
    assert (tmp_path / "full").read_bytes() == expected
    with pytest.raises(ConfigError, match="the snapshot is a differential one"):
        MicroVM.restore(tmp_path / "s2", tmp_path / "diff")
    rebase(str(tmp_path / "m"), str(tmp_path / "diff"))
    assert (tmp_path / "m").read_bytes() == expected
    with MicroVM.restore(tmp_path / "s2", tmp_path / "m") as vm:
        vm.console.expect("count 6\n", timeout=PATIENCE)


def test_a_snapshot_whose_pages_do_not_come_fails_and_leaves_the_files(
    handler: Callable[..., Handler], guests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "PAGE_TIMEOUT", 0.3)
    saved(guests, tmp_path)
    dying = handler()
    with MicroVM.restore(tmp_path / "s", tmp_path / "m", handler=dying.path, resume=False) as vm:
        dying.kill()
        before = (tmp_path / "m").read_bytes()
        for sentence in ("gave no page within 0.3 s", "still owes pages"):
            with pytest.raises(ConfigError, match=sentence):
                vm.snapshot(tmp_path / "s", tmp_path / "m")
        assert (tmp_path / "m").read_bytes() == before
        assert not [name for name in os.listdir(tmp_path) if name.startswith(("m.", "s."))]
        assert vm.state == "Paused"


HEADER, DATA, STATUS, RING = (at << 20 for at in (32, 36, 40, 44))


def asking(guests: Path, directory: Path, disk: Drive, kind: int) -> None:
    """A snapshot of a guest whose driver has just made a request of the drive: `kind` 0 reads a page, 1 writes one."""
    with MicroVM(guests / "count.elf", boot_args="touch=4", memory=64, drives=[disk]) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        vm.pause()
        machine = vm._machine()
        ring = Ring(machine.memory, RING, 16)
        registers = Registers(machine.mmio, machine.plugs.infos[0].address)
        assert registers.negotiate(F_VERSION_1)
        assert registers.set_up_queue(0, ring)
        registers.drive()
        machine.memory.write(HEADER, struct.pack("<IIQ", kind, 0, 0))
        machine.memory.write(DATA, b"w" * 4096)
        machine.memory.write(STATUS, b"?")
        buffers = [Buffer(HEADER, 16), Buffer(DATA, 4096, kind == 0), Buffer(STATUS, 1, True)]
        ring.offer(ring.add(buffers))
        vm.snapshot(directory / "s", directory / "m")


@pytest.mark.parametrize(("kind", "engine"), [(0, "Sync"), (1, "Sync"), (1, "Async")])
def test_a_device_that_waits_for_a_dead_handler_is_stopped_and_writes_nothing(
    handler: Callable[..., Handler],
    guests: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: int,
    engine: Any,
) -> None:
    monkeypatch.setattr(machine_module, "PAUSE_TIMEOUT", 0.3)
    disk = tmp_path / "disk"
    disk.write_bytes(b"d" * 4096)
    drive = Drive("d", False, path_on_host=str(disk), io_engine=engine)
    asking(guests, tmp_path, drive, kind)
    dying = handler(f"until-{DATA}")
    with MicroVM.restore(tmp_path / "s", tmp_path / "m", handler=dying.path) as vm:
        dying.line()
        assert dying.line() == "asked"
        dying.kill()
        with pytest.raises(KvmError, match=r"did not stand still within 0\.3 s, and the microVM runs on"):
            vm.pause()
        vm.stop()
        assert vm.exit_status is not None
    assert disk.read_bytes() == b"d" * 4096


def test_a_request_whose_pages_come_late_is_served(
    handler: Callable[..., Handler], guests: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"d" * 4096)
    asking(guests, tmp_path, Drive("d", False, path_on_host=str(disk)), 1)
    with MicroVM.restore(tmp_path / "s", tmp_path / "m", handler=handler().path) as vm:
        vm.console.expect("count 4\n", timeout=PATIENCE)
        vm.pause()
        assert vm._machine().memory.read(STATUS, 1) == b"\0"
    assert disk.read_bytes() == b"w" * 4096


def test_a_guest_that_waits_for_a_dead_handler_is_stopped(
    handler: Callable[..., Handler], guests: Path, tmp_path: Path
) -> None:
    saved(guests, tmp_path)
    dying = handler("3")
    with MicroVM.restore(tmp_path / "s", tmp_path / "m", handler=dying.path) as vm:
        dying.process.wait(PATIENCE)
        # Where KVM can be interrupted while it waits for a page, as of Linux 6.2, the pause succeeds.
        with contextlib.suppress(KvmError):
            vm.pause()
        vm.stop()
        assert vm.exit_status is not None
