"""Persistent memory of real microVMs: over the API, under filters, saved, restored, cloned, and refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from crackle import ConfigError, MicroVM, Pmem

from .conftest import Process
from .test_snapshot import by_file, files

PATIENCE = 20.0
MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(3 * MIB))
    return path


def guest(guests: Path, *pmem: Path | Pmem, **options: object) -> MicroVM:
    return MicroVM(guests / "count.elf", boot_args="", memory=64, pmem=pmem, **options)  # type: ignore[arg-type]


def test_over_the_api_a_file_is_there_is_limited_and_goes_through_a_snapshot(
    spawn: Callable[..., Process], guests: Path, image: Path, tmp_path: Path
) -> None:
    process = spawn()
    resource = {"id": "data", "path_on_host": str(image)}
    process.api.ask("PUT", "/pmem/data", resource)
    process.boot(guests / "count.elf", "tick=20")
    process.counted(2)
    limiter = {"ops": {"size": 7, "refill_time": 100, "one_time_burst": None}, "bandwidth": None}
    process.api.ask("PATCH", "/pmem/data", {"id": "data", "rate_limiter": limiter})
    whole = resource | {"root_device": False, "read_only": False, "rate_limiter": limiter}
    assert process.api.ask("GET", "/vm/config", expect=200)["pmem"] == [whole]
    process.api.ask("PATCH", "/vm", {"state": "Paused"})
    process.api.ask("PUT", "/snapshot/create", files(tmp_path))
    process.kill()
    other = image.rename(tmp_path / "other")
    process = spawn()
    process.api.ask("PUT", "/snapshot/load", by_file(tmp_path, resume_vm=True), expect=400)
    overrides = [{"id": "data", "path_on_host": str(other)}]
    process.api.ask("PUT", "/snapshot/load", by_file(tmp_path, resume_vm=True, pmem_overrides=overrides))
    process.counted(process.counted(1) + 1)
    assert process.api.ask("GET", "/vm/config", expect=200)["pmem"] == [whole | {"path_on_host": str(other)}]


def test_a_file_is_one_microvms_unless_all_only_read_it(guests: Path, image: Path) -> None:
    with guest(guests, image):
        with pytest.raises(ConfigError, match=r"Error accessing backing file: Resource temporarily unav"):
            guest(guests, image)
        with pytest.raises(ConfigError, match="another microVM writes to it"):
            guest(guests, Pmem("p", str(image), read_only=True))
    reading = Pmem("p", str(image), read_only=True)
    with guest(guests, reading) as first, guest(guests, reading) as second:
        for vm in (first, second):
            vm.console.expect("count 1\n", PATIENCE)


def test_what_is_only_read_forks_and_what_is_written_does_not(guests: Path, image: Path) -> None:
    with guest(guests, Pmem("p", str(image), read_only=True), own_process=True) as vm:
        vm.console.expect("count 1\n", PATIENCE)
        (clone,) = vm.fork(1)
        with clone:
            clone.console.expect(r"count \d+\n", PATIENCE)
        vm.console.expect(r"count \d+\n", PATIENCE)
    with guest(guests, image) as vm:
        vm.console.expect("count 1\n", PATIENCE)
        with pytest.raises(ConfigError, match="'pmem0' can be written to, and its clones would"):
            vm.fork(1)
        vm.console.expect(r"count \d+\n", PATIENCE)


def test_devices_have_places_of_their_own_and_keep_them(guests: Path, image: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x")

    def places(vm: MicroVM) -> list[tuple[int, int]]:
        machine = vm._machine()
        return sorted((device.gpa, device.size) for device in machine.devices.values())  # type: ignore[attr-defined]

    with guest(guests, image, small) as vm:
        vm.console.expect("count 1\n", PATIENCE)
        before = places(vm)
        (one, size), (other, _) = before
        assert (size, one + size) == (4 * MIB, other)
        vm.snapshot(tmp_path / "s")
    with MicroVM.restore(tmp_path / "s") as vm:
        vm.console.expect(r"count \d+\n", PATIENCE)
        assert places(vm) == before
    small.write_bytes(bytes(3 * MIB))
    with pytest.raises(ConfigError, match=r"Restored pmem size|no room"):
        MicroVM.restore(tmp_path / "s")


@pytest.mark.parametrize(
    ("pmem", "words"),
    [
        ([Pmem("p", "/none")], r"Error accessing backing file: No such file or directory \(os error 2\)"),
        ([Pmem("p", "/tmp")], r"Error accessing backing file: Is a directory"),
        ([Pmem("p", "empty")], "Error backing file size is 0"),
        ([Pmem("a", "image", root_device=True), Pmem("b", "image", root_device=True)], "already exist; 'b'"),
        ([Pmem("p", "image"), Pmem("p", "image")], "two pmem devices have the same id"),
        (["image", 5], r"pmem\[1\] must be a path, not 5"),
        ("image", "pmem must be a list or tuple"),
        ([Pmem("no/id", "image")], "API Resource IDs can only contain"),
    ],
)
def test_what_cannot_be_is_refused(
    guests: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pmem: object, words: str
) -> None:
    (tmp_path / "empty").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        MicroVM(guests / "count.elf", boot_args="", pmem=pmem)  # type: ignore[arg-type]


def test_there_is_one_root_device(guests: Path, image: Path, tmp_path: Path) -> None:
    root = Pmem("p", str(image), root_device=True)
    with pytest.raises(ConfigError, match=r"Attempt to add pmem as a root device while .* block device"):
        MicroVM(guests / "count.elf", str(tmp_path / "image"), pmem=[root], read_only=True)


def test_files_come_and_go_while_the_guest_runs_and_leave_nothing(
    spawn: Callable[..., Process], guests: Path, image: Path
) -> None:
    """Over the API, under filters: a device of the kind is there from the start, so that its code is."""
    process = spawn()
    resource = {"id": "first", "path_on_host": str(image), "read_only": True}
    process.api.ask("PUT", "/pmem/first", resource)
    process.boot(guests / "count.elf", "tick=20")
    process.counted(2)

    def held() -> tuple[int, int]:
        pid = process.process.pid
        return len(os.listdir(f"/proc/{pid}/fd")), Path(f"/proc/{pid}/maps").read_text().count(image.name)

    before = held()
    for _ in range(20):
        process.api.ask("PUT", "/pmem/more", resource | {"id": "more"})
        process.api.ask("PUT", "/pmem/more", resource | {"id": "more"}, expect=400)
        assert len(process.api.ask("GET", "/vm/config", expect=200)["pmem"]) == 2
        process.api.ask("DELETE", "/pmem/more", None)
        process.api.ask("DELETE", "/pmem/more", None, expect=400)
    process.api.ask("PUT", "/pmem/root", resource | {"id": "root", "root_device": True}, expect=400)
    process.api.ask("PUT", "/pmem/none", resource | {"id": "none", "path_on_host": "/none"}, expect=400)
    assert held() == before
    process.counted(process.counted(1) + 1)
