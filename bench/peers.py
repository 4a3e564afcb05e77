"""peers.*: QEMU's `microvm` machine beside ours and the other monitor, each started by its command line alone."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from bench.launch import CROWD_MIB, SETTLED_S, launcher, zygote
from bench.memory import overhead_kib
from bench.monitor import DEFAULT_TIMEOUT, MonitorError, alternate
from bench.rows import GUESTS, Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

QEMU = "qemu-system-x86_64"
CROWD = 20
# Without devices, as ours are here; by PVH, which all of them know. Not every nested KVM has what the CPU "max" wants.
_MACHINE = ("-M", "microvm,accel=kvm", "-cpu", "qemu64", "-nodefaults", "-no-user-config", "-no-reboot")
_KERNEL = GUESTS / "idle-pvh.elf"
_SAID = b"idle\n"


def rows(bench: Bench) -> Iterator[Row]:
    """From the spawn to the guest's first output; PSS of each of several, guest memory left out. None without QEMU."""
    if shutil.which(QEMU) is None:
        return
    version = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout.split()[
        3
    ]
    against = f"QEMU {version} microvm"
    arguments = ("--no-api", "--config-file", str(_configuration(bench.scratch)))
    commands: dict[str, Sequence[str]] = {
        "launch": (launcher(), *arguments),
        "vmm": (*bench.ours, *arguments),
        "qemu": (
            *(QEMU, *_MACHINE, "-display", "none", "-serial", "stdio"),
            *("-m", str(CROWD_MIB), "-kernel", str(_KERNEL)),
        ),
    }
    if bench.reference is not None:
        commands["reference"] = (*bench.reference, *arguments)
    output: dict[str, list[float]] = defaultdict(list)
    pss: dict[str, list[float]] = defaultdict(list)
    with zygote(bench.scratch):
        for who, command in alternate(commands, bench.times(30)):
            started = time.perf_counter()
            process = _spoken(command)
            output[who].append((time.perf_counter() - started) * 1000)
            _end(process)
    for who, command in alternate(commands, 3):
        with zygote(bench.scratch) as pid:
            pss[who].append(_crowd(command, pid if who == "launch" else None))
    names = {"launch": "launch", "vmm": "vmm", "reference": f"reference ({bench.reference_name})"}
    for what, unit, found in (("output", "ms", output), ("pss", f"KiB each of {CROWD}", pss)):
        for who, name in names.items():
            if found[who]:
                yield paired(f"peers.{what}.{name}", unit, found[who], found["qemu"], against)


def _configuration(scratch: Path) -> Path:
    path = scratch / "peers.json"
    (scratch / "peers.log").touch()
    document = {
        "boot-source": {"kernel_image_path": str(_KERNEL), "boot_args": ""},
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": CROWD_MIB},
        "logger": {"log_path": str(scratch / "peers.log"), "level": "Error"},
    }
    path.write_text(json.dumps(document))
    return path


def _spoken(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A monitor whose guest has said what it says first."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    said = b""
    # The monitor may have said something itself.
    while _SAID not in said:
        if not select.select([process.stdout], [], [], DEFAULT_TIMEOUT)[0]:
            break
        if not (more := os.read(process.stdout.fileno(), 4096)):
            break
        said += more
    else:
        return process
    _end(process)
    raise MonitorError(f"{command[0]}: the guest does not speak: {said!r}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _crowd(command: Sequence[str], zygote_pid: int | None) -> float:
    """KiB (PSS) that each of several costs, its launcher included."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(CROWD):
            processes.append(_spoken(command))
        time.sleep(SETTLED_S)
        pids = [process.pid for process in processes]
        if zygote_pid is not None:
            with open(f"/proc/{zygote_pid}/task/{zygote_pid}/children") as children:
                pids += map(int, children.read().split())
        return sum(overhead_kib(pid, CROWD_MIB)[0] for pid in pids) / CROWD
    finally:
        for process in processes:
            _end(process)
