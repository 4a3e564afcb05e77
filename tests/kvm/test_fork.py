"""A running guest forks: it and its clones go on from one place, each with memory, disks and descriptors of its own."""

from __future__ import annotations

import contextlib
import functools
import gc
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET

from crackle import ConfigError, Drive, MicroVM, Overlay
from support.card import Host, frame
from support.launcher import ZygoteProcess
from support.network import Namespace

from .conftest import PATIENCE, Client, Process
from .test_bare_vsock import ECHO, connected

Ask = Callable[..., dict[str, Any]]


class Clone:
    """A clone that runs: its process, its API, and what its guest has said."""

    def __init__(self, answer: dict[str, Any], console: Path) -> None:
        self.id: str = answer["id"]
        self.pid: int = answer["pid"]
        self.socket = Path(answer["api_sock"])
        self.console = console
        self.end = os.pidfd_open(self.pid)
        self.api = Client(self.socket)

    @property
    def text(self) -> str:
        return self.console.read_text(errors="replace").replace("\r", "") if self.console.exists() else ""

    def numbers(self) -> list[int]:
        return counted_in(self.text)

    def counted(self, more: int) -> list[int]:
        """What it has counted, once that is so many numbers."""
        return until(lambda: numbers if len(numbers := self.numbers()) >= more else None, lambda: self.text)

    def ended(self, seconds: float = PATIENCE) -> bool:
        return bool(select.select([self.end], [], [], seconds)[0])

    def kill(self) -> None:
        self.api.close()
        if not self.ended(0):
            signal.pidfd_send_signal(self.end, signal.SIGKILL)
        assert self.ended()
        os.close(self.end)


def until(found: Callable[[], Any], told: Callable[[], object]) -> Any:
    """What is found in the end."""
    deadline = time.monotonic() + PATIENCE
    while (result := found()) is None:
        assert time.monotonic() < deadline, told()
        select.select([], [], [], 0.01)
    return result


def counted_in(text: str) -> list[int]:
    assert "FAIL" not in text
    lines = text.split("\n")[:-1]
    return [int(line[6:]) for line in lines if line.startswith("count ") and line[6:].isdigit()]


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path)
    yield process
    process.kill()


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Callable[..., list[Clone]]]:
    """Forks a microVM by its API: fork(client, {field: value} for each clone); the clones, their consoles in files."""
    made: list[Clone] = []

    def fork(api: Client, *clones: dict[str, Any]) -> list[Clone]:
        first = len(made)
        consoles = [tmp_path / f"console{first + number}" for number in range(len(clones))]
        bodies = [
            {"serial_out_path": str(console), **clone}
            for console, clone in zip(consoles, clones, strict=True)
        ]
        answer = api.ask("PUT", "/vm/fork", {"clones": bodies}, expect=200)
        new = [Clone(each, console) for each, console in zip(answer["clones"], consoles, strict=True)]
        made.extend(new)
        return new

    yield fork
    for each in made:
        each.kill()


def contiguous(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[-1] + 1))


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("huge_pages", ["None", "Transparent"])
def test_parent_and_clones_go_on_counting_from_the_same_number(
    parent: Process, fork: Callable[..., list[Clone]], guests: Path, vcpus: int, huge_pages: str
) -> None:
    """The guest looks after its memory: what one writes is not in another's."""
    options: dict[str, Any] = {"vcpu_count": vcpus, "huge_pages": huge_pages}
    parent.boot(guests / "count.elf", f"cpus={vcpus} touch=4", **options)
    parent.counted(3)
    clones = fork(parent.api, {"id": "one"}, {"id": "two"}, {})
    assert [clone.id for clone in clones[:2]] == ["one", "two"]
    assert clones[2].id.startswith("clone-")
    assert clones[2].socket == parent.api.path.parent / f"{clones[2].id}.sock"
    first = {clone.counted(5)[0] for clone in clones}
    # At most the line that was being said is the parent's in one half and the clones' in the other.
    assert len(first) == 1
    parent.counted(max(first) + 3)
    assert contiguous(parent.numbers())
    assert parent.numbers()[0] == 1
    for clone in clones:
        assert contiguous(clone.numbers())
        assert clone.api.ask("GET", "/", expect=200)["id"] == clone.id
        assert clone.api.ask("GET", "/", expect=200)["state"] == "Running"
        assert clone.api.ask("GET", "/machine-config", expect=200)["vcpu_count"] == vcpus


def test_forks_of_forks_go_on_when_their_parents_are_gone(
    parent: Process, fork: Callable[..., list[Clone]], guests: Path
) -> None:
    parent.boot(guests / "count.elf", "touch=2")
    parent.counted(2)
    (child,) = fork(parent.api, {"id": "child"})
    child.counted(2)
    parent.kill()
    (grandchild,) = fork(child.api, {"id": "grandchild"})
    signal.pidfd_send_signal(child.end, signal.SIGKILL)
    assert child.ended()
    last = grandchild
    for generation in range(4):
        last.counted(2)
        (following,) = fork(last.api, {"id": f"generation{generation}"})
        signal.pidfd_send_signal(last.end, signal.SIGTERM)
        assert last.ended()
        last = following
    numbers = last.counted(3)
    assert contiguous(numbers)
    assert numbers[0] > grandchild.numbers()[0]


def test_a_clone_of_a_paused_guest_is_paused(
    parent: Process, fork: Callable[..., list[Clone]], guests: Path
) -> None:
    parent.boot(guests / "count.elf", "")
    parent.counted(2)
    parent.api.ask("PATCH", "/vm", {"state": "Paused"})
    clones = fork(parent.api, {}, {})
    assert parent.api.ask("GET", "/", expect=200)["state"] == "Paused"
    for clone in clones:
        assert clone.api.ask("GET", "/", expect=200)["state"] == "Paused"
        assert clone.text == ""
    clones[0].api.ask("PATCH", "/vm", {"state": "Resumed"})
    clones[0].counted(3)
    assert clones[1].text == ""
    parent.api.ask("PATCH", "/vm", {"state": "Resumed"})
    parent.counted(clones[0].numbers()[0] + 2)


def test_a_clone_has_no_descriptor_but_its_own_and_is_nobodys_child(
    guests: Path, tmp_path: Path, fork: Callable[..., list[Clone]]
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    process = Process(
        tmp_path, "--log-path", str(tmp_path / "log"), "--metrics-path", str(tmp_path / "metrics")
    )
    try:
        process.api.ask("PUT", "/vsock", {"guest_cid": 3, "uds_path": str(tmp_path / "v")})
        drive = {"drive_id": "d", "is_root_device": False, "is_read_only": True, "path_on_host": str(disk)}
        process.api.ask("PUT", "/drives/d", {**drive, "io_engine": "Async"})
        process.boot(guests / "count.elf", "")
        process.counted(2)
        idle = socket.socket(socket.AF_UNIX)
        idle.connect(str(process.api.path))
        clone, _ = fork(process.api, {"id": "own"}, {"id": "other"})
        process.api.ask("GET", "/", expect=200)
        theirs = {inode(process.process.pid, fd) for fd in os.listdir(f"/proc/{process.process.pid}/fd")}
        ours = {inode(clone.pid, fd) for fd in os.listdir(f"/proc/{clone.pid}/fd")}
        shared = {name for name in theirs & ours if not name.startswith(("anon_inode", "/dev/"))}
        assert shared == {str(tmp_path / "log"), str(disk)}
        with open(f"/proc/{clone.pid}/status") as status:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
        assert int(fields["PPid"]) != process.process.pid
        assert fields["State"].split()[0] in "SR"
        # Nobody waits to be reaped.
        children = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children").read_text()
        assert children == ""
        # Each line says whose it is.
        log = (tmp_path / "log").read_text()
        assert "[own:main] " in log
        assert "[other:main] " in log
        assert "[anonymous-instance:main] Forked 2 clones; the microVM stood still for " in log
        idle.close()
    finally:
        process.kill()
    clone.counted(len(clone.numbers()) + 2)


def inode(pid: int, fd: str) -> str:
    return os.readlink(f"/proc/{pid}/fd/{fd}")


def test_each_has_its_vsock_and_its_disk(
    parent: Process, fork: Callable[..., list[Clone]], guests: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "v")
    parent.api.ask("PUT", "/vsock", {"guest_cid": 3, "uds_path": path})
    parent.boot(guests / "vsock.elf", "t=echo,9")
    until(lambda: parent.read(0.1) or ("vsock echo ready" in parent.text or None), lambda: parent.text)
    with connected(path, ECHO) as program:
        program.sendall(b"before")
        assert program.recv(6) == b"before"
        clones = fork(
            parent.api, {"id": "a"}, {"id": "b", "vsock_override": {"uds_path": str(tmp_path / "w")}}
        )
        # The parent's connections are as they were.
        program.sendall(b"after!")
        assert program.recv(6) == b"after!"
    paths = [path + ".a", str(tmp_path / "w")]
    for clone, own in zip(clones, paths, strict=True):
        assert clone.api.ask("GET", "/vm/config", expect=200)["vsock"]["uds_path"] == own
        with connected(own, ECHO) as program:
            program.sendall(b"again")
            assert program.recv(5) == b"again"
    for clone in clones:
        signal.pidfd_send_signal(clone.end, signal.SIGTERM)
        assert clone.ended()
    assert os.path.exists(path)
    assert not any(map(os.path.exists, paths))


@pytest.mark.parametrize("engine", ["Sync", "Async"])
def test_requests_in_flight_are_done_once_by_each(
    parent: Process, fork: Callable[..., list[Clone]], guests: Path, tmp_path: Path, engine: str
) -> None:
    """The guest fills its disk and checks every word; each clone has a copy of the disk as it was at the fork."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4 << 20))
    drive = {"drive_id": "d", "is_root_device": False, "is_read_only": False, "path_on_host": str(disk)}
    parent.api.ask("PUT", "/drives/d", {**drive, "io_engine": engine})
    parent.boot(guests / "blk.elf", "t=fill,4096,32 t=check,4096,16 " * 20)
    until(lambda: parent.read(0.1) or ("blk " in parent.text or None), lambda: parent.text)
    parent.api.ask("PATCH", "/vm", {"state": "Paused"})
    refused = parent.api.ask("PUT", "/vm/fork", {"clones": [{"id": "a"}]}, expect=400)
    assert refused["fault_message"] == (
        "Fork error: The clone 'a' cannot write to the file of the drive 'd' too: name a copy of it, or an "
        "overlay that is to be made, in its drive_overrides."
    )
    clones = []
    for number in range(2):
        shutil.copy(disk, copy := tmp_path / f"copy{number}")
        clones.append({"drive_overrides": [{"drive_id": "d", "path_on_host": str(copy)}]})
    made = fork(parent.api, *clones)
    parent.api.ask("PATCH", "/vm", {"state": "Resumed"})
    for clone in made:
        clone.api.ask("PATCH", "/vm", {"state": "Resumed"})
    for clone in made:
        assert clone.ended()
        assert "FAIL" not in clone.text
        assert clone.text.count("blk check 4096 16 bytes=") > 0
    assert parent.process.wait(PATIENCE) == 0
    parent.kill()
    assert "FAIL" not in parent.text


def test_each_has_its_interface(
    namespace: Namespace, fork: Callable[..., list[Clone]], guests: Path, tmp_path: Path
) -> None:
    first, second = namespace.tap(mtu=1500), namespace.tap(mtu=1500)
    ours, theirs = bytes.fromhex("060000000002"), bytes.fromhex("060000000001")
    frames = [frame(600, source=ours, target=theirs, seed=seed) for seed in range(6)]
    hosts = [Host(namespace, first), Host(namespace, second)]
    with namespace.entered():
        parent = Process(tmp_path)
    try:
        card = {"iface_id": "eth0", "host_dev_name": first, "guest_mac": "06:00:00:00:00:01"}
        parent.api.ask("PUT", "/network-interfaces/eth0", card)
        parent.boot(guests / "net.elf", "t=echo,600,6")
        until(lambda: parent.read(0.1) or ("net" in parent.text or None), lambda: parent.text)
        for each in frames[:3]:
            hosts[0].send(each)
        assert len(hosts[0].frames(3)) == 3
        for clone, sentence in (
            ({"id": "a"}, "The clone 'a' cannot have the TAP device of the interface 'eth0' too"),
            (
                {"network_overrides": [{"iface_id": "eth0", "host_dev_name": first}]},
                "Device or resource busy",
            ),
        ):
            fault = parent.api.ask("PUT", "/vm/fork", {"clones": [clone]}, expect=400)
            assert sentence in fault["fault_message"]
        (clone,) = fork(parent.api, {"network_overrides": [{"iface_id": "eth0", "host_dev_name": second}]})
        for host in hosts:
            for each in frames[3:]:
                host.send(each)
            assert len(host.frames(3)) == 3
        assert clone.ended()
        assert parent.process.wait(PATIENCE) == 0
    finally:
        parent.kill()
        for host in hosts:
            host.close()


def test_one_that_cannot_be_leaves_none_and_the_parent_running(
    parent: Process, guests: Path, tmp_path: Path
) -> None:
    parent.boot(guests / "count.elf", "")
    parent.counted(2)
    before = set(os.listdir(tmp_path))
    fds = sorted(os.listdir(f"/proc/{parent.process.pid}/fd"))
    (tmp_path / "taken").touch()
    good: list[dict[str, Any]] = [{"id": f"good{number}"} for number in range(3)]
    for bad, sentence in (
        (
            {"id": "bad", "api_sock": str(tmp_path / "taken")},
            "the clone 'bad' cannot be: Failed to open the API",
        ),
        ({"id": "bad", "serial_out_path": "/none/x"}, "cannot open the serial output /none/x: No such file"),
        ({"id": "bad", "log_path": "/none/x"}, "the clone 'bad' cannot be: Failed to open target file"),
        ({"id": "no_id"}, "Invalid instance ID: invalid character (_) at position 2."),
        ({"id": "good1"}, "Two clones cannot have the same id: good1"),
        ({"drive_overrides": [{"drive_id": "d", "path_on_host": "x"}]}, "The microVM has no drive 'd'."),
        ({"vsock_override": {"uds_path": "v"}}, "The microVM has no vsock device"),
        ({"mmds": {"a": 1}}, "The microVM has no metadata service"),
        ({"network_overrides": [{"iface_id": "e", "host_dev_name": "t"}]}, "no network interface 'e'."),
    ):
        fault = parent.api.ask("PUT", "/vm/fork", {"clones": [*good, bad]}, expect=400)
        assert fault["fault_message"].startswith("Fork error: "), fault
        assert sentence in fault["fault_message"]
        assert set(os.listdir(tmp_path)) == before | {"taken"}
    fault = parent.api.ask("PUT", "/vm/fork", {"clones": []}, expect=400)
    assert "clones" in fault["fault_message"]
    assert sorted(os.listdir(f"/proc/{parent.process.pid}/fd")) == fds
    assert parent.api.ask("GET", "/", expect=200)["state"] == "Running"
    parent.counted(parent.numbers()[-1] + 2)


def test_a_microvm_that_does_not_run_is_not_forked(parent: Process) -> None:
    fault = parent.api.ask("PUT", "/vm/fork", {"clones": [{}]}, expect=400)
    assert fault["fault_message"] == "The requested operation is not supported before starting the microVM."


def test_each_has_its_metadata(
    namespace: Namespace, fork: Callable[..., list[Clone]], guests: Path, tmp_path: Path
) -> None:
    taps = [namespace.tap(mtu=1500) for _ in range(3)]
    with namespace.entered():
        parent = Process(tmp_path)
    try:
        card = {"iface_id": "eth0", "host_dev_name": taps[0]}
        parent.api.ask("PUT", "/network-interfaces/eth0", card)
        parent.api.ask("PUT", "/mmds/config", {"network_interfaces": ["eth0"], "version": "V2"})
        parent.api.ask("PUT", "/mmds", {"name": "parent", "n": [1]})
        parent.boot(guests / "count.elf", "")
        parent.counted(2)
        overrides = [{"network_overrides": [{"iface_id": "eth0", "host_dev_name": tap}]} for tap in taps[1:]]
        same, other = fork(parent.api, overrides[0], {**overrides[1], "mmds": {"name": "other"}})
        assert same.api.ask("GET", "/mmds", expect=200) == {"name": "parent", "n": [1]}
        assert other.api.ask("GET", "/mmds", expect=200) == {"name": "other"}
        same.api.ask("PATCH", "/mmds", {"name": "same"})
        assert parent.api.ask("GET", "/mmds", expect=200)["name"] == "parent"
        for clone in (same, other):
            clone.counted(3)
    finally:
        parent.kill()


def test_a_monitor_from_the_zygote_forks_and_its_clones_outlive_launcher_and_zygote(
    fork: Callable[..., list[Clone]], guests: Path, tmp_path: Path
) -> None:
    zygote = ZygoteProcess(tmp_path / "zygote")
    try:
        parent = Process(tmp_path, command=zygote.command)
        try:
            parent.boot(guests / "count.elf", "touch=2 tick=100")
            parent.counted(2)
            clones = fork(parent.api, {"id": "a"}, {"id": "b"})
            (again,) = fork(clones[0].api, {"id": "c"})
        finally:
            parent.kill()
    finally:
        zygote.end()
    for clone in (*clones, again):
        # More than a second, after which memory that is as the zygote's was given back.
        assert contiguous(clone.counted(len(clone.numbers()) + 150))
        assert f"--id\0{clone.id}" in Path(f"/proc/{clone.pid}/cmdline").read_text().replace(" ", "\0")


def test_crackle_fork(parent: Process, guests: Path, tmp_path: Path) -> None:
    parent.boot(guests / "count.elf", "")
    parent.counted(2)
    command = [sys.executable, "-m", "crackle.cli.main", "fork", str(parent.api.path)]
    done = subprocess.run(
        [*command, "-n", "2", "--name", "n{index}", "--console", "{id}.out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    try:
        assert done.returncode == 0, done.stderr
        sockets = [str(tmp_path / name) for name in ("n0.sock", "n1.sock")]
        assert [(name, socket) for name, _, socket in lines] == list(zip(("n0", "n1"), sockets, strict=True))
        for name, _, path in lines:
            assert Client(Path(path)).ask("GET", "/", expect=200)["id"] == name
            until(functools.partial(contiguous_from, tmp_path / f"{name}.out"), str)
        done = subprocess.run(
            [*command, "--name", "n0"], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 1
        assert done.stderr.startswith("crackle: Fork error: the clone 'n0' cannot be: Failed to open the API")
        for path, sentence in (("/nowhere", "cannot ask the microVM at /nowhere: No such file"),):
            done = subprocess.run(
                [*command[:-1], path], capture_output=True, text=True, timeout=PATIENCE, check=False
            )
            assert (done.returncode, done.stdout) == (1, "")
            assert sentence in done.stderr
    finally:
        for _, pid, _ in lines:
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(params=[True, False], ids=["own process", "this process"])
def counting(request: pytest.FixtureRequest, guests: Path) -> Iterator[MicroVM]:
    """A guest of this program's that counts."""
    with MicroVM(guests / "count.elf", boot_args="touch=2", memory=64, own_process=request.param) as vm:
        vm.console.expect("count 2\n", PATIENCE)
        yield vm


def told(vm: MicroVM) -> int:
    return int(vm.console.expect(r"count (\d+)\n", PATIENCE)[1])


def test_a_fork_is_microvms_of_this_program(counting: MicroVM) -> None:
    clones = counting.fork(3, instance_id="clone{index}")
    everybody = [counting, *clones, *clones[0].fork(2)]
    assert len({vm.pid for vm in everybody}) == len(everybody)
    assert [f"'clone{n}': Running" in repr(clone) for n, clone in enumerate(clones)] == [True] * 3
    for vm in everybody:
        first = told(vm)
        assert [told(vm), told(vm)] == [first + 1, first + 2]
        assert vm.state == "Running"
    processes = [os.pidfd_open(clone.pid) for clone in everybody[1:]]
    for clone in everybody[1:]:
        clone.stop()
    for process in processes:
        assert select.select([process], [], [], PATIENCE)[0]
        os.close(process)
    told(counting)


def test_clones_of_a_paused_microvm_are_paused_and_can_be_saved(counting: MicroVM, tmp_path: Path) -> None:
    counting.pause()
    (clone,) = counting.fork()
    assert (counting.state, clone.state) == ("Paused", "Paused")
    clone.snapshot(tmp_path / "s")
    counting.resume()
    last = told(counting)
    with MicroVM.restore(tmp_path / "s") as vm:
        assert told(vm) <= last + 1
    clone.resume()
    assert told(clone) == told(clone) - 1
    clone.stop()


def test_a_fork_that_cannot_be_leaves_nothing(counting: MicroVM) -> None:
    gc.collect()  # what earlier tests have left to it
    fds, before = set(os.listdir("/proc/self/fd")), threads()
    for options, sentence in (
        ({"instance_id": "same"}, "two clones would have the id 'same'"),
        ({"drives": {"d": "x"}}, "has no 'd'"),
        ({"vsock": "x"}, "has no vsock device"),
        ({"metadata": {}}, "The microVM has no metadata service"),
        ({"huge_pages": "None"}, "huge_pages: a clone of a running microVM is in this as the microVM is"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            counting.fork(2, **options)
    with pytest.raises(ConfigError, match="forked once to 1000 times, not 0 times"):
        counting.fork(0)
    assert set(os.listdir("/proc/self/fd")) == fds
    until(lambda: threads() == before or None, threads)
    told(counting)


def threads() -> list[str]:
    """The names of this process's, without the kernel's own."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text())
    return sorted(name for name in names if not name.startswith("kvm-"))


@pytest.fixture
def writing(guests: Path, tmp_path: Path) -> Iterator[Callable[..., MicroVM]]:
    """Starts a guest that knows what it has written to its disk, which has no file but an overlay's."""
    made: list[MicroVM] = []

    def start(engine: str, **section: Any) -> MicroVM:
        with open(tmp_path / "base", "wb") as base:
            base.truncate(4 << 20)
        options = {"overlay": Overlay(str(tmp_path / "top")), "io_engine": engine, **section}
        drive = Drive("d", False, path_on_host=str(tmp_path / "base"), **options)
        vm = MicroVM(guests / "writes.elf", boot_args="", memory=64, drives=[drive], own_process=True)
        made.append(vm)
        vm.start()
        vm.console.expect("writes begins", PATIENCE)
        return vm

    yield start
    for vm in made:
        vm.stop()


def write(vm: MicroVM, seed: int, count: int = 1000) -> None:
    # A line that its parent was in the middle of is at an end.
    vm.console.write(f"\nw {seed} {count}\n")


def checked(vm: MicroVM) -> bytes:
    """What tells the disk, which is as its guest knows it, from others'."""
    found: bytes = vm.console.expect(r"checked \d+ sum=(\S+)\n", PATIENCE)[1]
    return found


@pytest.mark.parametrize("engine", ["Sync", "Async"])
def test_a_tree_of_forks_in_which_each_disk_is_its_own(writing: Callable[..., MicroVM], engine: str) -> None:
    """Three deep and twenty wide: what was written up to the fork is in all that come from there, the rest in one."""
    root = writing(engine)
    write(root, 1)
    everybody, seeds = [root], iter(range(2, 1000))
    level = [root]
    for parents, each in ((1, 20), (4, 5), (4, 5)):
        following: list[MicroVM] = []
        for parent in level[:parents]:
            # It is forked in the middle of that, and all go on with it.
            write(parent, next(seeds))
            following += parent.fork(each)
        for vm in following:
            write(vm, next(seeds))
        level = following
        everybody += following
    assert len(everybody) == 61
    for vm in everybody:
        vm.console.write("\nc\n")
    assert len({checked(vm) for vm in everybody}) == 61
    for vm in everybody[1:]:
        vm.stop()


def test_a_drive_without_an_overlay_may_get_one_by_a_fork(
    writing: Callable[..., MicroVM], tmp_path: Path
) -> None:
    vm = writing("Sync", overlay=UNSET, cache_type="Writeback")
    write(vm, 1)
    with pytest.raises(ConfigError, match=r"two microVMs cannot write to the file of the drive 'd'"):
        vm.fork()
    one, two = vm.fork(2, overlays={"d": str(tmp_path / "{id}.overlay")})
    for number, each in enumerate((vm, one, two), 2):
        write(each, number)
        each.console.write("c\n")
    assert len({checked(each) for each in (vm, one, two)}) == 3
    assert vm.config.drives[0].overlay.path.startswith(str(tmp_path / "d."))
    assert one.config.drives[0].overlay.path.startswith(str(tmp_path / "clone-"))
    one.stop()
    two.stop()


def test_overlays_of_clones_that_cannot_be_are_gone(writing: Callable[..., MicroVM], tmp_path: Path) -> None:
    vm = writing("Sync")
    write(vm, 1)
    before = set(os.listdir(tmp_path))
    (tmp_path / "there").touch()
    with pytest.raises(ConfigError, match=r"The overlay .*/there of a clone is there already"):
        vm.fork(overlays={"d": str(tmp_path / "there")})
    with pytest.raises(ConfigError, match=r"cannot be: .*cannot make the overlay .*/none/x"):
        vm.fork(2, overlays={"d": lambda index: str(tmp_path / ("fine" if index else "none/x"))})
    # The source keeps a layer that nothing lies over; nothing else has changed.
    (own,) = set(os.listdir(tmp_path)) - before - {"there"}
    assert vm.config.drives[0].overlay == Overlay(str(tmp_path / own))
    (clone,) = vm.fork()
    for each in (vm, clone):
        each.console.write("\nc\n")
    assert checked(vm) == checked(clone)
    clone.stop()


def test_a_source_that_writes_nothing_is_forked_any_number_of_times(
    writing: Callable[..., MicroVM], tmp_path: Path
) -> None:
    vm = writing("Sync", cache_type="Writeback")
    write(vm, 1)
    vm.console.expect("wrote 1\n", PATIENCE)
    files = []
    for number in range(2, 22):
        (clone,) = vm.fork()
        write(clone, number, 5)
        clone.console.expect(f"wrote {number}\n", PATIENCE)
        if number % 10 == 2:
            for each in (vm, clone):
                each.console.write("c\n")
            assert checked(vm) != checked(clone)
            (again,) = clone.fork()
            again.console.write("c\n")
            assert checked(again)
            again.stop()
        clone.stop()
        files.append(vm.config.drives[0].overlay.path)
    # The first fork has made it, and nothing was ever written to it.
    assert len(set(files)) == 1
    write(vm, 30, 5)
    vm.console.expect("wrote 30\n", PATIENCE)
    (clone,) = vm.fork()
    clone.console.write("c\n")
    vm.console.write("c\n")
    assert checked(clone) == checked(vm)
    assert vm.config.drives[0].overlay.path not in files
    clone.stop()


def test_an_overlay_in_memory_is_not_forked(writing: Callable[..., MicroVM]) -> None:
    vm = writing("Sync", overlay=Overlay(memory=True))
    with pytest.raises(ConfigError, match="The overlay of the drive 'd' is in memory"):
        vm.fork(overlays={"d": "x"})
    vm.console.write("c\n")
    checked(vm)


PROGRAM = """
import os, signal, sys, threading
import crackle

held = open(sys.argv[2], "w")
signal.signal(signal.SIGUSR1, lambda *_: os._exit(9))
stop = threading.Event()
threads = [threading.Thread(target=stop.wait, daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()

class Told:
    def __del__(self):
        os.write(1, b"finalised\\n")

told = Told()

def work():
    "Not the main thread."
    vm = crackle.MicroVM(sys.argv[1], boot_args="touch=2", memory=64)
    vm.start()
    vm.console.expect("count 2\\n", 30)
    print("unflushed", end="")
    (clone,) = vm.fork()
    clone.console.expect(r"count \\d+\\n", 30)
    names = [os.readlink(f"/proc/{clone.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{clone.pid}/fd")]
    print("", sys.argv[2] in names, len(os.listdir(f"/proc/{clone.pid}/task")) < 5, flush=True)
    print(clone.pid, flush=True)
    sys.stdin.read()

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_a_clone_runs_nothing_of_the_program_and_ends_with_it(guests: Path, tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", PROGRAM, str(guests / "count.elf"), str(tmp_path / "held")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "unflushed False True\n"
        clone = os.pidfd_open(int(program.stdout.readline()))
    finally:
        program.kill()
    assert select.select([clone], [], [], PATIENCE)[0]
    os.close(clone)
    # The clone has not had the program's end of the pipe either.
    assert program.communicate(timeout=PATIENCE)[0] == ""


@pytest.mark.parametrize("delay_ms", [0, 5, 10, 15, 20, 30, 40, 60, 80, 120])
def test_a_parent_that_is_killed_leaves_whole_clones_or_none(
    guests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delay_ms: int
) -> None:
    monkeypatch.setenv("CRACKLE_FAMILY", str(tmp_path))
    fork_and_kill(guests, tmp_path, delay_ms / 1000)


def fork_and_kill(guests: Path, tmp_path: Path, seconds: float) -> bool:
    """Kill a parent so long after it was asked for clones: whether these are there, all of them, or none.

    Of all of this, the directory is to be in the environment as CRACKLE_FAMILY.
    """
    parent = Process(tmp_path)
    names = [f"clone{number}" for number in range(3)]
    clones = [
        {"id": name, "serial_out_path": str(tmp_path / f"{name}.out"), "api_sock": str(tmp_path / name)}
        for name in names
    ]
    told = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            parent.api.ask("PUT", "/vm/fork", {"clones": clones}, expect=200)
            told.set()

    try:
        parent.boot(guests / "count.elf", "touch=2 tick=100")
        parent.counted(2)
        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(seconds)
    finally:
        parent.kill()
    asking.join()
    try:
        alive = until(lambda: decided(tmp_path, names), lambda: family(tmp_path))
        assert alive or not told.is_set()
        for name in names:
            assert (tmp_path / name).exists() is bool(alive)
            if alive:
                until(functools.partial(contiguous_from, tmp_path / f"{name}.out"), str)
    finally:
        for pid in family(tmp_path):
            os.kill(pid, signal.SIGKILL)
    return bool(alive)


def test_a_client_that_goes_away_amid_a_fork_leaves_whole_clones_or_none(
    guests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRACKLE_FAMILY", str(tmp_path))
    parent = Process(tmp_path)
    try:
        parent.boot(guests / "count.elf", "touch=2 tick=100")
        parent.counted(2)
        clones = [{"id": f"c{number}", "api_sock": str(tmp_path / f"c{number}")} for number in range(2)]
        body = json.dumps({"clones": clones})
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(parent.api.path))
            client.sendall(f"PUT /vm/fork HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        # Who asks next is served when that is done, or was not begun.
        assert parent.api.ask("GET", "/", expect=200)["state"] == "Running"
        made = [name for name in ("c0", "c1") if (tmp_path / name).exists()]
        assert len(made) in (0, 2)
        for name in made:
            assert Client(tmp_path / name).ask("GET", "/", expect=200)["state"] == "Running"
        until(lambda: len(family(tmp_path)) == 1 + len(made) or None, lambda: family(tmp_path))
        parent.counted(parent.numbers()[-1] + 2)
    finally:
        parent.kill()
        for pid in family(tmp_path):
            os.kill(pid, signal.SIGKILL)


def family(directory: Path) -> list[int]:
    """Every process that was started with this directory in its environment."""
    marker = f"CRACKLE_FAMILY={directory}\0".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if marker in Path("/proc", name, "environ").read_bytes():
                found.append(int(name))
    return found


def decided(directory: Path, names: list[str]) -> bool | None:
    """Whether the clones live on, all of them, once it is certain."""
    alive = family(directory)
    if not alive:
        return False
    states = []
    for name in names:
        with contextlib.suppress(OSError, http.client.HTTPException):
            states.append(Client(directory / name).ask("GET", "/", expect=200)["state"])
    return True if len(alive) == len(names) and states == ["Running"] * len(names) else None


def contiguous_from(console: Path) -> bool | None:
    numbers = counted_in(console.read_text())
    return contiguous(numbers) or None if len(numbers) > 3 else None
