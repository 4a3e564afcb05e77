"""A guest that writes more than the reader of its console reads: who waits, who does not, and what is lost."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crackle import MicroVM

from .conftest import Process, configuration

PATIENCE = 60.0
FLOOD = 100_000
LESS = 20_000
PAGE = "".join("\n" if i % 80 == 79 else chr(ord("a") + i % 26) for i in range(4000)).encode()


def said(size: int) -> bytes:
    """What the guest prints with `bytes=size`."""
    return b"flood\n" + PAGE * (size // len(PAGE)) + b"flood end\n"


def read_all(fd: int) -> bytes:
    """Until every writer is gone."""
    text = b""
    while part := os.read(fd, 65536):
        text += part
    return text


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of the smallest size."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


@pytest.fixture
def machine(guests: Path) -> Iterator[Callable[..., MicroVM]]:
    made: list[MicroVM] = []

    def make(boot_args: str, output: int) -> MicroVM:
        made.append(MicroVM(guests / "flood.elf", boot_args=boot_args, memory=32, console=(-1, output)))
        made[-1].start()
        return made[-1]

    yield make
    for vm in made:
        vm.stop()


def test_a_monitor_as_firecracker_drops_for_a_reader_that_has_stopped_and_the_guest_goes_on(
    guests: Path, tmp_path: Path, pipe: tuple[int, int]
) -> None:
    reading, writing = pipe
    api = tmp_path / "api"
    config = tmp_path / "config.json"
    metrics = tmp_path / "metrics"
    config.write_text(
        f'{{"boot-source": {{"kernel_image_path": "{guests / "flood.elf"}", "boot_args": "bytes={FLOOD}"}},'
        f' "drives": [], "machine-config": {{"vcpu_count": 1, "mem_size_mib": 32}},'
        f' "metrics": {{"metrics_path": "{metrics}"}}}}'
    )
    command = [sys.executable, "-c", "from crackle.cli.vmm import main; main()", "--level", "Off"]
    process = subprocess.Popen(
        [*command, "--api-sock", str(api), "--config-file", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=writing,
    )
    try:
        # The guest reaches its end although nobody has read a byte.
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
    os.close(writing)
    kept = read_all(reading)
    assert said(FLOOD).startswith(kept)
    assert 4000 <= len(kept) <= 4096
    # Each line tells what has been added since the one before it.
    lines = [json.loads(line)["uart"] for line in metrics.read_text().splitlines()]
    assert sum(uart["write_count"] for uart in lines) == len(kept)
    assert sum(uart["missed_write_count"] for uart in lines) == len(said(FLOOD)) - len(kept) - (64 << 10)


def test_the_library_waits_for_its_reader_and_loses_nothing(
    machine: Callable[..., MicroVM], pipe: tuple[int, int]
) -> None:
    reading, writing = pipe
    vm = machine(f"bytes={LESS}", writing)
    text = b""
    while len(text) < len(said(LESS)) - 8192:
        # Each pause ends a wait, and each resume begins another: what is left is more than the pipe holds.
        vm.pause()
        vm.resume()
        text += os.read(reading, 4096)
    while len(text) < len(said(LESS)):
        text += os.read(reading, 4096)
    assert text == said(LESS)
    assert vm.wait(PATIENCE).reason == "reset"
    assert vm.metrics()["uart"]["missed_write_count"] == 0


def test_a_pause_is_prompt_while_a_vcpu_waits_for_a_reader_that_has_stopped(
    machine: Callable[..., MicroVM], pipe: tuple[int, int]
) -> None:
    reading, writing = pipe
    vm = machine("", writing)
    deadline = time.monotonic() + PATIENCE
    while struct.unpack("i", fcntl.ioctl(reading, termios.FIONREAD, bytes(4)))[0] < 4096:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    begin = time.monotonic()
    for _ in range(50):
        vm.pause()
        vm.resume()
    vm.pause()
    assert time.monotonic() - begin < PATIENCE
    assert vm.metrics()["uart"]["missed_write_count"] == 0
    kept = vm._machine().serial.save().unsent
    assert kept
    vm.resume()
    text = b""
    expected = b"flood\n" + PAGE * (1 + (len(kept) + 20_000) // len(PAGE))
    while len(text) < len(kept) + 12_000:
        text += os.read(reading, 4096)
    assert expected.startswith(text)
    begin = time.monotonic()
    vm.stop()
    assert time.monotonic() - begin < PATIENCE


def test_a_console_on_a_socket_is_not_waited_for_either(machine: Callable[..., MicroVM]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        vm = machine(f"bytes={LESS}", theirs.fileno())
        text = b""
        while len(text) < len(said(LESS)):
            text += ours.recv(65536)
        assert text == said(LESS)
        assert theirs.getblocking()
        assert vm.wait(PATIENCE).reason == "reset"


def test_output_beyond_a_limit_set_over_the_api_is_not_written_and_is_counted(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path
) -> None:
    process, size = spawn(), 100
    limit = {"size": size, "refill_time": 86_400_000}
    process.api.ask("PUT", "/serial", {"serial_out_path": str(tmp_path / "console"), "rate_limiter": limit})
    process.api.ask("PUT", "/metrics", {"metrics_path": str(tmp_path / "metrics")})
    process.boot(guests / "flood.elf", f"bytes={LESS}")
    process.process.wait(PATIENCE)
    assert (tmp_path / "console").read_bytes() == said(LESS)[:size]
    # Each line has what was counted since the one before.
    lines = [json.loads(line)["uart"] for line in (tmp_path / "metrics").read_text().splitlines()]
    assert sum(uart["write_count"] for uart in lines) == size
    assert sum(uart["rate_limiter_dropped_bytes"] for uart in lines) == len(said(LESS)) - size


def test_a_device_that_cannot_be_waited_for_is_read_as_the_guest_reads(guests: Path, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(json.dumps(configuration(guests / "echo.elf", "", [], 32, 1)))
    arguments = ("--no-api", "--config-file", "config", "--level", "Off")
    command = [sys.executable, "-m", "crackle.cli.vmm", *arguments]
    with (
        open("/dev/zero", "rb") as endless,
        subprocess.Popen(command, cwd=tmp_path, stdin=endless, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        text = process.stdout.read(1000)
        process.kill()
    assert text == b"echo\n" + bytes(995)
