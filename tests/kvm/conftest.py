"""Bare-metal guests on this host's /dev/kvm: built here, run in this process or by crackle-vmm."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from crackle import MicroVM
from crackle.runtime.filters import use_filters
from crackle.schema.codec import decode
from crackle.schema.config import VmConfig
from crackle.seccomp import FAILS, default_filters
from crackle.vmm.builder import build
from crackle.vmm.machine import BuildOptions
from support.jails import Jailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from crackle.vmm.machine import ExitStatus

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
"""Seconds after which a guest or a monitor counts as hung."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs a KVM that runs bare-metal guests."""
    missing = None if os.access("/dev/kvm", os.R_OK | os.W_OK) else "no /dev/kvm that can be opened"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kvm)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture
def jailed(tmp_path: Path) -> Iterator[Jailed]:
    """A jail below the test's own directory, not started yet."""
    base = tmp_path / "jails"
    base.mkdir()
    one = Jailed(base)
    yield one
    one.end()


@pytest.fixture(scope="session")
def guests() -> Path:
    """The directory of the bare-metal guests, built."""
    out = ROOT / "build" / "guest" / "bare"
    subprocess.run(["make", "-s", "-C", str(ROOT / "guest" / "bare"), f"OUT={out}"], check=True)
    return out


def configuration(
    kernel: Path, boot_args: str, drives: list[dict[str, Any]], memory_mib: int, vcpus: int
) -> dict[str, Any]:
    """A configuration file's content. drives: sections, of which only path_on_host is required."""
    filled = [
        {"drive_id": f"drive{number}", "is_root_device": False, "is_read_only": False, **drive}
        for number, drive in enumerate(drives)
    ]
    return {
        "boot-source": {"kernel_image_path": str(kernel), "boot_args": boot_args},
        "drives": filled,
        "machine-config": {"vcpu_count": vcpus, "mem_size_mib": memory_mib},
    }


class BareMachine:
    """A bare-metal guest in a machine of this process, with its console on two pipes."""

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        input_read, self.input = os.pipe()
        self._console, output_write = os.pipe()
        os.set_blocking(self._console, False)
        self._fds = [input_read, self.input, self._console, output_write]
        self.text = ""
        # As a program with the library has them.
        use_filters(default_filters(FAILS), ends=False)
        how = BuildOptions(console_in=input_read, console_out=output_write, **options)
        self.machine = build(decode(json.dumps(config).encode(), VmConfig), None, how)

    def close(self) -> None:
        self.machine.stop()
        for fd in self._fds:
            os.close(fd)

    def start(self) -> BareMachine:
        self.machine.start()
        return self

    def read(self, seconds: float = 0.0) -> str:
        """What the guest has printed until now, or until it prints more within so many seconds."""
        if select.select([self._console], [], [], seconds)[0]:
            self.text += os.read(self._console, 65536).decode(errors="replace")
        return self.text

    def wait_for(self, text: str) -> str:
        """Everything printed, once it contains the text."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.read(0.1):
            if self.ended(0) and text not in self.read():
                pytest.fail(f"the guest ended ({self.machine.exit_status()}) without {text!r}: {self.text}")
            if time.monotonic() > deadline:
                pytest.fail(f"the guest never printed {text!r}: {self.text}")
        return self.text

    def ended(self, seconds: float) -> bool:
        """Whether the guest ends within so many seconds."""
        return bool(select.select([self.machine.exit_fd], [], [], seconds)[0])

    def wait_end(self) -> ExitStatus:
        """How the guest ended by itself; `text` then has all it printed."""
        deadline = time.monotonic() + PATIENCE
        while not self.ended(0.1):
            self.read()
            if time.monotonic() > deadline:
                pytest.fail(f"the guest does not end: {self.text}")
        while (before := self.text) != self.read():
            assert before is not None
        status = self.machine.exit_status()
        assert status is not None
        return status


@pytest.fixture
def machine(guests: Path) -> Iterator[Callable[..., BareMachine]]:
    """Makes machines: machine(guest, boot_args, drives=[...], memory_mib=, vcpus=, network=[...]); not started yet.

    More options are those of BuildOptions.
    """
    made: list[BareMachine] = []

    def make(
        guest: str,
        boot_args: str = "",
        *,
        drives: list[dict[str, Any]] | None = None,
        memory_mib: int = 64,
        vcpus: int = 1,
        network: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> BareMachine:
        config = configuration(guests / f"{guest}.elf", boot_args, drives or [], memory_mib, vcpus)
        config["network-interfaces"] = network or []
        made.append(BareMachine(config, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def run(machine: Callable[..., BareMachine]) -> Callable[..., str]:
    """Runs a guest to its clean end; what it printed."""

    def run(guest: str, boot_args: str = "", **options: Any) -> str:
        running = machine(guest, boot_args, **options).start()
        status = running.wait_end()
        assert status.exit_code == 0, status
        assert "FAIL" not in running.text
        assert "FAULT" not in running.text
        return running.text

    return run


VMM = (sys.executable, "-c", "from crackle.cli.vmm import main; main()")


@pytest.fixture
def vmm(guests: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts crackle-vmm on a configuration file: console on its output, log in tmp_path/log."""
    started: list[subprocess.Popen[str]] = []
    log = tmp_path / "log"
    log.touch()

    def start(guest: str, boot_args: str = "", *arguments: str, **options: Any) -> subprocess.Popen[str]:
        drives, memory_mib = options.get("drives", []), options.get("memory_mib", 64)
        config = configuration(
            guests / f"{guest}.elf", boot_args, drives, memory_mib, options.get("vcpus", 1)
        )
        path = tmp_path / f"config{len(started)}.json"
        path.write_text(json.dumps(config))
        command = [*VMM, "--no-api", "--config-file", str(path), "--log-path", str(log), *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


class Client(http.client.HTTPConnection):
    """The API over its Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self.path))

    def ask(self, method: str, path: str, body: Any = None, *, expect: int = 204) -> Any:
        text = body if isinstance(body, str) else None if body is None else json.dumps(body)
        self.request(method, path, text)
        answer = self.getresponse()
        content = answer.read()
        assert answer.status == expect, (method, path, answer.status, content)
        return json.loads(content) if content else None


class Process:
    """crackle-vmm, its API and its console."""

    def __init__(self, directory: Path, *arguments: str, command: Sequence[str] = VMM) -> None:
        self._socket = directory / f"api{time.monotonic_ns()}"
        self.process = subprocess.Popen(
            [*command, "--api-sock", str(self._socket), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.text = ""
        deadline = time.monotonic() + PATIENCE
        while not self._socket.exists():
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.communicate()
            select.select([], [], [], 0.01)
        self.api = Client(self._socket)

    def boot(self, kernel: Path, boot_args: str, **machine: int) -> None:
        self.api.ask("PUT", "/boot-source", {"kernel_image_path": str(kernel), "boot_args": boot_args})
        self.api.ask("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64, **machine})
        self.api.ask("PUT", "/actions", {"action_type": "InstanceStart"})

    def counted(self, least: int) -> int:
        """How far the guest has counted, when that is so far."""
        deadline = time.monotonic() + PATIENCE
        while not (numbers := self.numbers()) or numbers[-1] < least:
            assert time.monotonic() < deadline, self.text
            assert "FAIL" not in self.text
            self.read(0.1)
        return numbers[-1]

    def read(self, seconds: float) -> None:
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], seconds)[0]:
            self.text += os.read(self.process.stdout.fileno(), 65536).decode(errors="replace")

    def numbers(self) -> list[int]:
        lines = self.text.split("\n")[:-1]
        return [int(line.split()[1]) for line in lines if line.startswith("count ") and line[6:].isdigit()]

    def kill(self) -> None:
        """End it, and take what it has said until then."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.text += (self.process.communicate()[0] or b"").decode(errors="replace")
        self.api.close()


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts crackle-vmm."""
    started: list[Process] = []

    def spawn(*arguments: str) -> Process:
        started.append(Process(tmp_path, *arguments))
        return started[-1]

    yield spawn
    for each in started:
        each.kill()


@pytest.fixture(scope="module")
def echoing(guests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The snapshot of a guest that echoes what is typed."""
    path = tmp_path_factory.mktemp("echoing")
    with MicroVM(guests / "echo.elf", boot_args="", memory=32) as vm:
        vm.console.expect("echo\n", PATIENCE)
        vm.snapshot(path)
    return path
