"""Filters of system calls on the threads of running microVMs, seen from outside, wherever a microVM lives."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crackle import MicroVM, VirtioDevice

from .conftest import PATIENCE, Client, Process

# <linux/sched.h>: PF_IO_WORKER and PF_USER_WORKER, threads of the kernel's own.
OF_KERNEL = 0x10 | 0x4000
NONE, FILTERED = "0", "2"
"""proc(5), Seccomp."""


def modes(pid: int, field: str = "Seccomp") -> dict[str, str]:
    """For each thread of a process, what its status says."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        if int((task / "stat").read_text().rpartition(")")[2].split()[6]) & OF_KERNEL:
            continue
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        found[status["Name"].strip()] = status[field].strip()
    return found


def started(pid: int) -> dict[str, str]:
    """The modes of a process whose guest runs: its threads have their filters before that."""
    found = modes(pid)
    assert {"io", "fc_vcpu 0"} <= set(found)
    return found


def test_every_thread_has_a_filter_when_the_guest_runs(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    process = spawn()
    process.api.ask(
        "PUT",
        "/drives/a",
        {
            "drive_id": "a",
            "path_on_host": str(tmp_path / "disk"),
            "is_root_device": False,
            "io_engine": "Async",
        },
    )
    process.api.ask("PUT", "/vsock", {"guest_cid": 3, "uds_path": str(tmp_path / "v.sock")})
    process.boot(guests / "count.elf", "", vcpu_count=2)
    # As soon as the answer is there.
    pid = process.process.pid
    assert {"io", "fc_vcpu 0", "fc_vcpu 1"} <= set(modes(pid))
    assert set(modes(pid).values()) == {FILTERED}
    assert set(modes(pid, "NoNewPrivs").values()) == {"1"}
    process.counted(2)
    assert set(modes(pid).values()) == {FILTERED}
    # Each its own, and none that of its maker on top: what the main thread may, no other has to ask of two.
    filters = modes(pid, "Seccomp_filters")
    assert set(filters.values()) == {"1"}


def test_without_filters_there_are_none(spawn: Callable[..., Process], guests: Path) -> None:
    process = spawn("--no-seccomp")
    process.boot(guests / "count.elf", "")
    process.counted(2)
    assert set(started(process.process.pid).values()) == {NONE}


def test_clones_have_their_parents_filter_and_their_threads_their_own_on_top(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path
) -> None:
    process = spawn()
    process.boot(guests / "count.elf", "")
    process.counted(2)
    api, pids = process.api, []
    try:
        for generation in range(2):
            console, path = tmp_path / f"console{generation}", tmp_path / f"api{generation}"
            body = {"clones": [{"api_sock": str(path), "serial_out_path": str(console)}]}
            (clone,) = api.ask("PUT", "/vm/fork", body, expect=200)["clones"]
            pids.append(clone["pid"])
            deadline = time.monotonic() + PATIENCE
            while console.read_text().count("\n") < 2:
                assert time.monotonic() < deadline
                select.select([], [], [], 0.01)
            assert set(started(pids[-1]).values()) == {FILTERED}
            # However many generations there are.
            filters = modes(pids[-1], "Seccomp_filters")
            assert filters.pop("fc_vcpu 0") == filters.pop("io") == "2"
            assert list(filters.values()) == ["1"]
            api = Client(path)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def test_a_microvm_in_a_process_of_its_own_is_filtered_wholly_and_its_program_is_not(guests: Path) -> None:
    with MicroVM(guests / "count.elf", boot_args="", memory=64, own_process=True) as vm:
        vm.console.expect("count 2\n", PATIENCE)
        assert vm.pid is not None
        assert set(started(vm.pid).values()) == {FILTERED}
        assert modes(os.getpid())[Path("/proc/self/comm").read_text().strip()] == NONE


def test_in_a_program_the_threads_of_a_microvm_are_filtered_and_no_others(guests: Path) -> None:
    with MicroVM(guests / "count.elf", boot_args="", memory=64) as vm:
        vm.console.expect("count 2\n", PATIENCE)
        found = started(os.getpid())
        assert {name for name, mode in found.items() if mode == FILTERED} == {"io", "fc_vcpu 0"}


class Idle(VirtioDevice):
    """Does nothing."""

    device_id = 4
    queues = 1

    def handle_queue(self, index: int) -> None:
        """Nothing."""


def test_a_device_written_in_python_may_call_what_it_likes(guests: Path) -> None:
    with MicroVM(guests / "count.elf", boot_args="", memory=64, devices=[Idle()]) as vm:
        vm.console.expect("count 2\n", PATIENCE)
        found = started(os.getpid())
        assert {name for name, mode in found.items() if mode == FILTERED} == {"io"}


def policy(directory: Path, **forbidden: str) -> str:
    """A policy file in which a thread may do everything but one thing."""
    path = directory / "policy.json"
    lists = {
        name: {
            "default_action": "allow",
            "filter_action": "trap",
            "filter": [{"syscall": forbidden[name]}] if name in forbidden else [],
        }
        for name in ("vmm", "api", "vcpu")
    }
    path.write_text(json.dumps(lists))
    return str(path)


def test_what_a_policy_of_ones_own_forbids_ends_the_process_as_firecracker(
    vmm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    arguments = ["--metrics-path", str(tmp_path / "metrics"), "--show-level"]
    process = vmm("count", "", "--seccomp-filter", policy(tmp_path, vcpu="ioctl"), *arguments)
    assert process.wait(PATIENCE) == 148
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.partition("] ")[2] for line in lines[-3:-1]] == [
        "Shutting down VM after intercepting signal 31, code 1.",
        "Shutting down VM after intercepting a bad syscall (16).",
    ]
    assert "[anonymous-instance:fc_vcpu 0:ERROR]" in lines[-1]
    assert "system call 16 with the first arguments 0x" in lines[-1]
    flushes = [json.loads(line) for line in (tmp_path / "metrics").read_text().splitlines()]
    assert sum(flush["seccomp"]["num_faults"] for flush in flushes) == 1
    assert all(flush.keys() == flushes[0].keys() for flush in flushes)


def test_the_main_thread_is_judged_from_the_start_of_the_guest_on(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path
) -> None:
    process = spawn("--seccomp-filter", policy(tmp_path, api="accept4"))
    process.boot(guests / "count.elf", "")
    process.counted(2)
    with pytest.raises(ConnectionError):
        Client(process.api.path).ask("GET", "/", expect=200)
    assert process.process.wait(PATIENCE) == 148
    process.read(1)
    assert "Shutting down VM after intercepting a bad syscall (288)." in process.text
