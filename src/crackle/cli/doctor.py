"""`crackle doctor`: what this host offers, and whether Linux guests run on its KVM.

`report()` looks and returns rows; `render()` prints them. Looking changes nothing on the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
from typing import TYPE_CHECKING

from crackle.cli.report import Row, print_json, print_table, read
from crackle.errors import CrackleError
from crackle.hostnet.host import may_change_networks
from crackle.hostnet.nft import find_nft
from crackle.kvm import CAPABILITIES, Kvm
from crackle.vmm.probe import probe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crackle.cli.report import State

_VERDICT = "Linux guests"

# <asm-generic/unistd.h> and asm/unistd_64.h: number of the system call on each machine.
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
SYS_IO_URING_SETUP = {"x86_64": 425, "aarch64": 425}


def _system_call(numbers: dict[str, int], *arguments: int) -> int:
    """0 or the errno of a system call that makes a descriptor (closed here) or refuses its arguments."""
    number = numbers.get(os.uname().machine)
    if number is None:
        return errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments))
    if result < 0:
        return ctypes.get_errno()
    os.close(result)
    return 0


def _host() -> Iterator[Row]:
    system = os.uname()
    yield Row("host", "kernel", f"{system.sysname} {system.release} on {system.machine}", "info")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Row("host", "processors, memory", f"{len(os.sched_getaffinity(0))}, {pages >> 20} MiB", "info")


def _hardware() -> Iterator[Row]:
    cpuinfo = read("/proc/cpuinfo") or ""
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            break
    extension = "Intel VT-x" if "vmx" in flags else "AMD-V" if "svm" in flags else ""
    modules = [name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if os.path.isdir(f"/sys/module/{name}")]
    if os.uname().machine == "aarch64":
        yield Row("kvm", "hardware virtualisation", "see /dev/kvm", "info")
    elif extension:
        yield Row("kvm", "hardware virtualisation", extension, "ok")
    else:
        advice = (
            "a virtual machine: enable nested virtualisation"
            if "hypervisor" in flags
            else "enable it in firmware"
        )
        yield Row("kvm", "hardware virtualisation", "no vmx or svm in /proc/cpuinfo", "missing", advice)
    yield Row("kvm", "modules", ", ".join(modules) or "none, or built in", "info")


def _kvm(path: str) -> Iterator[Row]:
    if not os.path.exists(path):
        yield Row("kvm", path, "does not exist", "problem", "load kvm_intel or kvm_amd, or use tools/emuhost")
        return
    if not os.access(path, os.R_OK | os.W_OK):
        yield Row(
            "kvm", path, "no permission to read and write it", "problem", "join the group that owns it (kvm)"
        )
        return
    try:
        with Kvm(path) as kvm:
            yield Row("kvm", path, f"API version {kvm.api_version}", "ok")
            missing = kvm.missing()
            have = {name: kvm.check_extension(number) for name, number in CAPABILITIES.items()}
            leaves = len(kvm.supported_cpuid()) if os.uname().machine == "x86_64" else 0
    except CrackleError as error:
        yield Row("kvm", path, str(error), "problem", "use tools/emuhost")
        return
    if missing:
        yield Row(
            "kvm",
            "required capabilities",
            f"without {', '.join(missing)}",
            "problem",
            "needs Linux 5.10 or newer",
        )
    else:
        yield Row("kvm", "required capabilities", "all", "ok")
    lacking = [name for name, value in have.items() if not value and name not in missing]
    others = f"{sum(map(bool, have.values()))} of {len(have)}"
    yield Row("kvm", "capabilities", others + (f", without {', '.join(lacking)}" if lacking else ""), "info")
    limits = f"{have['NR_VCPUS']} vCPUs ({have['MAX_VCPUS']} at most), {have['NR_MEMSLOTS']} memory slots"
    yield Row("kvm", "limits", limits + (f", {leaves} CPUID leaves" if leaves else ""), "info")


def _probe(path: str) -> Iterator[Row]:
    verdict = probe(path)
    for finding in verdict.findings:
        yield Row("probe", finding.name, finding.detail, "ok" if finding.works else "problem")
    yield Row("probe", _VERDICT, verdict.sentence, "ok" if verdict.linux else "problem")


def _devices() -> Iterator[Row]:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        yield Row("network", "/dev/net/tun", "opens", "ok")
    except OSError as error:
        advice = "load the tun module" if error.errno in (errno.ENOENT, errno.ENODEV) else "needs permission"
        yield Row("network", "/dev/net/tun", os.strerror(error.errno or 0), "missing", advice)
    if not may_change_networks():
        yield Row("network", "crackle run --net", "no CAP_NET_ADMIN", "missing", "run it as root")
    elif find_nft() is None:
        yield Row("network", "crackle run --net", "no program nft", "missing", "install the package nftables")
    else:
        yield Row("network", "crackle run --net", "may make bridges, TAP devices and rules", "ok")
    vsock = os.path.exists("/dev/vhost-vsock")
    yield Row(
        "network", "/dev/vhost-vsock", "exists (not needed)" if vsock else "not there (not needed)", "info"
    )


def _memory_features() -> Iterator[Row]:
    unprivileged = read("/proc/sys/vm/unprivileged_userfaultfd")
    error = _system_call(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    detail = f", vm.unprivileged_userfaultfd = {unprivileged}" if unprivileged is not None else ""
    if error:
        advice = "" if error == errno.ENOSYS else "run as root or set vm.unprivileged_userfaultfd = 1"
        yield Row("memory", "userfaultfd", os.strerror(error) + detail, "missing", advice)
    else:
        yield Row("memory", "userfaultfd", "works" + detail, "ok")

    meminfo = dict(line.split(":", 1) for line in (read("/proc/meminfo") or "").splitlines() if ":" in line)
    size, free = meminfo.get("Hugepagesize", "none").strip(), meminfo.get("HugePages_Free", "0").strip()
    state: State = "ok" if free != "0" else "info"
    advice = "" if state == "ok" else "write a number to /proc/sys/vm/nr_hugepages to back guests with them"
    yield Row("memory", "hugepages", f"{free} free of {size}", state, advice)
    transparent = read("/sys/kernel/mm/transparent_hugepage/enabled") or "not there"
    yield Row("memory", "transparent hugepages", transparent, "info")


def _io() -> Iterator[Row]:
    # No parameters at all: EFAULT says that the call is there and allowed.
    error = _system_call(SYS_IO_URING_SETUP, 1, 0)
    disabled = read("/proc/sys/kernel/io_uring_disabled")
    if error == errno.EFAULT:
        yield Row("disk", "io_uring", "works", "ok")
    else:
        reason = (
            f"kernel.io_uring_disabled = {disabled}" if disabled not in (None, "0") else os.strerror(error)
        )
        yield Row("disk", "io_uring", reason, "missing", "drives use the Sync engine")


def _control_groups() -> Iterator[Row]:
    controllers = read("/sys/fs/cgroup/cgroup.controllers")
    if controllers is not None:
        yield Row("confinement", "cgroup", f"version 2: {controllers or 'no controllers'}", "ok")
        return
    mounts = [line.split() for line in (read("/proc/mounts") or "").splitlines()]
    first = sorted({point.rsplit("/", 1)[-1] for _, point, kind, *_ in mounts if kind == "cgroup"})
    unified = next((point for _, point, kind, *_ in mounts if kind == "cgroup2"), None)
    if not first and unified is None:
        yield Row("confinement", "cgroup", "not mounted", "missing", "mount -t cgroup2 none /sys/fs/cgroup")
        return
    if first:
        yield Row("confinement", "cgroup", f"version 1: {' '.join(first)}", "ok")
    if unified is not None:
        controllers = read(f"{unified}/cgroup.controllers") or "no controllers"
        yield Row(
            "confinement", "cgroup", f"version 2 at {unified}: {controllers}", "ok" if not first else "info"
        )


def _limits() -> Iterator[Row]:
    def text(value: int, unit: int = 1, name: str = "") -> str:
        return "unlimited" if value == resource.RLIM_INFINITY else f"{value // unit}{name}"

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft >= 1024 or soft == resource.RLIM_INFINITY
    state: State = "ok" if enough else "missing"
    yield Row(
        "limits", "open files", f"{text(soft)} of {text(hard)}", state, "" if enough else "ulimit -n 4096"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield Row("limits", "locked memory", f"{text(soft, 1024, ' KiB')} of {text(hard, 1024, ' KiB')}", "info")


def _seccomp() -> Iterator[Row]:
    seccomp = read("/proc/sys/kernel/seccomp/actions_avail")
    yield Row("confinement", "seccomp", "works" if seccomp else "not there", "ok" if seccomp else "missing")


def report(path: str = "/dev/kvm") -> list[Row]:
    """What this host offers, the KVM at `path` first. Takes tens of milliseconds."""
    rows = [*_host(), *_hardware(), *_kvm(path)]
    problem = next((row for row in rows if row.state == "problem"), None)
    if problem is None:
        rows += _probe(path)
    else:
        why = f"no: {problem.name} {problem.value}; {problem.advice or 'use tools/emuhost'}"
        rows.append(Row("kvm", _VERDICT, why, "problem"))
    for look in (_devices, _io, _memory_features, _control_groups, _seccomp, _limits):
        with contextlib.suppress(OSError):
            rows += look()
    return rows


def runs_linux(rows: list[Row]) -> bool:
    """Whether the report says that Linux guests run here."""
    return any(row.name == _VERDICT and row.state == "ok" for row in rows)


def verdict(rows: list[Row]) -> str:
    """The report in one sentence: "Linux guests: yes: ..." or "Linux guests: no: ..."."""
    return next(f"{_VERDICT}: {row.value}" for row in rows if row.name == _VERDICT)


def render_json(rows: list[Row]) -> None:
    """Print the report as one JSON object on standard output."""
    print_json(rows, linux_guests=runs_linux(rows), verdict=verdict(rows))


def render(rows: list[Row]) -> None:
    """Print the report as a table on standard output."""
    print_table(rows, verdict(rows), runs_linux(rows))
