"""A crackle-vmm process on a real socket, and a client that shows every byte."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from support.launcher import FAKE, LAUNCHED, REAL, end_zygotes, start_zygotes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT = 20.0


@pytest.fixture(scope="session", autouse=True)
def zygotes() -> Iterator[None]:
    """What REAL and FAKE need where they go by way of a launcher."""
    started = start_zygotes() if LAUNCHED else []
    yield
    if started:
        end_zygotes(started)


class Answer(NamedTuple):
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def fault(self) -> str:
        """The fault message of a refusal."""
        assert set(self.json) == {"fault_message"}, self.body
        message: str = self.json["fault_message"]
        return message

    @property
    def refusal(self) -> str:
        """What is wrong with a request that is none; what says so is no JSON in the strict sense."""
        said = json.loads(self.body, strict=False)
        assert set(said) == {"error"}, self.body
        message: str = said["error"]
        return message.removesuffix("\nAll previous unanswered requests will be dropped.")


class Client:
    """One connection."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(path)
        self._received = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _more(self) -> bytes:
        data = self.socket.recv(65536)
        self._received += data
        return data

    def receive(self) -> Answer:
        """The next answer, exactly as long as it says it is."""
        while b"\r\n\r\n" not in self._received:
            assert self._more(), f"hung up after {self._received!r}"
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        size = int(headers.get("content-length", 0))
        while len(self._received) < size:
            assert self._more(), "hung up in a body"
        body, self._received = self._received[:size], self._received[size:]
        assert status.startswith("HTTP/1.1 ")
        return Answer(int(status.split()[1]), headers, body)

    def request(self, method: str, path: str, body: Any = None) -> Answer:
        """Send a request, with ``body`` as JSON unless it is bytes, and have the answer."""
        self.send(self.encode(method, path, body))
        return self.receive()

    @staticmethod
    def encode(method: str, path: str, body: Any = None) -> bytes:
        """The bytes of a request."""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
        if body is None:
            return head.encode() + b"\r\n"
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    def hung_up(self) -> bool:
        """Whether the server closes the connection without a further byte."""
        try:
            return self._more() == b"" and not self._received
        except ConnectionResetError:
            return not self._received

    def close(self) -> None:
        self.socket.close()


class Vmm:
    """A running process; ``client`` is a first connection to it."""

    def __init__(self, directory: Path, arguments: list[str], command: list[str]) -> None:
        self.socket = str(directory / "api.socket")
        self.log = directory / "stdout"
        with self.log.open("wb") as stdout:
            self.process = subprocess.Popen(
                [*command, "--api-sock", self.socket, *arguments],
                cwd=directory,  # so that whatever file a request names is there
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.STDOUT,
            )
        self._clients: list[Client] = []
        self.client = self.connect()

    def connect(self) -> Client:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                client = Client(self.socket)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, "no API socket"
                time.sleep(0.01)
            else:
                self._clients.append(client)
                return client

    def request(self, method: str, path: str, body: Any = None) -> Answer:
        return self.client.request(method, path, body)

    def wait(self) -> int:
        """The exit status, negative for a signal."""
        return self.process.wait(TIMEOUT)

    def end(self) -> None:
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Vmm]]:
    """Starts a process with the given arguments; ``fake=True`` gives it the machine that only takes notes."""
    started: list[Vmm] = []

    def start(*arguments: str, fake: bool = False) -> Vmm:
        started.append(Vmm(tmp_path, list(arguments), FAKE if fake else REAL))
        return started[-1]

    yield start
    for vmm in started:
        vmm.end()


@pytest.fixture
def vmm(start: Callable[..., Vmm]) -> Vmm:
    """A process that has not been configured."""
    return start(fake=True)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(b"kernel")
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(8192))
    return path


@pytest.fixture
def started(vmm: Vmm, kernel: Path, disk: Path) -> Vmm:
    """A process whose microVM runs with one drive, ``root``."""
    drive = {"drive_id": "root", "is_root_device": True, "path_on_host": str(disk)}
    for path, body in (
        ("/boot-source", {"kernel_image_path": str(kernel)}),
        ("/drives/root", drive),
        ("/actions", {"action_type": "InstanceStart"}),
    ):
        assert vmm.request("PUT", path, body).status == 204
    return vmm


@pytest.fixture
def told(kernel: Path) -> Callable[[], list[str]]:
    """What the fake machine was told so far."""
    return lambda: Path(f"{kernel}.told").read_text().splitlines()


@pytest.fixture
def run_to_end(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a process that is expected to end by itself; relative paths are in ``tmp_path``."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*FAKE, *arguments],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    return run
