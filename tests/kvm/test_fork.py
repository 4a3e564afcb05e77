"""A running guest forks: it and its clones go on from one place, each with memory, disks and descriptors of its own."""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import select
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crackle import ConfigError
from crackle.memory import GuestMemory
from support.card import Host, frame
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
    paths = [str(tmp_path / "a.vsock"), str(tmp_path / "w")]
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
        "Fork error: The clone 'a' cannot write to the file of the drive 'd' too: name a copy of it in its "
        "drive_overrides."
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


def test_memory_that_cannot_be_copied_on_write_is_refused(guests: Path) -> None:
    with (
        GuestMemory([(0, 2 << 20)], backing="memfd") as memory,
        pytest.raises(ConfigError, match="memory of the kind 'memfd' is not copied on write"),
    ):
        memory.check_inheritable()
    with GuestMemory([(0, 2 << 20)]) as memory:
        memory.check_inheritable()


@pytest.mark.parametrize("delay_ms", [0, 5, 10, 15, 20, 30, 40, 60, 80, 120])
def test_a_parent_that_is_killed_leaves_whole_clones_or_none(
    guests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delay_ms: int
) -> None:
    monkeypatch.setenv("CRACKLE_FAMILY", str(tmp_path))
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
        time.sleep(delay_ms / 1000)
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
