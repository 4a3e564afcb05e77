"""`crackle run` on a terminal: who has the keys, how one gets out, and what job control does to it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "crackle.cli.main", "run", "--memory", "32", "--kernel")
RAW = termios.ICANON | termios.ECHO | termios.ISIG
PATIENCE = 60.0

# A shell with one job: it does what a line on descriptor 3 says, and answers on descriptor 4.
SHELL = r"""
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
job = os.fork()
if job == 0:
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTTOU])
    if sys.argv[1] == "fg":
        while os.tcgetpgrp(0) != os.getpgrp():
            pass
    os.execv(sys.argv[2], sys.argv[2:])
try:
    os.setpgid(job, job)
except PermissionError:
    pass  # it has done so itself, and gone on
if sys.argv[1] == "fg":
    os.tcsetpgrp(0, job)
os.write(4, b"%d\n" % job)
for line in open(3):
    order = line.strip()
    if order == "fg":
        os.tcsetpgrp(0, job)
    elif order == "bg":
        os.tcsetpgrp(0, os.getpgrp())
    elif order == "wait":
        status = os.waitpid(job, os.WUNTRACED)[1]
        order = "stopped" if os.WIFSTOPPED(status) else str(os.waitstatus_to_exitcode(status))
        os.tcsetpgrp(0, os.getpgrp())
    else:
        os.killpg(job, int(order))
    os.write(4, order.encode() + b"\n")
"""


class Shell:
    """A terminal with a shell and its one job, `crackle run`, in the foreground or not."""

    def __init__(self, kernel: Path, place: str = "fg", *arguments: str) -> None:
        orders_read, self._orders = os.pipe()
        self._answers, answers_write = os.pipe()
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.dup2(orders_read, 13)
            os.dup2(answers_write, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)
            os.closerange(5, 64)
            os.execv(sys.executable, [sys.executable, "-c", SHELL, place, *COMMAND, str(kernel), *arguments])
        os.close(orders_read)
        os.close(answers_write)
        self.before = self.mode()
        self.text = b""
        self.job = int(self._answer())

    def mode(self) -> list[object]:
        return termios.tcgetattr(self.master)

    def is_raw(self) -> bool:
        flags = self.mode()[3]
        assert isinstance(flags, int)
        return flags & RAW == 0

    def _answer(self) -> str:
        answer = b""
        while not answer.endswith(b"\n"):
            assert select.select([self._answers], [], [], PATIENCE)[0], self.text
            answer += os.read(self._answers, 1)
            self.read(0)
        return answer.decode().strip()

    def order(self, order: object) -> str:
        """Have the shell do it: "fg", "bg", "wait" for the job to stop or end, or send the job a signal."""
        os.write(self._orders, f"{int(order) if isinstance(order, int) else order}\n".encode())
        return self._answer()

    def read(self, seconds: float) -> None:
        if select.select([self.master], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self.text += os.read(self.master, 65536)

    def expect(self, pattern: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern.encode(), self.text):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text!r}"
            self.read(0.1)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.text
            self.read(0.01)

    def type(self, data: bytes) -> None:
        """As fast as the terminal takes it: its own buffer is small."""
        deadline = time.monotonic() + PATIENCE
        while data:
            assert time.monotonic() < deadline, f"{len(data)} bytes are not taken"
            self.read(0)
            if select.select([], [self.master], [], 0.1)[1]:
                data = data[os.write(self.master, data[:1000]) :]

    def child(self) -> int:
        return int(Path(f"/proc/{self.job}/task/{self.job}/children").read_text().split()[0])

    def close(self) -> None:
        for pid in (self.job, self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        for fd in (self.master, self._orders, self._answers):
            os.close(fd)


@pytest.fixture
def shell(guests: Path) -> Iterator[Callable[..., Shell]]:
    made: list[Shell] = []

    def make(guest: str, place: str = "fg", *arguments: str) -> Shell:
        made.append(Shell(guests / f"{guest}.elf", place, *arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


Start = Callable[..., Shell]


def test_it_says_how_to_get_out_and_why_the_guest_ended(shell: Start) -> None:
    terminal = shell("hello")
    assert terminal.order("wait") == "0"
    terminal.expect(r"crackle: Ctrl-\] asks the guest to shut down; twice pulls the plug\r\n")
    terminal.expect(r"hello\r\n(.|\n)*crackle: the guest asked for a reset\r\n")
    assert terminal.mode() == terminal.before


def test_without_a_terminal_it_says_why_the_guest_failed_and_nothing_of_a_good_end(guests: Path) -> None:
    for guest, status, lines, why in (("hello", 0, 0, ""), ("faults", 1, 1, "rip=0x")):
        command = [*COMMAND, str(guests / f"{guest}.elf"), "--boot-args", "f=triple"]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == status
        assert len(re.findall("^crackle: .*", done.stderr, re.MULTILINE)) == lines
        assert why in done.stderr
        assert "crackle:" not in done.stdout


def test_ctrl_bracket_asks_once_and_pulls_the_plug_twice(shell: Start) -> None:
    terminal = shell("echo")
    terminal.expect("echo\r\n")
    terminal.type(b"\x1d")
    terminal.expect(r"the guest is asked to shut down; Ctrl-\] again pulls the plug")
    terminal.type(b"alive\r\n")
    terminal.expect("alive")
    terminal.type(b"\x1d")
    assert terminal.order("wait") == "143"
    terminal.expect(r"crackle: the plug was pulled \(Ctrl-\]\)\r\n")
    assert terminal.mode() == terminal.before


@pytest.mark.parametrize(("heeds", "why"), [("power", "switched itself off"), ("keys", "asked for a reset")])
def test_ctrl_bracket_once_is_the_power_button_and_then_ctrl_alt_del(
    shell: Start, heeds: str, why: str
) -> None:
    terminal = shell("heed", "fg", "--boot-args", heeds)
    terminal.expect("heed\r\n")
    terminal.type(b"\x1d")
    assert terminal.order("wait") == "0"
    terminal.expect(f"crackle: the guest {why}\r\n")
    assert terminal.mode() == terminal.before


def test_ctrl_bracket_is_heard_behind_much_that_the_guest_does_not_read(shell: Start) -> None:
    terminal = shell("idle")
    terminal.expect("idle")
    terminal.until(terminal.is_raw)
    terminal.type(b"x" * 1_200_000)
    terminal.type(b"\x1d\x1d")
    assert terminal.order("wait") == "143"
    terminal.expect(r"crackle: \d+ bytes that were typed are lost: the guest did not read them")
    assert terminal.mode() == terminal.before


def test_what_is_typed_around_ctrl_bracket_reaches_the_guest(shell: Start) -> None:
    terminal = shell("echo")
    terminal.expect("echo\r\n")
    terminal.type(b"bef\x1dore\nend\n")
    assert terminal.order("wait") == "0"
    terminal.expect("before")


def test_stopped_it_gives_the_terminal_back_and_continued_it_is_raw_again(shell: Start) -> None:
    terminal = shell("echo")
    terminal.expect("echo\r\n")
    terminal.until(terminal.is_raw)
    for number in (signal.SIGTSTP, signal.SIGSTOP):
        terminal.order(number)
        assert terminal.order("wait") == "stopped"
        if number == signal.SIGTSTP:
            assert terminal.mode() == terminal.before
        else:
            # It had no chance to: a shell puts its own terminal in order.
            termios.tcsetattr(terminal.master, termios.TCSANOW, terminal.before)
        terminal.order("fg")
        terminal.order(signal.SIGCONT)
        terminal.until(terminal.is_raw)
    terminal.type(b"again\nend\n")
    terminal.expect("again")
    assert terminal.order("wait") == "0"
    assert terminal.mode() == terminal.before


def test_the_guest_stands_still_while_it_is_stopped(shell: Start) -> None:
    terminal = shell("echo")
    terminal.expect("echo\r\n")
    child = terminal.child()
    os.kill(terminal.job, signal.SIGTSTP)
    assert terminal.order("wait") == "stopped"

    def is_stopped() -> bool:
        return Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"

    terminal.until(is_stopped)
    terminal.order("fg")
    os.kill(terminal.job, signal.SIGCONT)
    terminal.until(lambda: not is_stopped())
    terminal.type(b"\x1d\x1d")
    assert terminal.order("wait") == "143"


def test_what_is_typed_while_it_is_in_the_background_is_not_its_own_and_afterwards_all_is(
    shell: Start,
) -> None:
    terminal = shell("echo", "bg")
    terminal.expect("echo\r\n")
    assert not terminal.is_raw()
    terminal.type(b"for the shell\n")
    terminal.order("fg")
    terminal.until(terminal.is_raw)
    terminal.type(b"more\n")
    terminal.expect("more")
    terminal.order("bg")
    terminal.type(b"to others\n")
    terminal.order("fg")
    terminal.type(b"back\nend\n")
    terminal.expect("back")
    assert terminal.order("wait") == "0"
    assert terminal.mode() == terminal.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_gives_the_terminal_back(shell: Start, number: signal.Signals) -> None:
    terminal = shell("idle")
    terminal.expect("idle")
    terminal.until(terminal.is_raw)
    os.kill(terminal.job, number)
    assert terminal.order("wait") == "143"
    terminal.expect(f"crackle: ended by {number.name}")
    assert terminal.mode() == terminal.before


def test_a_guest_process_that_is_killed_is_told_and_the_terminal_is_given_back(shell: Start) -> None:
    terminal = shell("idle")
    terminal.expect("idle")
    terminal.until(terminal.is_raw)
    os.kill(terminal.child(), signal.SIGKILL)
    assert terminal.order("wait") == "137"
    terminal.expect(r"crackle: the process that ran the guest was killed \(SIGKILL\)")
    assert terminal.mode() == terminal.before


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_nothing_else(guests: Path, closed: str) -> None:
    command = f'exec "$@" {closed}'
    arguments = ["sh", "-c", command, "sh", *COMMAND, str(guests / "hello.elf")]
    done = subprocess.run(
        arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0
    assert ("hello" in done.stdout) is (">&-" not in closed.split())
    assert done.stderr == ""
