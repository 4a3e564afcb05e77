"""Bare-metal guests on this host's /dev/kvm: built here, run in this process or by crackle-vmm."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from crackle.schema.codec import decode
from crackle.schema.config import VmConfig
from crackle.vmm.builder import build
from crackle.vmm.machine import BuildOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
