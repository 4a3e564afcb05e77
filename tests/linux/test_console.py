"""The serial console of a Linux guest is usable: a shell, long input, `crackle run` on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import BOOT_ARGS, Guest

Boot = Callable[..., Guest]


def test_a_shell_answers_on_the_console(boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs).wait_shell()
    assert guest.sh("echo $((6 * 7))") == "42"
    assert guest.sh("uname -s") == "Linux"


def test_long_input_is_not_lost(boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs).wait_shell()
    # More than the receive FIFO holds many times over, in lines that the terminal's line buffer can take.
    lines = [f"{number:04d} " + "x" * 60 for number in range(64)]
    guest.console.write("cat > /tmp/pasted << END\n" + "".join(f"{line}\n" for line in lines) + "END\n")
    # The guest's terminal sends XOFF and XON while its own buffer is full.
    pasted = guest.sh("cat /tmp/pasted").replace("\x11", "").replace("\x13", "")
    assert pasted.splitlines() == lines


# More than the 4 KiB that the guest's terminal keeps.
@pytest.mark.parametrize(
    "count", [1000, pytest.param(20_000, marks=[pytest.mark.soak, pytest.mark.timeout(1500)])]
)
def test_much_output_arrives_whole(boot: Boot, rootfs: Path, count: int) -> None:
    guest = boot(rootfs=rootfs).wait_shell()
    numbers = guest.sh(f"seq 1 {count}", timeout=120 + count / 20).split()
    assert numbers == [str(number) for number in range(1, count + 1)]
    uart = guest.vm.metrics()["uart"]
    assert uart["missed_write_count"] == 0
    assert uart["write_count"] >= len(guest.console.output)


def test_the_uart_is_recognised_as_a_16550a_with_its_interrupt(boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs).wait_shell()
    assert "16550A" in guest.sh("dmesg | grep ttyS0.*16550A")
    assert int(guest.sh("grep ttyS0 /proc/interrupts").split()[1]) > 0


class Terminal:
    """A pseudo-terminal with a program on it."""

    def __init__(self, *command: str | Path) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
        self.text = b""

    def expect(self, pattern: str, seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(pattern.encode(), self.text):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += os.read(self.master, 65536)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def is_restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


def crackle_run(kernel: Path, rootfs: Path) -> Terminal:
    """`crackle run` on a terminal, at the guest's prompt."""
    arguments = ["--kernel", kernel, "--rootfs", rootfs, "--boot-args", BOOT_ARGS]
    terminal = Terminal(sys.executable, "-m", "crackle.cli.main", "run", *arguments)
    terminal.expect(" # ")
    return terminal


def test_crackle_run_is_a_terminal_on_the_guest_and_gives_it_back(
    boot: Boot, kernels: dict[str, Path], rootfs: Path
) -> None:
    terminal = crackle_run(kernels["acpi"], rootfs)
    try:
        assert not terminal.is_restored(), "the terminal is raw while the guest has it"
        # Ctrl-C is the guest's: it ends the sleep there, and not the microVM.
        terminal.type("echo sl''eeps; sleep 1000\n")
        terminal.expect("sleeps")
        terminal.type("\x03")
        terminal.type("echo still $((40 + 2))\n")
        terminal.expect("still 42")
        terminal.type("reboot -f\n")
        assert terminal.process.wait(60) == 0
        assert terminal.is_restored()
    finally:
        terminal.close()


def test_crackle_run_restores_the_terminal_when_the_guest_process_is_killed(
    boot: Boot, kernels: dict[str, Path], rootfs: Path
) -> None:
    terminal = crackle_run(kernels["acpi"], rootfs)
    try:
        children = Path(f"/proc/{terminal.process.pid}/task/{terminal.process.pid}/children").read_text()
        os.kill(int(children.split()[0]), signal.SIGKILL)
        assert terminal.process.wait(30) == 128 + signal.SIGKILL
        assert terminal.is_restored()
    finally:
        terminal.close()


def test_the_escape_key_pressed_twice_ends_crackle_run(
    boot: Boot, kernels: dict[str, Path], rootfs: Path
) -> None:
    terminal = crackle_run(kernels["acpi"], rootfs)
    try:
        terminal.type("\x1d\x1d")
        assert terminal.process.wait(30) == 128 + signal.SIGTERM
        assert terminal.is_restored()
    finally:
        terminal.close()
