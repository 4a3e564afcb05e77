"""Linux guests: kernels and disks for the tests, and a KVM that runs them.

Where this host's /dev/kvm does not run Linux guests, the tests marked `linux` run in emulated hosts, two side by side,
each a pytest session of its own; their results are reported here, test by test, as if they had run here.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crackle import MicroVM
from support.elsewhere import Elsewhere, runs_elsewhere

ROOT = Path(__file__).resolve().parents[2]
FILES = "CRACKLE_TEST_FILES"
HOSTS = 2
HOST_TIMEOUT = 1800
SOAK_TIMEOUT = 7200
BOOT_ARGS = "console=ttyS0 reboot=k panic=1 i8042.noaux i8042.nomux i8042.dumbkbd quiet noxsave"

# -- where the tests run -------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here that asks for a guest needs a KVM that runs Linux, and time."""
    for item in items:
        if Path(__file__).parent in item.path.parents and "boot" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.linux)
            if not any(item.iter_markers("timeout")):
                item.add_marker(pytest.mark.timeout(400))


class Delegate(Elsewhere):
    """Runs tests in emulated hosts."""

    timeout = HOST_TIMEOUT

    def run(self, items: list[pytest.Item]) -> None:
        if any(item.get_closest_marker("soak") for item in items):
            self.timeout = SOAK_TIMEOUT
        self._round([item.nodeid for item in items], f"{len(items)} tests of Linux guests run")
        # The emulation is not perfect: one guest in a hundred hangs in it, or the host itself does.
        again = [name for name in sorted(self.wanted) if self._failed(name)]
        if again:
            for name in again:
                self._say_why(name)
            self._round(again, f"{len(again)} that failed there run once more: {' '.join(again)}")

    def _failed(self, name: str) -> bool:
        return any(report.failed for report in self.reports.get(name, ())) or not self.ended(name)

    def _say_why(self, name: str) -> None:
        failed = [report.longreprtext for report in self.reports.get(name, []) if report.failed]
        text = "\n".join(failed) or "the emulated host ended before it did"
        self.say(f"{name}:\n{text[-3000:]}")

    def _round(self, names: list[str], what: str) -> None:
        self.say(f"{what}, in {HOSTS} emulated hosts ...")
        for name in names:
            self.reports.pop(name, None)
        top = ROOT / "build" / "linux-tests"
        shutil.rmtree(top, ignore_errors=True)
        shared = top / "begun"
        shared.mkdir(parents=True)
        threads = []
        for number in range(min(HOSTS, len(names))):
            share = top / str(number)
            share.mkdir()
            threads.append(threading.Thread(target=self._run_host, args=(names, share, shared)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _run_host(self, names: list[str], share: Path, shared: Path) -> None:
        command = [
            ROOT / "tools" / "emuhost",
            "--timeout",
            str(self.timeout),
            "--memory",
            "6144",
            "--share",
            share,
            "--share",
            shared,
        ]
        with open(share / "output", "wb") as output:
            subprocess.run(
                [*command, "--", *self.command(names)],
                cwd=self.config.rootpath,
                env=self.environment(share, shared) | {FILES: json.dumps(guest_files())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.take(share)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """Before the tests: run those that need it elsewhere."""
    if not runs_elsewhere(session.config):
        items = [item for item in session.items if item.get_closest_marker("linux")]
        if items and not _runs_linux():
            delegate = Delegate(session.config, items)
            delegate.run(items)
            session.config.pluginmanager.register(delegate)
    return (yield)


def _runs_linux() -> bool:
    from crackle.cli.doctor import report, runs_linux

    return runs_linux(report())


# -- what the tests use --------------------------------------------------------------------------------------------


SCRIPTS = {
    # Debian's cloud kernel: vmlinux, vmlinuz (a bzImage), and an initial RAM disk with its drivers.
    "stock": ("kernel/stock", ("vmlinux", "vmlinuz", "initrd"), ("vmlinux", "vmlinuz", "initrd")),
    # The small kernel, with ACPI and without.
    "kernels": ("kernel/build", (), ("acpi", "acpi-bzimage", "mptable", "mptable-bzimage")),
    # Root file systems, and the payload file that the ext4 image holds.
    "images": (
        "rootfs/build",
        ("ext4", "tools", "initramfs", "payload"),
        ("ext4", "tools", "initramfs", "payload"),
    ),
}


@functools.cache
def guest_files() -> dict[str, dict[str, str]]:
    """Paths of the guest kit's files, made where they are missing. An emulated host is told; it could make none."""
    if FILES in os.environ:
        found: dict[str, dict[str, str]] = json.loads(os.environ[FILES])
        return found
    files = {}
    for kind, (script, arguments, names) in SCRIPTS.items():
        command = [ROOT / "guest" / script, *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        files[kind] = dict(zip(names, done.stdout.split(), strict=True))
    return files


def _paths(kind: str) -> dict[str, Path]:
    return {name: Path(path) for name, path in guest_files()[kind].items()}


@pytest.fixture(scope="session")
def stock() -> dict[str, Path]:
    """Debian's cloud kernel."""
    return _paths("stock")


@pytest.fixture(scope="session")
def kernels() -> dict[str, Path]:
    """The small kernel."""
    return _paths("kernels")


@pytest.fixture(scope="session")
def images() -> dict[str, Path]:
    """Root file systems."""
    return _paths("images")


@pytest.fixture
def rootfs(images: dict[str, Path], tmp_path: Path) -> Path:
    """A root disk of this test's own."""
    return Path(shutil.copyfile(images["ext4"], tmp_path / "root.ext4"))


@pytest.fixture
def tools(images: dict[str, Path]) -> dict[str, object]:
    """Options of `boot` for a read-only root disk with curl, ethtool, fio and iperf3; /tmp and /run can be written.

    fio comes with eighty megabytes of libraries: it needs this much memory.
    """
    return {"rootfs": images["tools"], "read_only": True, "memory": 256}


PROMPT = " # "


class Guest:
    """A Linux guest with a shell on its console."""

    def __init__(self, vm: MicroVM) -> None:
        self.vm = vm
        self.console = vm.console

    def wait_shell(self) -> Guest:
        """Until the shell waits for a command; it echoes nothing and shows no prompt from then on."""
        self.console.expect("user space after .*\n", 120)
        self.console.expect(PROMPT, 30)
        self.console.write("stty -echo; PS1= PS2=; echo re''ady\n")
        self.console.expect("ready\r\n", 30)
        return self

    def sh(self, command: str, timeout: float = 120.0) -> str:
        """What a command run in the shell printed; it must succeed."""
        self.console.write(f'{command}\necho "<$?>"\n')
        found = self.console.expect(rb"<(\d+)>\r\n", timeout)
        output = found.before.decode(errors="replace").replace("\r", "")
        assert found[1] == b"0", f"{command!r} ended with status {found[1]!r}: {output}"
        return output.strip()


@pytest.fixture
def boot(kernels: dict[str, Path]) -> Iterator[Callable[..., Guest]]:
    """Starts guests: boot(kernel=, rootfs=, boot_args=, **options of MicroVM); the small ACPI kernel by default."""
    running: list[MicroVM] = []

    def start(kernel: Path | None = None, boot_args: str = "", **options: object) -> Guest:
        kernel = kernel or kernels["acpi"]
        vm = MicroVM(kernel, boot_args=f"{BOOT_ARGS} {boot_args}".strip(), **options)  # type: ignore[arg-type]
        running.append(vm)
        vm.start()
        return Guest(vm)

    yield start
    for vm in running:
        vm.stop()
