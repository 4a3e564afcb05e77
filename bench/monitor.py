"""Drives one monitor process over its API socket: the same calls, whichever monitor it is."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bench.rows import GUESTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SERIAL_NUMBERS = itertools.count()
DEFAULT_TIMEOUT = 30.0
JAILER = "jailer"


class MonitorError(Exception):
    """The monitor or its guest did not do what the measurement needs. The message has what it printed."""


class Monitor:
    """A monitor process with its API socket connected; the guest's console is the process's standard output.

    command: the executable and its own arguments; or a jailer and the executable that it is to name, for a microVM in a
    jail, into which the files that it is given are linked. scratch: a directory for the socket and the log.
    """

    def __init__(self, command: Sequence[str], scratch: Path, *arguments: str) -> None:
        number = next(SERIAL_NUMBERS)
        self.socket_path = scratch / f"api-{os.getpid()}-{number}.sock"
        self.log_path = scratch / f"log-{os.getpid()}-{number}"
        self._root: Path | None = None
        line = self._line(command, f"bench-{number}", arguments)
        self.spawned = time.perf_counter()
        self.process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self.process.stdout is not None
        self.console = self.process.stdout.fileno()
        self.output = b""
        os.set_blocking(self.console, False)
        self.connection = self._connect()
        self.ready_after = time.perf_counter() - self.spawned

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, command: Sequence[str], name: str, arguments: Sequence[str]) -> list[str]:
        """The whole command line; what it names is made."""
        command = list(command)
        # There may be another before it, which executes it.
        place = next((at for at, word in enumerate(command) if Path(word).name.endswith(JAILER)), None)
        if place is not None:
            end = place + 2
            base = self.socket_path.with_name("jails")
            self._root = base / Path(command[end - 1]).name / name / "root"
            self._root.mkdir(parents=True)
            self.socket_path, self.log_path = self._root / "api.sock", self._root / "log"
            user = ("--uid", "0", "--gid", "0")
            jail = [
                "--id",
                name,
                "--exec-file",
                command[end - 1],
                *user,
                "--chroot-base-dir",
                str(base),
                "--",
            ]
            command = [*command[: end - 1], *jail, *command[end:]]
        self.log_path.touch()
        own = [] if self._root is not None else ["--id", name]
        quiet = ("--log-path", self._seen(self.log_path), "--level", "Error")
        return [*command, "--api-sock", self._seen(self.socket_path), *own, *quiet, *arguments]

    def _seen(self, path: Path) -> str:
        """As the monitor sees it."""
        return str(path) if self._root is None else path.name

    def _given(self, path: Path) -> str:
        """The same of a file that is outside, and is to be seen in the jail too."""
        if self._root is not None:
            with contextlib.suppress(FileExistsError):
                os.link(path, self._root / path.name)
        return self._seen(path)

    @property
    def pid(self) -> int:
        """Of the monitor process."""
        return self.process.pid

    def close(self) -> None:
        """End the process, whatever it is doing, and remove its files."""
        self.connection.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        for path in (self.socket_path, self.log_path):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        if self._root is not None:
            shutil.rmtree(self._root.parent)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        deadline = self.spawned + DEFAULT_TIMEOUT
        while True:
            try:
                connection.connect(str(self.socket_path))
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                if self.process.poll() is not None or time.perf_counter() > deadline:
                    self.read_output()
                    connection.close()
                    with contextlib.suppress(ProcessLookupError):
                        self.process.kill()
                    raise MonitorError(f"no API socket: {self.output.decode(errors='replace')}") from None
                time.sleep(0.0001)

    # -- API ------------------------------------------------------------------------------------------

    def send(self, method: str, path: str, body: Mapping[str, object] | None = None) -> None:
        """Send a request on the kept connection."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        self.connection.sendall(head.encode() + b"\r\n" + content)

    def receive(self) -> tuple[int, bytes]:
        """Status and body of the answer to the request sent last."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        fields = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines[1:])
        }
        while len(body) < int(fields.get("content-length", 0)):
            body += self._more()
        return int(lines[0].split()[1]), body

    def _more(self) -> bytes:
        data = self.connection.recv(65536)
        if not data:
            self.read_output()
            raise MonitorError(f"the monitor hung up: {self.output.decode(errors='replace')}")
        return data

    def request(self, method: str, path: str, body: Mapping[str, object] | None = None) -> bytes:
        """Body of the answer. MonitorError for a status that is not 2xx."""
        self.send(method, path, body)
        status, answer = self.receive()
        if status // 100 != 2:
            raise MonitorError(f"{method} {path}: {status} {answer.decode(errors='replace')}")
        return answer

    def configure(
        self,
        guest: str | Path,
        boot_args: str = "",
        *,
        memory_mib: int = 128,
        vcpus: int = 1,
        drives: Sequence[Path] = (),
        overlay: Path | None = None,
        io_engine: str = "Sync",
        network: Sequence[Mapping[str, object]] = (),
        vsock: Mapping[str, object] | None = None,
        balloon: Mapping[str, object] | None = None,
    ) -> None:
        """Everything up to InstanceStart. guest: the name of a bare-metal guest or the path of a kernel.

        overlay: of the drive, where there is one.
        """
        kernel = GUESTS / f"{guest}.elf" if isinstance(guest, str) else guest
        self.request("PUT", "/machine-config", {"vcpu_count": vcpus, "mem_size_mib": memory_mib})
        self.request(
            "PUT", "/boot-source", {"kernel_image_path": self._given(kernel), "boot_args": boot_args}
        )
        for number, drive in enumerate(drives):
            body: dict[str, object] = {
                "drive_id": f"drive{number}",
                "path_on_host": self._given(drive),
                "is_root_device": False,
                "is_read_only": False,
                "io_engine": io_engine,
            }
            if overlay is not None:
                body["overlay"] = {"path": self._given(overlay)}
            self.request("PUT", f"/drives/drive{number}", body)
        for interface in network:
            self.request("PUT", f"/network-interfaces/{interface['iface_id']}", interface)
        if vsock is not None:
            self.request("PUT", "/vsock", vsock)
        if balloon is not None:
            self.request("PUT", "/balloon", balloon)

    def start(self) -> None:
        """InstanceStart."""
        self.request("PUT", "/actions", {"action_type": "InstanceStart"})

    def start_timed(self) -> float:
        """InstanceStart; seconds from the request to the first byte of the guest's output."""
        start = time.perf_counter()
        self.send("PUT", "/actions", {"action_type": "InstanceStart"})
        if not select.select([self.console], [], [], DEFAULT_TIMEOUT)[0]:
            raise MonitorError("the guest says nothing")
        taken = time.perf_counter() - start
        status, answer = self.receive()
        if status // 100 != 2:
            raise MonitorError(f"InstanceStart: {status} {answer.decode(errors='replace')}")
        return taken

    # -- the guest's console --------------------------------------------------------------------------

    def read_output(self) -> bool:
        """Take what the guest has printed so far. False at end of file."""
        while True:
            try:
                data = os.read(self.console, 65536)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.output += data

    def wait_output(self, text: str, timeout: float = DEFAULT_TIMEOUT) -> str:
        """Everything the guest has printed, once that contains `text`."""
        deadline = time.perf_counter() + timeout
        while text.encode() not in self.output:
            left = deadline - time.perf_counter()
            ready = left > 0 and select.select([self.console], [], [], left)[0]
            if not ready or (not self.read_output() and text.encode() not in self.output):
                raise MonitorError(f"no {text!r} in: {self.output.decode(errors='replace')}")
        return self.output.decode(errors="replace")

    def wait_end(self, timeout: float = DEFAULT_TIMEOUT) -> str:
        """Everything the guest printed, after it ended the monitor process by its reset."""
        deadline = time.perf_counter() + timeout
        while self.read_output():
            left = deadline - time.perf_counter()
            if left <= 0:
                raise MonitorError(f"the guest does not end: {self.output.decode(errors='replace')}")
            select.select([self.console], [], [], left)
        self.process.wait(max(deadline - time.perf_counter(), 1))
        return self.output.decode(errors="replace")


def alternate(contestants: Mapping[str, Sequence[str]], times: int) -> Iterator[tuple[str, Sequence[str]]]:
    """The monitors by turns, `times` each; who goes first changes, so neither always follows the other."""
    order = list(contestants.items())
    for turn in range(times):
        yield from order if turn % 2 == 0 else reversed(order)


def device_seconds(pid: int) -> float:
    """CPU seconds that the threads of a monitor have used, those of the vCPUs apart: the guest's own work."""
    used = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if "vcpu" not in (task / "comm").read_text():
                used += int((task / "schedstat").read_text().split()[0])
    return used / 1e9


def context_switches(pid: int) -> int:
    """Times any thread of a process left a processor so far: a thread that never wakes adds none."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        total += sum(map(int, re.findall(r"ctxt_switches:\s+(\d+)", status.read_text())))
    return total


def idle_switches(pid: int, seconds: float = 2.0) -> float:
    """The same a second, over so many, once what comes before is over."""
    time.sleep(2)
    before = context_switches(pid)
    time.sleep(seconds)
    return (context_switches(pid) - before) / seconds


def run_guest(
    command: Sequence[str],
    scratch: Path,
    guest: str,
    boot_args: str,
    *,
    drives: Sequence[Path] = (),
    timeout: float = 60,
) -> str:
    """What a bare-metal guest prints from InstanceStart to its reset."""
    with Monitor(command, scratch) as monitor:
        monitor.configure(guest, boot_args, drives=drives)
        monitor.start()
        return monitor.wait_end(timeout)
