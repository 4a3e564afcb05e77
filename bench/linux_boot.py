"""Boots Debian's stock kernel in one monitor after the other; prints where the time went. Run by bench.linux.

`python -m bench.linux_boot TIMES VMLINUX INITRD MONITOR...`, on a host that runs Linux guests; prints JSON
lines, one for each boot, the monitors by turns.

User time outside KVM_RUN is what proc(5) calls utime less guest_time: a guest's time is charged to both.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TypedDict

from bench.monitor import Monitor, alternate

BOOT_ARGS = "console=ttyS0 reboot=k panic=1 quiet i8042.noaux i8042.nomux i8042.dumbkbd noxsave"
USER_SPACE = "crackle: user space"
MEMORY_MIB = 256


class Times(TypedDict):
    """Seconds: InstanceStart to init on the clock; [user outside KVM_RUN, system, guest] by thread."""

    monitor: str
    boot: float
    threads: dict[str, list[float]]


def thread_times(pid: int) -> dict[tuple[str, int], list[float]]:
    """[user outside KVM_RUN, system, in the guest] so far in seconds, by role and number of each thread."""
    hertz = os.sysconf("SC_CLK_TCK")
    times = {}
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        head, _, rest = stat.read_text().rpartition(")")
        fields = rest.split()
        number, name = head.split(" (", 1)
        role = "main" if int(number) == pid else "vcpu" if "vcpu" in name else "io"
        user, system, guest = (int(fields[field - 3]) / hertz for field in (14, 15, 43))
        times[role, int(number)] = [user - guest, system, guest]
    return times


def boot(command: list[str], kernel: Path, initrd: Path, scratch: Path) -> Times:
    """One boot to user space."""
    with Monitor(command, scratch) as monitor:
        monitor.request("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB})
        source = {"kernel_image_path": str(kernel), "initrd_path": str(initrd), "boot_args": BOOT_ARGS}
        monitor.request("PUT", "/boot-source", source)
        time.sleep(0.5)  # what it prepares meanwhile is not what is measured
        before = thread_times(monitor.pid)
        start = time.perf_counter()
        monitor.start()
        monitor.wait_output(USER_SPACE, 300)
        elapsed = time.perf_counter() - start
        after = thread_times(monitor.pid)
    threads: dict[str, list[float]] = {}
    for (role, number), end in after.items():
        begin = before.get((role, number), [0.0] * 3)
        sums = threads.setdefault(role, [0.0] * 3)
        threads[role] = [total + late - early for total, late, early in zip(sums, end, begin, strict=True)]
    return {"monitor": command[0], "boot": elapsed, "threads": threads}


def main() -> None:
    """Copies of kernel and RAM disk in memory first: a slow file system is not what is measured either."""
    times, kernel, initrd, *monitors = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        scratch = Path(name)
        copies = [Path(shutil.copy(path, scratch)) for path in (kernel, initrd)]
        for _, command in alternate({monitor: [monitor] for monitor in monitors}, int(times)):
            print(json.dumps(boot(list(command), copies[0], copies[1], scratch)), flush=True)


if __name__ == "__main__":
    main()
