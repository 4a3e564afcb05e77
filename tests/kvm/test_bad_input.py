"""What cannot be had is said in one sentence that names it, and leaves nothing behind: through every door."""

from __future__ import annotations

import gc
import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.api.conftest import REAL, Vmm

from crackle import MicroVM
from crackle.errors import ConfigError
from crackle.schema.drive import Drive

MIB = 1 << 20
FIRST_SEGMENT = (
    64  # the ELF header is 64 bytes long; program headers follow it (System V ABI, chapter 4 and 5)
)
P_PADDR, P_FILESZ, P_MEMSZ = 24, 32, 40
E_MACHINE, E_PHOFF = 18, 32


def changed(elf: bytes, offset: int, form: str, value: int) -> bytes:
    copy = bytearray(elf)
    struct.pack_into(form, copy, offset, value)
    return bytes(copy)


def segment(elf: bytes, field: int, value: int) -> bytes:
    (headers,) = struct.unpack_from("<Q", elf, E_PHOFF)
    return changed(elf, headers + field, "<Q", value)


KERNELS = {
    "empty": (lambda _elf: b"", "the file is empty"),
    "no ELF": (lambda _elf: b"#!/bin/sh\n" * 100, "neither an ELF vmlinux nor a bzImage"),
    "another machine's": (lambda elf: changed(elf, E_MACHINE, "<H", 183), "machine 183"),
    "truncated header": (lambda elf: elf[:40], "truncated: 40 of 64 bytes"),
    "truncated": (lambda elf: elf[: len(elf) // 8], "truncated: segment at 0x100000 ends beyond"),
    "beyond memory": (
        lambda elf: segment(elf, P_PADDR, 1 << 40),
        "segment at 0x10000000000 .* outside the 64 MiB",
    ),
    "in the MMIO gap": (lambda elf: segment(elf, P_PADDR, 0xD000_0000), "segment at 0xd0000000 .* outside"),
    "around the end": (lambda elf: segment(elf, P_PADDR, (1 << 64) - 4096), "segment at 0xf+000 .* outside"),
    "larger than memory": (
        lambda elf: segment(elf, P_MEMSZ, 1 << 50),
        "of 0x4000000000000 bytes is outside the 64 MiB",
    ),
}


@pytest.fixture(scope="module")
def files(guests: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a good guest, all the bad kernels, a disk and a large file."""
    directory = tmp_path_factory.mktemp("bad")
    elf = (guests / "idle.elf").read_bytes()
    (directory / "good").write_bytes(elf)
    for name, (make, _) in KERNELS.items():
        (directory / name).write_bytes(make(elf))
    (directory / "directory").mkdir()
    (directory / "disk").write_bytes(bytes(MIB))
    with (directory / "large").open("wb") as file:
        file.truncate(100 * MIB)
    return directory


def held() -> tuple[int, int]:
    """How many descriptors and threads this process has, once what ends in the background has ended."""
    before = None
    while before != (before := (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))):
        time.sleep(0.02)
    return before


CONFIGURATIONS = {
    "missing kernel": ({"kernel": "/none"}, "The kernel file cannot be opened: No such file .*: /none"),
    "kernel is a directory": (
        {"kernel": "directory"},
        "Cannot load kernel due to .*Unable to read elf header: it is not a regular file",
    ),
    "initrd too large": ({"initrd": "large"}, "initrd address: its 104857600 bytes do not fit"),
    "long command line": ({"boot_args": "a" * 2048}, "has 2048 bytes, 2047 is the most"),
    "too long with what is appended": (
        {"boot_args": "a" * 2040, "rootfs": "disk"},
        "too long. It would have 20[0-9]+ bytes, 2047 is the most",
    ),
    "command line with a NUL": ({"boot_args": "a\0b"}, "Null terminator detected .* at position 1"),
    "no vCPU": ({"cpus": 0}, "from 1 to 32.*got 0"),
    "33 vCPUs": ({"cpus": 33}, "from 1 to 32.*got 33"),
    "vCPUs as text": ({"cpus": "2"}, 'Expected `int`, got `str`, at `.\\.vcpu_count` .given: "2"'),
    "half a vCPU": ({"cpus": 1.5}, "Expected `int`, got `float`"),
    "no memory": ({"memory": 0}, "memory size .* is 0"),
    "less than no memory": ({"memory": -1}, "Expected `int` >= 0.*given: -1"),
    "memory as text": ({"memory": "128"}, "Expected `int`, got `str`.*mem_size_mib"),
    "1 MiB": ({"memory": 1}, "segment at 0x100000 .* outside the 1 MiB"),
    "more memory than addresses": ({"memory": 10_000_000}, "10000000 MiB is more than the"),
    "absurd memory": ({"memory": 1 << 70}, f"`mem_size_mib` must be an `int` <= .*given: {1 << 70}"),
    "missing disk": ({"rootfs": "/none"}, "No such file .* /none"),
    "disk is a directory": ({"rootfs": "directory"}, "Is a directory .*directory"),
    "two roots": (
        {"rootfs": "disk", "drives": [Drive("second", True, path_on_host="disk")]},
        "already exists! It is 'rootfs'; 'second' cannot be another",
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_library_refuses_the_kernel(files: Path, name: str) -> None:
    gc.collect()  # what earlier tests have left to it
    before = held()
    with pytest.raises(ConfigError, match=KERNELS[name][1]), MicroVM(files / name, memory=64):
        pass
    assert held() == before


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_library_refuses(files: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, message = CONFIGURATIONS[name]
    monkeypatch.chdir(files)
    gc.collect()  # what earlier tests have left to it
    before = held()
    with pytest.raises(ConfigError, match=message), MicroVM(**{"kernel": "good", "memory": 64, **options}):
        pass
    assert held() == before


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--kernel", "/none"], 1, "No such file or directory .*: /none"),
        (["--kernel", "directory"], 1, "not a regular file"),
        (["--kernel", "no ELF"], 1, "neither an ELF"),
        (["--kernel", "good", "--rootfs", "directory"], 1, "Is a directory .*directory"),
        (["--kernel", "good", "--memory", "10000000"], 1, "10000000 MiB is more than"),
        (["--kernel", "good", "--cpus", "33"], 2, "--cpus"),
    ],
)
def test_crackle_run_refuses(files: Path, options: list[str], status: int, message: str) -> None:
    command = [sys.executable, "-m", "crackle.cli.main", "run", *options]
    ended = subprocess.run(
        command, cwd=files, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == status
    assert re.search(message, ended.stderr)
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group for limits of processes and threads."""
    path = Path("/sys/fs/cgroup/pids") / f"crackle-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    yield path
    path.rmdir()


@pytest.mark.parametrize("door", ["crackle-vmm", "crackle run"])
def test_where_threads_are_limited_it_runs_or_says_so(
    group: Path, guests: Path, tmp_path: Path, door: str
) -> None:
    kernel = guests / "hello.elf"
    config = {"boot-source": {"kernel_image_path": str(kernel)}, "drives": []}
    (tmp_path / "vm.json").write_text(json.dumps(config))
    command = [*REAL, "--no-api", "--config-file", "vm.json"]
    if door == "crackle run":
        command = [sys.executable, "-m", "crackle.cli.main", "run", str(kernel)]
    ends = {}
    for limit in (1, 2, 3, 4, 12):
        (group / "pids.max").write_text(str(limit))
        done = subprocess.run(
            command,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            preexec_fn=lambda: (group / "cgroup.procs").write_text("0") and None,
        )
        told = done.stdout + done.stderr
        assert "Traceback" not in told
        assert done.returncode in (0, 1), (limit, told)
        if done.returncode:
            assert re.search(r"thread|Resource temporarily unavailable", told), (limit, told)
        ends[limit] = done.returncode
    assert (ends[1], ends[12]) == (1, 0)


@pytest.fixture
def server(tmp_path: Path):
    server = Vmm(tmp_path, [], REAL)
    yield server
    server.end()


def put(server: Vmm, path: str, **body: object) -> str:
    """Nothing, or the fault."""
    answer = server.request("PUT", path, body)
    assert answer.status in (204, 400), answer
    return "" if answer.status == 204 else answer.fault


def start_of(server: Vmm, kernel: Path, memory: int = 64, **machine: object) -> str:
    return (
        put(server, "/machine-config", vcpu_count=1, mem_size_mib=memory, **machine)
        or put(server, "/boot-source", kernel_image_path=str(kernel))
        or put(server, "/actions", action_type="InstanceStart")
    )


def test_api_refuses_kernels_and_boots_the_next(server: Vmm, files: Path) -> None:
    descriptors = []
    for _ in range(3):
        for name, (_, message) in KERNELS.items():
            fault = start_of(server, files / name)
            assert re.match(f"Start microvm error: .*{message}", fault), name
            assert server.request("GET", "/").json["state"] == "Not started"
        descriptors.append(len(os.listdir(f"/proc/{server.process.pid}/fd")))
    assert max(descriptors) - min(descriptors) < len(KERNELS), "a failed start leaves descriptors behind"
    assert start_of(server, files / "good") == ""
    assert server.request("GET", "/").json["state"] == "Running"


def test_api_refuses_memory_and_boots_with_less(server: Vmm, files: Path) -> None:
    assert "10000000 MiB" in start_of(server, files / "good", memory=10_000_000)
    assert "outside the 1 MiB" in start_of(server, files / "good", memory=1)
    assert start_of(server, files / "good") == ""


def test_api_says_that_there_are_no_huge_pages(server: Vmm, files: Path) -> None:
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not free.exists() or int(free.read_text()) > 0:
        pytest.skip("this host has huge pages, or no support for them")
    assert "64 MiB" in start_of(server, files / "good", huge_pages="2M")
    assert start_of(server, files / "good", huge_pages="None") == ""


def test_api_resumes_a_running_guest_that_sleeps(server: Vmm, files: Path) -> None:
    assert start_of(server, files / "good") == ""
    for state in ("Resumed", "Paused", "Paused", "Resumed", "Resumed"):
        assert server.request("PATCH", "/vm", {"state": state}).status == 204


@pytest.mark.parametrize("name", ["no ELF", "truncated"])
def test_configuration_file_with_a_bad_kernel(files: Path, tmp_path: Path, name: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"boot-source": {"kernel_image_path": str(files / name)}, "drives": []}), encoding="utf-8"
    )
    ended = subprocess.run(
        [*REAL, "--no-api", "--config-file", str(config)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert re.search(KERNELS[name][1], ended.stderr)
    assert ended.stderr.count("\n") == 1


def test_threads_are_gone(files: Path) -> None:
    before = set(os.listdir("/proc/self/task"))
    with MicroVM(files / "good", memory=64):
        assert set(os.listdir("/proc/self/task")) > before
    # A thread that has been joined may still be listed for a moment.
    deadline = time.monotonic() + 10
    while set(os.listdir("/proc/self/task")) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(os.listdir("/proc/self/task")) - before
