"""The terminal of a process that shows a guest's console: raw while it runs, restored whatever happens."""

from __future__ import annotations

import os
import pty
import signal
import socket
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAKE = str(Path(__file__).with_name("fake_builder.py"))
RAW = termios.ICANON | termios.ECHO | termios.ISIG


class OnTerminal:
    """A process whose controlling terminal is the other end of ``master``."""

    def __init__(self, directory: Path, kernel: Path) -> None:
        self.socket = str(directory / "api.socket")
        config = directory / "config.json"
        config.write_text(f'{{"drives": [], "boot-source": {{"kernel_image_path": "{kernel}"}}}}')
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            arguments = ["--api-sock", self.socket, "--config-file", str(config), "--level", "Off"]
            os.execv(sys.executable, [sys.executable, FAKE, *arguments])
        self.before = self.local_mode()

    def local_mode(self) -> int:
        mode: int = termios.tcgetattr(self.master)[3]
        return mode

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def terminal(tmp_path: Path, kernel: Path) -> Iterator[OnTerminal]:
    terminal = OnTerminal(tmp_path, kernel)
    yield terminal
    if terminal.pid:
        os.kill(terminal.pid, signal.SIGKILL)
        terminal.wait()
    os.close(terminal.master)


def test_keys_go_to_the_guest_unprocessed_while_it_runs(terminal: OnTerminal) -> None:
    assert terminal.before & RAW == RAW
    terminal.wait_for(lambda: terminal.local_mode() & RAW == 0)
    os.write(terminal.master, b"\x03")
    time.sleep(0.1)
    assert os.waitpid(terminal.pid, os.WNOHANG) == (0, 0), "Ctrl-C is a key like any other"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(terminal: OnTerminal, number: int) -> None:
    terminal.wait_for(lambda: terminal.local_mode() & RAW == 0)
    os.kill(terminal.pid, number)
    terminal.wait()
    assert terminal.local_mode() == terminal.before


def test_continued_the_terminal_is_raw_again(terminal: OnTerminal) -> None:
    terminal.wait_for(lambda: terminal.local_mode() & RAW == 0)
    mode = termios.tcgetattr(terminal.master)
    mode[3] = terminal.before
    termios.tcsetattr(terminal.master, termios.TCSANOW, mode)
    os.kill(terminal.pid, signal.SIGCONT)
    terminal.wait_for(lambda: terminal.local_mode() & RAW == 0)
    os.kill(terminal.pid, signal.SIGTERM)
    terminal.wait()
    assert terminal.local_mode() == terminal.before


def test_a_guest_that_ends_leaves_the_terminal_as_it_was(terminal: OnTerminal) -> None:
    terminal.wait_for(lambda: terminal.local_mode() & RAW == 0)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(terminal.socket)
        body = b'{"action_type": "SendCtrlAltDel"}'
        client.sendall(b"PUT /actions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(4096).startswith(b"HTTP/1.1 204")
    assert terminal.wait() == 0
    assert terminal.local_mode() == terminal.before
