"""docs/exit-status.md: what each command ends with, by cause, and that it says why in a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from support.launcher import LAUNCHED
from support.launcher import REAL as VMM
from support.mounts import with_mounts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.api.conftest import Vmm

CRACKLE = [sys.executable, "-m", "crackle.cli.main"]


def end(command: list[str], *, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end; nothing it says may be a traceback."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    done = subprocess.run(command, cwd=cwd, text=True, timeout=60, check=False, **{**streams, **options})
    assert "Traceback" not in (done.stderr or "") + (done.stdout or "")
    return done


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGHUP, 156),
        (signal.SIGXCPU, 154),
        (signal.SIGXFSZ, 151),
        (signal.SIGSYS, 148),
        *((number, -number) for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)),
        # Sent: a fault of the monitor's own ends it by the signal.
        (signal.SIGBUS, 149),
        (signal.SIGSEGV, 150),
        (signal.SIGILL, 157),
    ],
)
def test_a_signal_ends_crackle_vmm_with_its_status(vmm: Vmm, number: signal.Signals, status: int) -> None:
    assert vmm.request("GET", "/").status == 200
    vmm.process.send_signal(number)
    assert vmm.wait() == status
    assert f"Shutting down VM after intercepting signal {int(number)}, code 0." in vmm.log.read_text()


# The first process of a PID namespace, in which a signal without a handler does nothing.
_FIRST = """
import subprocess, sys
from crackle.runtime.system import CLONE_NEWPID, unshare

unshare(CLONE_NEWPID)
first = subprocess.Popen(sys.argv[1:])
print(first.pid, flush=True)
sys.exit(first.wait())
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGHUP, 156),
        (signal.SIGXCPU, 154),
        (signal.SIGXFSZ, 151),
        (signal.SIGBUS, 149),
        (signal.SIGSEGV, 150),
        (signal.SIGILL, 157),
        *((number, 128 + number) for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)),
    ],
)
def test_a_signal_ends_the_first_process_of_a_pid_namespace_too(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    log, metrics = tmp_path / "log", tmp_path / "metrics"
    options = ("--api-sock", "socket", "--log-path", "log", "--metrics-path", "metrics")
    outside = subprocess.Popen(
        [sys.executable, "-c", _FIRST, *VMM, *options],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert outside.stdout is not None
        first = int(outside.stdout.readline())
        while not (tmp_path / "socket").exists():
            assert outside.poll() is None
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "socket"))
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
            os.kill(first, number)
            assert outside.wait(20) == status
    finally:
        outside.kill()
        outside.wait()
    assert f"Shutting down VM after intercepting signal {int(number)}" in log.read_text()
    counted = json.loads(metrics.read_text().splitlines()[-1])["signals"]
    assert counted.get(number.name.lower(), 1) == 1


@pytest.mark.skipif(LAUNCHED, reason="what is limited or gets the signal is the launcher")
@pytest.mark.parametrize(
    ("limit", "status"), [(resource.RLIMIT_FSIZE, 151), (resource.RLIMIT_CPU, 154)], ids=["bytes", "seconds"]
)
def test_a_limit_that_is_reached_ends_it_with_the_status_of_the_table(
    start: Callable[..., Vmm], tmp_path: Path, limit: int, status: int
) -> None:
    vmm = start("--log-path", str(tmp_path / "log"), fake=True)
    assert vmm.request("GET", "/").status == 200
    resource.prlimit(vmm.process.pid, limit, (1, resource.RLIM_INFINITY))
    many = vmm.client.encode("GET", "/vm/config") * 200
    with contextlib.suppress(OSError, AssertionError):
        # As many as it takes, of bytes of the log or of time.
        for _ in range(10_000):
            vmm.client.send(many)
            for _ in range(200):
                vmm.client.receive()
    assert vmm.wait() == status


@pytest.mark.skipif(LAUNCHED, reason="what is limited or gets the signal is the launcher")
def test_a_broken_pipe_is_logged_and_counted_and_ends_nothing(
    start: Callable[..., Vmm], kernel: Path, tmp_path: Path
) -> None:
    vmm = start("--metrics-path", str(tmp_path / "metrics"), fake=True)
    assert vmm.request("PUT", "/boot-source", {"kernel_image_path": str(kernel)}).status == 204
    assert vmm.request("PUT", "/actions", {"action_type": "InstanceStart"}).status == 204
    vmm.process.send_signal(signal.SIGPIPE)
    counts = []
    for _ in range(2):
        assert vmm.request("PUT", "/actions", {"action_type": "FlushMetrics"}).status == 204
        counts.append(json.loads((tmp_path / "metrics").read_text().splitlines()[-1])["signals"]["sigpipe"])
    assert counts in ([1, 0], [0, 1])
    assert "Received signal 13, code 0." in vmm.log.read_text()


@pytest.mark.parametrize("descriptor", [1, None])
def test_a_log_without_a_reader_is_no_busy_loop(tmp_path: Path, descriptor: int | None) -> None:
    reading, writing = os.pipe()
    log = tmp_path / "log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    options = [] if descriptor == 1 else ["--log-path", str(log)]
    process = subprocess.Popen(
        [sys.executable, "-m", "crackle.cli.vmm", "--api-sock", "socket", *options],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=writing if descriptor == 1 else subprocess.DEVNULL,
    )
    try:
        os.close(writing)
        while not (tmp_path / "socket").exists():
            assert process.poll() is None
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "socket"))
            os.close(reading)
            os.close(reader)
            for _ in range(20):
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
            spent = [cpu_time(process.pid)]
            time.sleep(0.5)
            spent.append(cpu_time(process.pid))
        # In clock ticks, of which there are a hundred in a second.
        assert spent[1] - spent[0] < 10
    finally:
        process.kill()
        process.wait()


def cpu_time(pid: int) -> int:
    """Of the process, in clock ticks."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_fault_of_the_monitor_ends_it_by_the_signal(tmp_path: Path) -> None:
    text = (
        "import ctypes, os; from crackle.runtime.loop import Loop; import signal\n"
        "loop = Loop(); loop.on_sent([signal.SIGSEGV], lambda number, code: print(number, code, flush=True))\n"
        "loop.call_later(0.2, lambda: ctypes.string_at(8))\n"
        "os.kill(os.getpid(), signal.SIGSEGV); loop.run()"
    )
    done = end([sys.executable, "-c", text], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, f"{int(signal.SIGSEGV)} 0\n")


def test_signals_that_the_parent_ignored_stay_ignored(tmp_path: Path) -> None:
    ignored = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    process = subprocess.Popen(
        [*VMM, "--api-sock", "socket", "--level", "Off"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        preexec_fn=ignore,
    )
    try:
        while not (tmp_path / "socket").exists():
            assert process.poll() is None
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "socket"))
            for number in ignored:
                process.send_signal(number)
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["--nonsense"], 153),
        (["--id", "a_b"], 153),
        (["--start-time-us", "x"], 153),
        (["--level", "Loud"], 152),
        (["--seccomp-filter", "f"], 1),
        (["--enable-pci"], 1),
        (["--no-api", "--config-file", "missing"], 1),
        (["--no-api", "--config-file", "broken"], 1),
        (["--no-api", "--config-file", "nowhere"], 1),
        (["--api-sock", "no/where"], 1),
        (["--api-sock", "broken"], 1),
        (["--log-path", "no/where"], 1),
        (["--metrics-path", "no/where"], 1),
        (["--metadata", "broken", "--api-sock", "socket"], 1),
        (["--config-file", os.fsdecode(b"caf\xe9"), "--api-sock", os.fsdecode(b"no/caf\xe9")], 1),
    ],
)
def test_crackle_vmm_ends_with_the_status_of_the_table(
    tmp_path: Path, arguments: list[str], status: int
) -> None:
    (tmp_path / "broken").write_text("{")
    (tmp_path / "nowhere").write_text(
        json.dumps({"boot-source": {"kernel_image_path": "a\0b"}, "drives": []})
    )
    done = end([*VMM, *arguments], cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert (done.stderr.startswith("Error: "), done.stderr.count("\n")) == (
        (True, 1) if status else (False, 0)
    )


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--version"], 0),
        (["nonsense"], 2),
        (["run", "--nonsense"], 2),
        (["run", "missing"], 1),
        (["run", "a", "--name", "x"], 1),
        (["net", "nonsense"], 2),
        (["net", "ls"], 0),
        (["doctor", "nonsense"], 2),
    ],
)
def test_crackle_ends_with_the_status_of_the_table(tmp_path: Path, arguments: list[str], status: int) -> None:
    assert end([*CRACKLE, *arguments], cwd=tmp_path).returncode == status


@pytest.mark.parametrize("limit", [3, 4, 5, 6, 8, 10, 12])
def test_where_there_are_hardly_any_descriptors_it_says_so(tmp_path: Path, limit: int) -> None:
    (tmp_path / "vm.json").write_text(
        json.dumps({"boot-source": {"kernel_image_path": "vm.json"}, "drives": []})
    )
    # The interpreter needs some to begin with: the limit comes when it runs.
    text = (
        "import resource, sys; from crackle.cli.vmm import main\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
        "sys.argv[1:] = ['--no-api', '--config-file', 'vm.json']; main()"
    )
    assert limit < resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    done = end([sys.executable, "-c", text], cwd=tmp_path)
    assert (done.returncode, done.stderr.startswith("Error: ")) == (1, True), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1"])
@pytest.mark.parametrize(
    ("arguments", "status"), [("--no-api --config-file missing", 1), ("--nonsense", 153)]
)
def test_closed_standard_streams_change_no_status(
    tmp_path: Path, streams: str, arguments: str, status: int
) -> None:
    done = end(["sh", "-c", f'exec "$@" {arguments} {streams}', "sh", *VMM], cwd=tmp_path)
    assert done.returncode == status


def test_without_dev_null_closed_streams_do_no_harm(tmp_path: Path) -> None:
    closed = ["sh", "-c", 'exec "$@" --nonsense <&- >&- 2>&-', "sh"]
    done = end([*with_mounts("mount -t tmpfs none /dev"), *closed, *VMM], cwd=tmp_path)
    assert done.returncode == 153


# What a command imports first; the signal comes then, as a Ctrl-C that was quick.
_EARLY = """
import os, signal, sys

class Early:
    def find_spec(self, name, *rest):
        if name == "crackle.errors":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Early())
"""


@pytest.mark.parametrize("name", ["crackle", "crackle-vmm", "-m crackle.cli.main", "-m crackle.cli.vmm"])
def test_an_early_interrupt_shows_no_traceback(tmp_path: Path, name: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(_EARLY)
    command = [sys.executable, *name.split()]
    if not name.startswith("-"):
        # As pip makes the console script.
        script = tmp_path / name
        module = {"crackle": "main", "crackle-vmm": "vmm"}[name]
        script.write_text(f"import re\nimport sys\nfrom crackle.cli.{module} import main\nsys.exit(main())\n")
        command = [sys.executable, str(script)]
    done = end([*command, "--version"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
