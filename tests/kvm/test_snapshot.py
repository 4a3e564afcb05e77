"""Guests that are saved and go on elsewhere: in another process, with other files, again and again."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crackle import ConfigError, Drive, MicroVM, NetworkInterface, RateLimiter, TokenBucket, VirtioDevice
from crackle.arch.x86_64 import layout, platform
from crackle.arch.x86_64.board import Board
from crackle.memory.dump import Scan
from crackle.snapshot.inspect import rebase
from support.card import Host, frame
from support.network import Namespace
from support.vhost_user import Impostor

from .conftest import PATIENCE, Process
from .test_bare_vsock import ECHO, connected


def files(directory: Path) -> dict[str, str]:
    return {"snapshot_path": str(directory / "s"), "mem_file_path": str(directory / "m")}


def by_file(directory: Path, **fields: Any) -> dict[str, Any]:
    """The body of a load."""
    backend = {"backend_type": "File", "backend_path": str(directory / "m")}
    return {"snapshot_path": str(directory / "s"), "mem_backend": backend, **fields}


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_guest_goes_on_in_one_process_after_another(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path, vcpus: int
) -> None:
    process = spawn()
    process.boot(guests / "count.elf", f"cpus={vcpus} touch=4", vcpu_count=vcpus)
    process.counted(3)
    last = 0
    for _ in range(4):
        process.api.ask("PATCH", "/vm", {"state": "Paused"})
        process.api.ask("PUT", "/snapshot/create", files(tmp_path))
        process.kill()
        numbers = process.numbers()
        assert numbers == list(range(last + 1, numbers[-1] + 1))
        last = numbers[-1]
        process = spawn()
        process.api.ask("PUT", "/snapshot/load", by_file(tmp_path, resume_vm=True))
        process.counted(last + 2)


def test_the_source_goes_on_too(spawn: Callable[..., Process], guests: Path, tmp_path: Path) -> None:
    process = spawn()
    process.boot(guests / "count.elf", "")
    last = process.counted(2)
    process.api.ask("PATCH", "/vm", {"state": "Paused"})
    for _ in range(3):
        process.api.ask("PUT", "/snapshot/create", files(tmp_path))
    process.api.ask("PATCH", "/vm", {"state": "Resumed"})
    process.counted(last + 3)
    assert process.numbers() == list(range(1, process.numbers()[-1] + 1))


def test_a_loaded_guest_is_paused_until_it_is_resumed(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path
) -> None:
    saved(guests, tmp_path)
    process = spawn("--level", "Info")
    process.api.ask("PUT", "/snapshot/load", by_file(tmp_path))
    assert process.api.ask("GET", "/", expect=200)["state"] == "Paused"
    assert process.api.ask("GET", "/machine-config", expect=200)["mem_size_mib"] == 64
    assert process.api.ask("GET", "/vm/config", expect=200)["boot-source"]["boot_args"] == ""
    process.read(0.3)
    assert process.numbers() == []
    again = process.api.ask("PUT", "/snapshot/load", by_file(tmp_path), expect=400)
    assert again["fault_message"] == ("The requested operation is not supported after starting the microVM.")
    # A snapshot of what has not run is the same.
    process.api.ask("PUT", "/snapshot/create", files(tmp_path))
    process.api.ask("PATCH", "/vm", {"state": "Resumed"})
    process.counted(5)
    assert "'load snapshot' VMM action took " in process.text


def saved(guests: Path, directory: Path, **options: Any) -> None:
    """The snapshot of a guest that counts, as `files` names it."""
    with MicroVM(guests / "count.elf", boot_args="", memory=64, **options) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        vm.snapshot(directory / "s", directory / "m")


def test_a_load_that_fails_changes_nothing(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path
) -> None:
    saved(guests, tmp_path)
    process = spawn()
    before = process.api.ask("GET", "/vm/config", expect=200)
    (tmp_path / "short").write_bytes((tmp_path / "s").read_bytes()[:1000])
    (tmp_path / "bad").write_bytes((tmp_path / "s").read_bytes()[:-1] + b"?")
    (tmp_path / "mem").write_bytes(bytes(64 << 20))
    bodies: list[tuple[dict[str, Any], str]] = [
        (
            {"snapshot_path": "/none"},
            "Failed to open snapshot file: No such file or directory (os error 2): /none",
        ),
        ({"snapshot_path": str(tmp_path)}, "Is a directory (os error 21)"),
        ({"snapshot_path": str(tmp_path / "m")}, "it is no state file of Crackle's"),
        ({"snapshot_path": str(tmp_path / "short")}, "it is truncated: 1000 bytes"),
        ({"snapshot_path": str(tmp_path / "bad")}, "it is corrupt: its checksum does not fit"),
        ({"mem_backend": {"backend_type": "File", "backend_path": "/none"}}, "No such file or directory"),
        (
            {"mem_backend": {"backend_type": "File", "backend_path": str(tmp_path / "mem")}},
            "the memory file is not this snapshot's",
        ),
        (
            {"mem_backend": {"backend_type": "Uffd", "backend_path": "/none"}},
            "Failed to load guest memory: Error creating guest memory from uffd: Failed to connect to UDS Unix stream: "
            "No such file or directory (os error 2): /none",
        ),
        (
            {"network_overrides": [{"iface_id": "e", "host_dev_name": "t"}]},
            "Unknown Network Device. The snapshot has no interface 'e'.",
        ),
        (
            {"drive_overrides": [{"drive_id": "d", "path_on_host": "t"}]},
            "Unknown Block Device. The snapshot has no drive 'd'.",
        ),
        ({"vsock_override": {"uds_path": "v"}}, "Unknown Vsock Device."),
        (
            {"pmem_overrides": [{"id": "p", "path_on_host": "/"}]},
            "Unknown Pmem Device. The snapshot has no pmem device 'p'.",
        ),
        ({"huge_pages": "2M"}, "Cannot restore hugetlbfs backed snapshot by mapping the memory file."),
    ]
    for fields, sentence in bodies:
        fault = process.api.ask("PUT", "/snapshot/load", {**by_file(tmp_path), **fields}, expect=400)
        assert sentence in fault["fault_message"], fields
        assert process.api.ask("GET", "/", expect=200)["state"] == "Not started"
        assert process.api.ask("GET", "/vm/config", expect=200) == before
    process.api.ask("PUT", "/snapshot/load", by_file(tmp_path, resume_vm=True))
    process.counted(4)


def test_a_load_that_fails_leaves_a_monitor_that_boots(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path
) -> None:
    process = spawn()
    process.api.ask("PUT", "/snapshot/load", by_file(tmp_path), expect=400)
    process.boot(guests / "count.elf", "")
    process.counted(2)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 64}),
        ("/vsock", {"guest_cid": 3, "uds_path": "v"}),
    ],
)
def test_nothing_may_be_configured_before_a_load(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    saved(guests, tmp_path)
    process = spawn()
    (tmp_path / "log").touch()
    (tmp_path / "metrics").touch()
    process.api.ask("PUT", path, body)
    fault = process.api.ask("PUT", "/snapshot/load", by_file(tmp_path), expect=400)
    assert fault["fault_message"] == (
        "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
    )
    process = spawn()
    process.api.ask("PUT", "/logger", {"log_path": str(tmp_path / "log"), "level": "Info"})
    process.api.ask("PUT", "/metrics", {"metrics_path": str(tmp_path / "metrics")})
    process.api.ask("PUT", "/serial", {"serial_out_path": str(tmp_path / "console")})
    process.api.ask("PUT", "/snapshot/load", by_file(tmp_path, resume_vm=True))
    process.api.ask("PATCH", "/vm", {"state": "Paused"})
    process.api.ask("PUT", "/snapshot/create", files(tmp_path))
    process.api.ask("PUT", "/actions", {"action_type": "FlushMetrics"})
    latencies = json.loads((tmp_path / "metrics").read_text().splitlines()[-1])["latencies_us"]
    assert all(
        latencies[name]
        for name in ("load_snapshot", "vmm_load_snapshot", "full_create_snapshot", "vmm_full_create_snapshot")
    )
    assert "'create full snapshot' VMM action took " in (tmp_path / "log").read_text()
    # The console is where this process was told, not where that of the snapshot was.
    assert (tmp_path / "console").exists()


def test_a_running_guest_is_not_saved(spawn: Callable[..., Process], guests: Path, tmp_path: Path) -> None:
    process = spawn()
    fault = process.api.ask("PUT", "/snapshot/create", files(tmp_path), expect=400)
    assert fault["fault_message"] == "The requested operation is not supported before starting the microVM."
    process.boot(guests / "count.elf", "")
    fault = process.api.ask("PUT", "/snapshot/create", files(tmp_path), expect=400)
    assert "save/restore unavailable while running. Pause the microVM first." in fault["fault_message"]
    process.api.ask("PATCH", "/vm", {"state": "Paused"})
    bad = {"snapshot_path": str(tmp_path / "none" / "s"), "mem_file_path": str(tmp_path / "m")}
    fault = process.api.ask("PUT", "/snapshot/create", bad, expect=400)
    assert "Create snapshot error: Cannot perform open on the snapshot backing file" in fault["fault_message"]
    assert not (tmp_path / "m").exists()
    process.api.ask("PATCH", "/vm", {"state": "Resumed"})
    process.counted(2)


def test_memory_above_the_hole_is_saved_where_it_is(guests: Path, tmp_path: Path) -> None:
    """Two regions, and a file that takes what is in them and no more."""
    high, low = (1 << 32) + (300 << 20), 500 << 20
    with MicroVM(guests / "count.elf", boot_args="", memory=3584) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        vm.pause()
        memory = vm._machine().memory
        assert len(memory.regions) == 2
        memory.write(high, b"high" * 4096)
        memory.write(low, b"low!" * 4096)
        pages = Scan(memory).pages
        vm.snapshot(tmp_path / "snapshot")
    file = tmp_path / "snapshot" / "memory"
    assert file.stat().st_size == 3584 << 20
    assert file.stat().st_blocks * 512 <= pages * 4096 + (1 << 20)
    with MicroVM.restore(tmp_path / "snapshot") as vm:
        assert vm._machine().memory.read(high, 16384) == b"high" * 4096
        assert vm._machine().memory.read(low, 16384) == b"low!" * 4096
        vm.console.expect("count 5\n", timeout=PATIENCE)


@pytest.mark.parametrize("engine", ["Sync", "Async"])
@pytest.mark.parametrize("limited", [False, True])
def test_a_disk_goes_on_where_it_was_saved(guests: Path, tmp_path: Path, engine: Any, limited: bool) -> None:
    """Requests are in flight, or wait for the limiter, and each is done once: the guest checks every word."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4 << 20))
    limiter = RateLimiter(ops=TokenBucket(size=200, refill_time=100)) if limited else None
    drive = Drive(
        "d", False, path_on_host=str(disk), is_read_only=False, io_engine=engine, rate_limiter=limiter
    )
    tests = "t=fill,4096,32 t=check,4096,16 t=sum,4096,8 " * (1 if limited else 4)
    with MicroVM(guests / "blk.elf", boot_args=tests, memory=64, drives=[drive]) as vm:
        vm.console.expect("blk ", timeout=PATIENCE)
        vm.pause()
        vm.snapshot(tmp_path / "0")
        shutil.copy(disk, tmp_path / "copy0")
    for number in range(3):
        copy, following = str(tmp_path / f"copy{number}"), tmp_path / f"{number + 1}"
        with MicroVM.restore(tmp_path / f"{number}", drives={"d": copy}) as vm:
            assert vm.config.drives[0].path_on_host == copy
            if vm.exit_status is None and number < 2:
                vm.snapshot(following)
                shutil.copy(copy, tmp_path / f"copy{number + 1}")
                continue
            status = vm.wait(timeout=PATIENCE)
            assert status.exit_code == 0
            assert "FAIL" not in vm.console.output.decode()


def test_a_vsock_device_listens_elsewhere_and_takes_new_connections(guests: Path, tmp_path: Path) -> None:
    path, other = str(tmp_path / "v"), str(tmp_path / "w")
    with MicroVM(guests / "vsock.elf", boot_args="t=echo,9", memory=64, vsock=path) as vm:
        vm.console.expect("vsock echo ready", timeout=PATIENCE)
        with connected(path, ECHO) as program:
            program.sendall(b"before")
            assert program.recv(6) == b"before"
            vm.snapshot(tmp_path / "s")
            # The source's connections are as they were.
            program.sendall(b"after!")
            assert program.recv(6) == b"after!"
    with MicroVM.restore(tmp_path / "s", vsock=other) as vm:
        assert not os.path.exists(path)
        with connected(other, ECHO) as program:
            program.sendall(b"again")
            assert program.recv(5) == b"again"
        assert vm.config.vsock is not None
        assert vm.config.vsock.uds_path == other


def test_a_network_interface_is_on_another_tap(namespace: Namespace, guests: Path, tmp_path: Path) -> None:
    first, second = namespace.tap(mtu=1500), namespace.tap(mtu=1500)
    ours, theirs = bytes.fromhex("060000000002"), bytes.fromhex("060000000001")
    frames = [frame(600, source=ours, target=theirs, seed=seed) for seed in range(6)]
    card = NetworkInterface("eth0", first, guest_mac="06:00:00:00:00:01")
    host = Host(namespace, first)
    try:
        with namespace.entered():
            vm = MicroVM(guests / "net.elf", boot_args="t=echo,600,6", memory=64, interfaces=[card])
        with vm:
            vm.console.expect("net", timeout=PATIENCE)
            for each in frames[:3]:
                host.send(each)
            assert len(host.frames(3)) == 3
            vm.snapshot(tmp_path / "s")
    finally:
        host.close()
    host = Host(namespace, second)
    try:
        with namespace.entered():
            vm = MicroVM.restore(tmp_path / "s", interfaces={"eth0": second})
        with vm:
            assert vm.config.network_interfaces[0].host_dev_name == second
            for each in frames[3:]:
                host.send(each)
            assert len(host.frames(3)) == 3
            assert vm.wait(timeout=PATIENCE).exit_code == 0
    finally:
        host.close()


class Keeper(VirtioDevice):
    """Keeps a word."""

    device_id = 42
    queue_sizes = (8,)
    word = b"new"

    def save(self) -> bytes:
        return self.word

    def restore(self, data: bytes) -> None:
        self.word = data


def test_a_device_written_in_python_gets_what_it_saved(guests: Path, tmp_path: Path) -> None:
    keeper = Keeper()
    keeper.word = b"kept"
    saved(guests, tmp_path, devices=[keeper])
    fresh = Keeper()
    with MicroVM.restore(tmp_path / "s", tmp_path / "m", devices=[fresh]) as vm:
        assert fresh.word == b"kept"
        vm.console.expect("count 4\n", timeout=PATIENCE)
    with pytest.raises(ConfigError, match="its guest has a custom device 'keeper0', which is not given"):
        MicroVM.restore(tmp_path / "s", tmp_path / "m")
    with pytest.raises(ConfigError, match="its guest does not know these devices: keeper1"):
        MicroVM.restore(tmp_path / "s", tmp_path / "m", devices=[Keeper(), Keeper()])


def test_the_metadata_service_is_there_and_its_document_is_not(
    namespace: Namespace, guests: Path, tmp_path: Path
) -> None:
    card = NetworkInterface("eth0", namespace.tap(mtu=1500))
    with namespace.entered():
        vm = MicroVM(guests / "count.elf", boot_args="", memory=64, interfaces=[card], metadata={"a": 1})
        with vm:
            vm.console.expect("count 2\n", timeout=PATIENCE)
            vm.snapshot(tmp_path / "s")
        for document, expected in ((None, {}), ({"b": 2}, {"b": 2})):
            with MicroVM.restore(tmp_path / "s", metadata=document) as vm:
                assert vm.metadata == expected
                assert vm.config.mmds_config is not None
                assert vm.config.mmds_config.version == "V2"
                vm.console.expect("count 4\n", timeout=PATIENCE)


def test_a_drive_of_another_process_is_not_saved(guests: Path, tmp_path: Path) -> None:
    backend = Impostor(tmp_path / "backend")
    try:
        drive = Drive("d", False, socket=backend.path)
        with MicroVM(guests / "count.elf", boot_args="", memory=64, drives=[drive]) as vm:
            vm.console.expect("count 2\n", timeout=PATIENCE)
            with pytest.raises(
                ConfigError, match="does not support snapshots of a microVM with a vhost-user drive"
            ):
                vm.snapshot(tmp_path / "s")
            assert os.listdir(tmp_path / "s") == []
            vm.console.expect("count 4\n", timeout=PATIENCE)
    finally:
        backend.close()


def test_what_is_wrong_with_the_devices_is_told_and_leaves_nothing_open(guests: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    saved(guests, tmp_path, drives=[str(disk)], vsock=str(tmp_path / "v"))
    disk.unlink()
    gc.collect()  # what earlier tests have left to it
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"No such file or directory \(os error 2\)"):
        MicroVM.restore(tmp_path / "s", tmp_path / "m")
    disk.write_bytes(bytes(4096))
    (tmp_path / "v").touch()
    with pytest.raises(ConfigError, match="v"):
        MicroVM.restore(tmp_path / "s", tmp_path / "m")
    assert set(os.listdir("/proc/self/fd")) == before
    (tmp_path / "v").unlink()
    with MicroVM.restore(tmp_path / "s", tmp_path / "m") as vm:
        vm.console.expect("count 4\n", timeout=PATIENCE)


@pytest.mark.parametrize("huge_pages", ["None", "Transparent"])
def test_the_clock_may_go_on_and_memory_be_backed_otherwise(
    guests: Path, tmp_path: Path, huge_pages: Any
) -> None:
    saved(guests, tmp_path)
    with MicroVM.restore(
        tmp_path / "s", tmp_path / "m", huge_pages=huge_pages, clock_realtime=True, track_dirty_pages=True
    ) as vm:
        machine = vm.config.machine_config
        assert machine is not None
        assert (machine.huge_pages, machine.track_dirty_pages) == (huge_pages, True)
        vm.console.expect("count 4\n", timeout=PATIENCE)


def test_a_client_that_goes_away_harms_nothing(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path
) -> None:
    process = spawn()
    process.boot(guests / "count.elf", "")
    process.counted(2)
    process.api.ask("PATCH", "/vm", {"state": "Paused"})
    body = json.dumps(files(tmp_path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(process.api.path))
        client.sendall(f"PUT /snapshot/create HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    process.api.ask("PATCH", "/vm", {"state": "Resumed"})
    process.counted(process.numbers()[-1] + 1)
    process.kill()
    # It has been served, or it has not.
    made = {"s", "m"} & set(os.listdir(tmp_path))
    assert made in (set(), {"s", "m"})
    if made:
        with MicroVM.restore(tmp_path / "s", tmp_path / "m") as vm:
            vm.console.expect(r"count \d+\n", timeout=PATIENCE)


@pytest.mark.parametrize("good", [True, False])
def test_a_client_that_goes_away_amid_a_load_harms_nothing(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path, good: bool
) -> None:
    saved(guests, tmp_path)
    process = spawn()
    body = json.dumps(by_file(tmp_path if good else tmp_path / "none", resume_vm=True))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(process.api.path))
        client.sendall(f"PUT /snapshot/load HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    # It has been served, or it has not, and then somebody else is.
    if process.api.ask("GET", "/", expect=200)["state"] == "Not started":
        process.api.ask("PUT", "/snapshot/load", by_file(tmp_path, resume_vm=True))
    process.counted(4)


@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("merged", ["by hand", "in place"])
def test_differential_snapshots_go_on_where_they_were_taken(
    guests: Path, tmp_path: Path, tracking: bool, merged: str
) -> None:
    """Full, then differential ones in a chain through restores; each is merged into the one before."""
    base = tmp_path / "base"
    with MicroVM(guests / "count.elf", boot_args="touch=2", memory=64, track_dirty_pages=tracking) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        vm.snapshot(tmp_path / "s0", base)
    last = 0
    for number in range(4):
        diff = base if merged == "in place" else tmp_path / "diff"
        with MicroVM.restore(tmp_path / f"s{number}", base, track_dirty_pages=tracking) as vm:
            found = vm.console.expect(r"count (\d+)\n", timeout=PATIENCE)
            assert int(found[1]) > last
            last = int(vm.console.expect(r"count (\d+)\n", timeout=PATIENCE)[1])
            vm.pause()
            vm.snapshot(tmp_path / f"s{number + 1}", diff, differential=True)
            content = b"".join(vm._machine().memory.read(r.gpa, r.size) for r in vm._machine().memory.regions)
        if merged == "by hand":
            # 2 MiB that the guest changes, and not the whole of it.
            assert diff.stat().st_blocks * 512 < 8 << 20
            if number:
                with pytest.raises(ConfigError, match=r"the memory file is not this snapshot's"):
                    MicroVM.restore(tmp_path / f"s{number + 1}", diff)
            rebase(str(base), str(diff))
            diff.unlink()
        assert base.read_bytes() == content
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("base")) == ["base"]


def test_several_differential_snapshots_of_one_guest(guests: Path, tmp_path: Path) -> None:
    """A differential one has what was written since the last that succeeded."""
    with MicroVM(guests / "count.elf", boot_args="touch=2", memory=64, track_dirty_pages=True) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        memory = vm._machine().memory
        vm.pause()
        vm.snapshot(tmp_path / "s", tmp_path / "base")
        memory.write(40 << 20, b"written by the host")
        with pytest.raises(ConfigError):
            vm.snapshot(tmp_path / "none" / "s", tmp_path / "d1", differential=True)
        vm.snapshot(tmp_path / "s", tmp_path / "d1", differential=True)
        assert (tmp_path / "d1").stat().st_blocks * 512 < 1 << 20
        with (tmp_path / "d1").open("rb") as file:
            file.seek(40 << 20)
            assert file.read(19) == b"written by the host"
        # Nothing has happened since, and there is nothing in it.
        vm.snapshot(tmp_path / "s", tmp_path / "d2", differential=True)
        assert (tmp_path / "d2").stat().st_blocks <= 8 * 8
        vm.resume()
        vm.console.expect(r"count \d+\n", timeout=PATIENCE)
        vm.console.expect(r"count \d+\n", timeout=PATIENCE)
        vm.pause()
        vm.snapshot(tmp_path / "s", tmp_path / "d3", differential=True)
        for name in ("d1", "d2", "d3"):
            rebase(str(tmp_path / "base"), str(tmp_path / name))
        assert (tmp_path / "base").read_bytes() == memory.read(0, 64 << 20)
    with MicroVM.restore(tmp_path / "s", tmp_path / "base") as vm:
        vm.console.expect(r"count \d+\n", timeout=PATIENCE)
        vm.console.expect(r"count \d+\n", timeout=PATIENCE)


def test_the_command_shows_and_merges(guests: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    with MicroVM(guests / "count.elf", boot_args="", memory=64, drives=[str(disk)]) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        vm.snapshot(tmp_path / "snapshot")

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "crackle.cli.main", "snapshot", *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=60)

    shown = command("show", tmp_path / "snapshot").stdout
    assert "kind:        full\n" in shown
    assert "memory:      64 MiB\n" in shown
    assert f"device:      block drive0 at 0xc0001000, interrupt 5, {disk}\n" in shown
    assert "no state file of Crackle's" in command("show", disk).stderr
    wrong = command("rebase", "--base", disk, "--diff", tmp_path / "snapshot" / "memory")
    assert wrong.returncode == 1
    assert f"it has {64 << 20} bytes, the other 4096" in wrong.stderr
    assert disk.read_bytes() == bytes(4096)


def generation_id(vm: MicroVM) -> bytes:
    return vm._machine().memory.read(layout.VMGENID_ADDR, 16)


def test_whoever_goes_on_from_a_snapshot_has_another_generation_id(guests: Path, tmp_path: Path) -> None:
    with MicroVM(guests / "count.elf", boot_args="", memory=64) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        found = [generation_id(vm)]
        vm.snapshot(tmp_path)
        assert generation_id(vm) == found[0], "it is the same machine still"
    for _ in range(2):
        with MicroVM.restore(tmp_path) as vm:
            found.append(generation_id(vm))
            vm.console.expect("count 4\n", timeout=PATIENCE)
    assert len(set(found)) == 3


def clock_page(vm: MicroVM) -> tuple[int, int, int]:
    """Its sequence, its marker and the guest's generation."""
    page = vm._machine().memory.read(layout.VMCLOCK_ADDR, 112)
    assert page[:4] == b"VCLK"
    sequence, marker = struct.unpack_from("<IQ", page, 12)
    return sequence, marker, struct.unpack_from("<Q", page, 104)[0]


def test_vmclock_counts_how_often_a_guest_went_on(guests: Path, tmp_path: Path) -> None:
    with MicroVM(guests / "count.elf", boot_args="", memory=64) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        assert clock_page(vm) == (0, 0, 0)
        vm.snapshot(tmp_path / "0")
        assert clock_page(vm) == (0, 0, 0), "it is the same machine still"
    for number in range(2):
        with MicroVM.restore(tmp_path / f"{number}") as vm:
            vm.console.expect(r"count \d+\n", timeout=PATIENCE)
            assert clock_page(vm) == (2 * number + 2, number + 1, number + 1)
            (clone,) = vm.fork(1)
            with clone:
                assert clone.state == "Running"
            vm.snapshot(tmp_path / f"{number + 1}")


def test_a_device_on_the_line_that_now_is_the_generation_ids_is_where_it_was(
    guests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a guest with nineteen devices that began before there was a generation ID."""
    disks = [tmp_path / f"disk{index}" for index in range(19)]
    for disk in disks:
        disk.write_bytes(bytes(4096))
    with monkeypatch.context() as then:
        then.setattr(platform, "DEVICE_LINES", platform.SAVED_DEVICE_LINES)
        vm = MicroVM(guests / "count.elf", boot_args="", memory=64, drives=disks)
        vm.start()
    with vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        board = vm._machine().board
        assert isinstance(board, Board)
        board._vmgenid = None
        assert max(info.gsi for info in vm._machine().plugs.infos) == layout.GSI_VMGENID
        vm.snapshot(tmp_path / "0")
    for number in range(2):
        with MicroVM.restore(tmp_path / f"{number}") as vm:
            assert [info.gsi for info in vm._machine().plugs.infos] == [*range(5, 24)]
            vm.console.expect(r"count \d+\n", timeout=PATIENCE)
            vm.snapshot(tmp_path / f"{number + 1}")


def test_a_snapshot_of_a_guest_without_a_generation_id_is_loaded_as_it_is(
    guests: Path, tmp_path: Path
) -> None:
    with MicroVM(guests / "count.elf", boot_args="", memory=64) as vm:
        vm.console.expect("count 2\n", timeout=PATIENCE)
        vm.pause()
        board = vm._machine().board
        assert isinstance(board, Board)
        board._vmgenid = board._vmclock = None
        vm._machine().memory.write(layout.VMGENID_ADDR, b"the guest's own.")
        vm._machine().memory.write(layout.VMCLOCK_ADDR, b"too\0")
        vm.snapshot(tmp_path / "0")
    for number in range(2):
        with MicroVM.restore(tmp_path / f"{number}") as vm:
            assert generation_id(vm) == b"the guest's own."
            assert vm._machine().memory.read(layout.VMCLOCK_ADDR, 4) == b"too\0"
            vm.snapshot(tmp_path / f"{number + 1}")
