"""After the guest's first instruction nothing is imported any more: in a jail there may be nothing to import from."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.vhost_user import Impostor

from .conftest import Client

# Before anything of the package is imported. What is imported once a machine has started goes to the file RECORDS.
RECORDER = """
import os, sys
records = os.open(os.environ["RECORDS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
armed = False
def record(event, arguments):
    global armed
    if event != "import":
        return
    machine = getattr(sys.modules.get("crackle.vmm.machine"), "Machine", None)
    if machine is not None and not hasattr(machine, "started_before"):
        machine.started_before = machine.start
        def start(self):
            global armed
            armed = True
            os.write(records, b"started\\n")
            self.started_before()
        machine.start = start
    if armed:
        os.write(records, arguments[0].encode() + b"\\n")
sys.addaudithook(record)
"""
VMM = RECORDER + "from crackle.cli.vmm import main; main()"


class Process:
    """crackle-vmm with the recorder."""

    def __init__(self, directory: Path, *arguments: str, script: str = VMM, **options: Any) -> None:
        self.socket = directory / "api.sock"
        self.records = directory / "records"
        (directory / "log").touch()
        command = [sys.executable, "-c", script, *arguments]
        namespace = options.get("namespace")
        self.process = subprocess.Popen(
            command if namespace is None else namespace.command(*command),
            stdin=options.get("stdin", subprocess.PIPE),
            stdout=options.get("stdout", subprocess.PIPE),
            stderr=subprocess.PIPE,
            env={**os.environ, "RECORDS": str(self.records)},
        )

    def client(self) -> Client:
        deadline = time.monotonic() + 30
        while not self.socket.exists():
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.communicate()
            select.select([], [], [], 0.01)
        return Client(self.socket)

    def late(self) -> list[str]:
        """What was imported after the start."""
        lines = self.records.read_text().split()
        assert lines[:1] == ["started"]
        return lines[1:]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*arguments: str, **options: Any) -> Process:
        started.append(Process(tmp_path, *arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()


def disk(directory: Path, name: str) -> str:
    path = directory / name
    path.write_bytes(bytes(1 << 20))
    return str(path)


def configure(client: Client, directory: Path, guests: Path, kinds: set[str], backend: Impostor) -> None:
    """Everything that `kinds` names."""
    ops = {"ops": {"size": 100, "refill_time": 100}}
    if "logger" in kinds:
        client.ask("PUT", "/logger", {"log_path": str(directory / "log"), "level": "Debug"})
    if "metrics" in kinds:
        (directory / "metrics").touch()
        client.ask("PUT", "/metrics", {"metrics_path": str(directory / "metrics")})
    client.ask("PUT", "/boot-source", {"kernel_image_path": str(guests / "echo.elf"), "boot_args": ""})
    client.ask("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64})
    for kind in kinds & {"Sync", "Async"}:
        client.ask(
            "PUT",
            f"/drives/{kind}",
            {
                "drive_id": kind,
                "is_root_device": False,
                "path_on_host": disk(directory, kind),
                "io_engine": kind,
                "rate_limiter": ops,
            },
        )
    if "vhost-user" in kinds:
        client.ask(
            "PUT", "/drives/user", {"drive_id": "user", "is_root_device": False, "socket": backend.path}
        )
    if "balloon" in kinds:
        client.ask(
            "PUT",
            "/balloon",
            {
                "amount_mib": 1,
                "deflate_on_oom": True,
                "stats_polling_interval_s": 1,
                "free_page_hinting": True,
            },
        )
    if "entropy" in kinds:
        client.ask("PUT", "/entropy", {"rate_limiter": ops})
    if "vsock" in kinds:
        client.ask("PUT", "/vsock", {"guest_cid": 3, "uds_path": str(directory / "v.sock")})
    if "net" in kinds:
        client.ask(
            "PUT",
            "/network-interfaces/eth0",
            {"iface_id": "eth0", "host_dev_name": "preload0", "rx_rate_limiter": ops},
        )
    if "mmds" in kinds:
        client.ask("PUT", "/mmds/config", {"network_interfaces": ["eth0"], "version": "V2"})
        client.ask("PUT", "/mmds", {"a": 1})


def use(client: Client, directory: Path, kinds: set[str]) -> None:
    """Everything that can be asked of a running microVM with them, errors among it."""
    snapshot = {"snapshot_path": str(directory / "s"), "mem_file_path": str(directory / "m")}
    for state in ("Paused", "Resumed", "Paused", "Paused", "Resumed"):
        client.ask("PATCH", "/vm", {"state": state})
        expect = 400 if state == "Resumed" or "vhost-user" in kinds else 204
        client.ask("PUT", "/snapshot/create", snapshot, expect=expect)
    client.ask("GET", "/", expect=200)
    client.ask("GET", "/version", expect=200)
    client.ask("GET", "/vm/config", expect=200)
    client.ask("GET", "/machine-config", expect=200)
    client.ask("GET", "/nowhere", expect=400)
    client.ask("PUT", "/vm", '{"broken', expect=400)
    client.ask("PATCH", "/vm", '{"broken', expect=400)
    client.ask("PATCH", "/vm", {"state": "Asleep"}, expect=400)
    client.ask("PATCH", "/drives/none", {"drive_id": "none"}, expect=400)
    client.ask("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64}, expect=400)
    for kind in kinds & {"Sync", "Async"}:
        client.ask(
            "PATCH", f"/drives/{kind}", {"drive_id": kind, "path_on_host": disk(directory, f"{kind}2")}
        )
        limiter = {"bandwidth": {"size": 1 << 20, "refill_time": 100}, "ops": {"size": 9, "refill_time": 9}}
        client.ask("PATCH", f"/drives/{kind}", {"drive_id": kind, "rate_limiter": limiter})
        client.ask("PATCH", f"/drives/{kind}", {"drive_id": kind, "path_on_host": "/nowhere"}, expect=400)
    if "vhost-user" in kinds:
        client.ask("PATCH", "/drives/user", {"drive_id": "user"})
    if "net" in kinds:
        limiter = {"ops": {"size": 9, "refill_time": 9}}
        client.ask("PATCH", "/network-interfaces/eth0", {"iface_id": "eth0", "rx_rate_limiter": limiter})
    if "mmds" in kinds:
        client.ask("PUT", "/mmds", {"b": [1, {"c": "d"}]})
        client.ask("PATCH", "/mmds", {"b": None})
        client.ask("GET", "/mmds", expect=200)
        client.ask("PUT", "/mmds", '{"x": ', expect=400)
    if "balloon" in kinds:
        client.ask("PATCH", "/balloon", {"amount_mib": 2}, expect=400)
        client.ask("GET", "/balloon/statistics", expect=200)
        client.ask("PATCH", "/balloon/statistics", {"stats_polling_interval_s": 2})
        client.ask("GET", "/balloon/hinting/status", expect=200)
    if "vsock" in kinds:
        with socket.socket(socket.AF_UNIX) as program:
            program.connect(str(directory / "v.sock"))
            program.sendall(b"CONNECT 52\n")
    if "metrics" in kinds:
        client.ask("PUT", "/actions", {"action_type": "FlushMetrics"})
    client.ask("PUT", "/actions", {"action_type": "SendCtrlAltDel"})


KINDS = [
    set(),
    {"logger", "metrics"},
    {"Sync"},
    {"Async", "logger"},
    {"vhost-user"},
    {"vsock"},
    {"balloon", "entropy"},
    {"net"},
    {"net", "mmds"},
    {"logger", "metrics", "Sync", "Async", "vhost-user", "vsock", "balloon", "entropy", "net", "mmds"},
]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "+".join(sorted(kinds)) or "nothing")
def test_nothing_is_imported_after_the_start(
    start: Callable[..., Process],
    guests: Path,
    tmp_path: Path,
    kinds: set[str],
    request: pytest.FixtureRequest,
) -> None:
    namespace = request.getfixturevalue("namespace") if "net" in kinds else None
    backend = Impostor(tmp_path / "backend")
    try:
        process = start("--api-sock", str(tmp_path / "api.sock"), "--boot-timer", namespace=namespace)
        client = process.client()
        configure(client, tmp_path, guests, kinds, backend)
        client.ask("PUT", "/actions", {"action_type": "InstanceStart"})
        use(client, tmp_path, kinds)
        # A second after the start what only the start needed is given back.
        select.select([], [], [], 1.2)
        client.close()
        assert process.process.stdin is not None
        process.process.stdin.write(b"end\n")
        process.process.stdin.flush()
        assert process.process.wait(30) == 0
        assert process.late() == []
    finally:
        backend.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_imported_for_a_signal(
    start: Callable[..., Process], guests: Path, tmp_path: Path, number: int
) -> None:
    config = {
        "boot-source": {"kernel_image_path": str(guests / "idle.elf"), "boot_args": ""},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
    }
    (tmp_path / "config").write_text(json.dumps(config))
    process = start(
        "--no-api", "--config-file", str(tmp_path / "config"), "--log-path", str(tmp_path / "log")
    )
    assert process.process.stdout is not None
    printed = b""
    while b"idle" not in printed:
        printed += os.read(process.process.stdout.fileno(), 4096)
    process.process.send_signal(number)
    process.process.wait(30)
    assert process.late() == []


@pytest.mark.parametrize("fault", ["triple", "panic"])
def test_nothing_is_imported_for_a_guest_that_fails(
    start: Callable[..., Process], guests: Path, tmp_path: Path, fault: str
) -> None:
    config = {
        "boot-source": {"kernel_image_path": str(guests / "faults.elf"), "boot_args": f"f={fault}"},
        "drives": [],
    }
    (tmp_path / "config").write_text(json.dumps(config))
    process = start(
        "--no-api", "--config-file", str(tmp_path / "config"), "--log-path", str(tmp_path / "log")
    )
    process.process.communicate(timeout=60)
    assert process.process.returncode == (1 if fault == "triple" else 0)
    assert process.late() == []


LIBRARY = (
    RECORDER
    + """
import crackle
from pathlib import Path

class Echo(crackle.VirtioDevice):
    device_id = 42
    queue_sizes = (8,)

vm = crackle.MicroVM(sys.argv[1], boot_args="", memory=64, devices=[Echo()] if sys.argv[2:] else [])
vm.start()
vm.console.expect("echo\\n", timeout=30)
vm.pause()
vm.resume()
vm.send_ctrl_alt_del()
vm.press_power_button()
vm.metrics(), vm.config, vm.state, repr(vm)
try:
    vm.wait(0.01)
except TimeoutError:
    pass
try:
    vm.update_drive("none", "/nowhere")
except crackle.CrackleError:
    pass
vm.console.write("end\\n")
assert vm.wait(30).reason == "reset"
vm.stop()
"""
)


@pytest.mark.parametrize("device", [False, True])
def test_nothing_is_imported_after_the_start_in_a_program(
    start: Callable[..., Process], guests: Path, device: bool
) -> None:
    process = start(str(guests / "echo.elf"), *(["device"] if device else []), script=LIBRARY)
    output = process.process.communicate(timeout=60)
    assert process.process.returncode == 0, output
    assert process.late() == []
