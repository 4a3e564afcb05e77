"""`crackle clone` and `crackle pool`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crackle import ConfigError, MicroVM, PageHandler
from crackle.cli.templates import options_of

from .conftest import PATIENCE
from .test_own_process import gone

CRACKLE = (sys.executable, "-m", "crackle.cli.main")


def snapshot_of(kernel: Path, boot_args: str, said: str, path: Path) -> Path:
    with MicroVM(kernel, boot_args=boot_args, memory=32) as vm:
        vm.console.expect(said, PATIENCE)
        vm.snapshot(path)
    return path


@pytest.fixture
def crackle() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        words = [*CRACKLE, *map(str, arguments)]
        started.append(
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_clones_are_shown_and_end_by_themselves(
    crackle: Callable[..., subprocess.Popen[str]], guests: Path, tmp_path: Path
) -> None:
    path = snapshot_of(guests / "idle.elf", "tick=100 beats=10 ticks=60", "beat 1\n", tmp_path / "s")
    process = crackle("clone", path, "-n", 3, "--id", "worker-{index}")
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    for index in range(3):
        assert re.search(rf"^worker-{index}: process \d+$", errors, re.MULTILINE)
        own = [line.partition("| ")[2] for line in output.splitlines() if line.startswith(f"{index}| ")]
        assert own[-2:] == ["beat 6", "idle end"]
    assert all(gone(int(pid)) for pid in re.findall(r"process (\d+)", errors))


def test_a_signal_ends_all(
    crackle: Callable[..., subprocess.Popen[str]], guests: Path, tmp_path: Path
) -> None:
    path = snapshot_of(guests / "count.elf", "", "count 2\n", tmp_path / "s")
    process = crackle("clone", path, "-n", 2)
    assert process.stdout is not None
    for line in process.stdout:
        if "count 6" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert all(gone(int(pid)) for pid in re.findall(r"process (\d+)", errors))


def test_clones_have_their_memory_from_a_page_fault_handler(
    crackle: Callable[..., subprocess.Popen[str]], guests: Path, tmp_path: Path
) -> None:
    path = snapshot_of(guests / "idle.elf", "tick=100 beats=10 ticks=30", "beat 1\n", tmp_path / "s")
    with PageHandler(path) as handler:
        process = crackle("clone", path, "--handler", handler.path)
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        assert output.splitlines()[-2:] == ["beat 3", "idle end"]
    process = crackle("clone", path, "--handler", handler.path)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert str(handler.path) in errors
    assert len(errors.splitlines()) == 1


def test_what_cannot_be_is_one_sentence(
    crackle: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = crackle("clone", tmp_path)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert errors.startswith("crackle: ")
    assert "Failed to open snapshot file: No such file or directory" in errors
    assert len(errors.splitlines()) == 1
    with pytest.raises(ConfigError, match="--tap wants NAME=TEMPLATE, not 'eth0'"):
        options_of(tap=["eth0"])
    with pytest.raises(ConfigError, match="cannot read the metadata: No such file"):
        options_of(metadata=tmp_path / "none")
    (tmp_path / "bad").write_text("{")
    with pytest.raises(ConfigError, match="the metadata is no JSON"):
        options_of(metadata=tmp_path / "bad")


class PoolClient:
    """Connected to `crackle pool`."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")

    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.readline())
        return found

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def test_whoever_connects_to_a_pool_has_a_microvm(
    crackle: Callable[..., subprocess.Popen[str]], guests: Path, tmp_path: Path
) -> None:
    path = snapshot_of(guests / "echo.elf", "", "echo\n", tmp_path / "s")
    address = tmp_path / "pool.sock"
    process = crackle("pool", path, "--socket", address, "--size", 2, "--limit", 2, "--wait", 30)
    assert process.stdout is not None
    assert process.stdout.readline() == f"listening at {address}\n"
    assert os.stat(address).st_mode & 0o777 == 0o600
    first, second = PoolClient(address), PoolClient(address)
    pids = []
    for client, word in ((first, b"first\n"), (second, b"second\n")):
        pids.append(client.answer()["pid"])
        client.socket.sendall(word)
        assert client.file.readline() == word
    # The guest's end is the connection's, and the other way round.
    second.socket.sendall(b"end\n")
    assert b"interrupts" in second.file.read()
    assert gone(pids[1])
    second.close()
    first.close()
    assert gone(pids[0])
    third = PoolClient(address)
    pid = third.answer()["pid"]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert errors == ""
    assert gone(pid)
    third.close()
    assert not address.exists()


def test_a_pool_without_capacity_says_so(
    crackle: Callable[..., subprocess.Popen[str]], guests: Path, tmp_path: Path
) -> None:
    path = snapshot_of(guests / "echo.elf", "", "echo\n", tmp_path / "s")
    address = tmp_path / "pool.sock"
    process = crackle("pool", path, "--socket", address, "--size", 1, "--limit", 1, "--wait", 0.5)
    assert process.stdout is not None
    assert process.stdout.readline()
    clients = [PoolClient(address) for _ in range(2)]
    answers = [client.answer() for client in clients]
    assert any(answer.get("error", "").startswith("no capacity: ") for answer in answers)
    for client in clients:
        client.close()
