"""`crackle doctor --production`: is this host, and is what runs on it, fit for strangers' code?

Each row is a section of docs/production.md, which says why. Looking changes nothing. What other users' processes are
like is told to root only.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from crackle.cli.report import Row, print_json, print_table, read

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crackle.cli.report import State

# Parameters of the kernel's command line that switch mitigations off (Documentation/admin-guide/kernel-parameters.txt).
_SWITCHES = (
    *(
        "nopti",
        "pti=off",
        "kpti=0",
        "nospectre_v1",
        "nospectre_v2",
        "spectre_v2=off",
        "spec_rstack_overflow=off",
    ),
    *(
        "spectre_v2_user=off",
        "nospec_store_bypass_disable",
        "spec_store_bypass_disable=off",
        "l1tf=off",
        "mds=off",
    ),
    *("tsx_async_abort=off", "mmio_stale_data=off", "retbleed=off", "gather_data_sampling=off", "srbds=off"),
    *("reg_file_data_sampling=off", "kvm-intel.vmentry_l1d_flush=never", "kvm.nx_huge_pages=off", "tsa=off"),
    *("vmscape=off", "indirect_target_selection=off"),
)
# A setting, the least value that keeps something useful from a process that broke out, and what.
_KERNEL = (
    ("kernel/kptr_restrict", 1, "kernel addresses"),
    ("kernel/dmesg_restrict", 1, "the kernel's log"),
    ("kernel/unprivileged_bpf_disabled", 1, "BPF programs"),
)
_CONTROLLERS = {"cpu": "cpu", "memory": "memory", "pids": "pids", "io": "blkio"}
# What /sys/class/net/<tap>/owner says when there is none.
_NOBODY = "-1"
# A memory.limit_in_bytes that is none (version 1): the largest number of whole pages.
_NO_LIMIT = 1 << 62


def _judged(
    area: str, name: str, wrong: bool, bad: str, good: str, advice: str, state: State = "problem"
) -> Row:
    """A row of what is `wrong`, with what to do; or of what is `good`, and then there is nothing to do."""
    return Row(area, name, bad, state, advice) if wrong else Row(area, name, good, "ok")


def _processor(root: str) -> Iterator[Row]:
    smt = read(f"{root}/sys/devices/system/cpu/smt/active") == "1"
    yield _judged(
        "processor",
        "SMT",
        smt,
        "on: the threads of a core have its caches in common",
        "off",
        "boot with nosmt, or let microVMs share no core: crackle-vmm --core-scheduling",
    )
    directory = f"{root}/sys/devices/system/cpu/vulnerabilities"
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    known = {name: read(f"{directory}/{name}") or "" for name in names}
    vulnerable = [name for name, state in known.items() if "vulnerable" in state.lower()]
    for name in vulnerable:
        advice = "newer microcode and kernel, mitigations on"
        yield Row("processor", name, known[name], "problem", advice)
    if known:
        rest = len(known) - len(vulnerable)
        yield Row(
            "processor", "vulnerabilities", f"{rest} of {len(known)} known ones absent or mitigated", "ok"
        )
    else:
        yield Row("processor", "vulnerabilities", "the kernel does not tell", "missing", "a newer kernel")
    words = (read(f"{root}/proc/cmdline") or "").split()
    off = [word for word in words if word in _SWITCHES or word.startswith("mitigations=off")]
    yield _judged(
        "processor",
        "mitigations",
        bool(off),
        f"switched off: {' '.join(off)}",
        "none is switched off",
        "take that from the kernel's command line",
    )


def _kvm(root: str) -> Iterator[Row]:
    for module, paging in (("kvm_intel", "ept"), ("kvm_amd", "npt")):
        parameters = f"{root}/sys/module/{module}/parameters"
        if read(f"{parameters}/{paging}") in ("N", "0"):
            yield Row("kvm", paging, "off", "problem", f"load {module} with {paging}=1")
        if read(f"{parameters}/nested") in ("Y", "1"):
            advice = f"load {module} with nested=0, unless guests need it"
            yield Row("kvm", "nested", "on: one more interface that guests reach", "missing", advice)
    try:
        mode = os.stat(f"{root}/dev/kvm").st_mode
    except OSError:
        yield Row("kvm", "/dev/kvm", "not there", "problem", "load kvm_intel or kvm_amd")
        return
    anybody = bool(mode & (stat.S_IWOTH | stat.S_IROTH))
    yield _judged(
        "kvm",
        "/dev/kvm",
        anybody,
        "open to any user",
        f"mode {mode & 0o777:o}",
        "chmod 660, the group being that of your microVMs",
        "missing",
    )


def _memory(root: str) -> Iterator[Row]:
    merging = read(f"{root}/sys/kernel/mm/ksm/run") == "1"
    yield _judged(
        "memory",
        "same-page merging",
        merging,
        "on: a guest can find out what another's memory holds",
        "off",
        "echo 2 > /sys/kernel/mm/ksm/run",
    )
    swaps = [line.split()[0] for line in (read(f"{root}/proc/swaps") or "").splitlines()[1:]]
    plain = [path for path in swaps if not _stays_secret(root, path)]
    yield _judged(
        "memory",
        "swap",
        bool(plain),
        f"guest memory can get to {' '.join(plain)}",
        "none, or none that keeps secrets readable",
        "swapoff, or encrypt it",
    )
    dumps = read(f"{root}/proc/sys/fs/suid_dumpable") == "1"
    yield _judged(
        "memory",
        "core dumps",
        dumps,
        "of processes that have changed user too",
        "not of processes that have changed user",
        "echo 0 > /proc/sys/fs/suid_dumpable",
        "missing",
    )
    faults = read(f"{root}/proc/sys/vm/unprivileged_userfaultfd") == "1"
    yield _judged(
        "memory",
        "userfaultfd",
        faults,
        "any process may stop the kernel at a page of its own",
        "for the privileged only",
        "echo 0 > /proc/sys/vm/unprivileged_userfaultfd; the jail has /dev/userfaultfd",
        "missing",
    )


def _stays_secret(root: str, swap: str) -> bool:
    name = os.path.basename(os.path.realpath(root + swap))
    if name.startswith("zram"):  # in memory
        return True
    return (read(f"{root}/sys/class/block/{name}/dm/uuid") or "").startswith("CRYPT-")


def _kernel(root: str) -> Iterator[Row]:
    for name, least, what in _KERNEL:
        value = read(f"{root}/proc/sys/{name}")
        if value is None:
            continue
        good = value.lstrip("-").isdigit() and int(value) >= least
        yield Row(
            "kernel",
            name.replace("/", "."),
            f"{value}: {what} for {'the privileged only' if good else 'any process'}",
            "ok" if good else "missing",
            "" if good else f"echo {least} > /proc/sys/{name}",
        )


def _control_groups(root: str) -> Iterator[Row]:
    unified = read(f"{root}/sys/fs/cgroup/cgroup.controllers")
    if unified is not None:
        there = set(unified.split())
        lacking = [name for name in _CONTROLLERS if name not in there]
    else:
        there = {line.split()[0] for line in (read(f"{root}/proc/cgroups") or "#").splitlines()}
        lacking = [name for name, first in _CONTROLLERS.items() if first not in there]
    version = f"version {1 if unified is None else 2}"
    yield _judged(
        "limits",
        "cgroup controllers",
        bool(lacking),
        f"{version}, without {', '.join(lacking)}",
        version,
        "switch them on, to bound what a microVM takes from others",
        "missing",
    )


def _taps(root: str) -> Iterator[Row]:
    directory = f"{root}/sys/class/net"
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    for name in names:
        flags = read(f"{directory}/{name}/tun_flags")
        if flags is None or not int(flags, 16) & 2:  # IFF_TAP, <linux/if_tun.h>
            continue
        owner, group = read(f"{directory}/{name}/owner"), read(f"{directory}/{name}/group")
        if owner == group == _NOBODY:
            advice = f"ip tuntap add {name} mode tap user UID, the microVM's"
            yield Row("network", name, "any user may have it", "problem", advice)
        else:
            whose = [f"user {owner}"] * (owner != _NOBODY) + [f"group {group}"] * (group != _NOBODY)
            yield Row("network", name, f"of {' and '.join(whose)}", "ok")


class _Monitor:
    """A process that has a virtual machine, whatever monitor it is."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._path = f"/proc/{pid}"
        lines = (read(f"{self._path}/status") or "").splitlines()
        self.status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.uid = int(self.status["Uid"].split()[1])

    @property
    def name(self) -> str:
        return f"{self.status['Name']} {self.pid}"

    def faults(self) -> Iterator[str]:
        """What lets it do more than it has to."""
        if self.uid == 0:
            yield "it is root"
        if any(int(self.status[kind], 16) for kind in ("CapPrm", "CapEff", "CapBnd")):
            yield "it has capabilities, or may get some"
        if self.status.get("NoNewPrivs") != "1":
            yield "programs that it executes may have more privileges"
        tasks = [read(f"{self._path}/task/{task}/status") or "" for task in os.listdir(f"{self._path}/task")]
        if any("Seccomp:" in task and "Seccomp:\t2" not in task for task in tasks):
            yield "not every thread has a seccomp filter"
        if os.path.samestat(os.stat(f"{self._path}/root"), os.stat("/")):
            yield "it sees this host's files"

    def unbounded(self) -> Iterator[str]:
        """What it can take from others without end."""
        if not self._memory_is_limited():
            yield "its memory has no limit in its cgroup"
        if self._writes_a_log() and self._limit("Max file size") == "unlimited":
            yield "nor has the file that it writes its log to (--resource-limit fsize=, or a pipe)"

    def _limit(self, name: str) -> str:
        lines = (read(f"{self._path}/limits") or "").splitlines()
        return next((line[len(name) :].split()[0] for line in lines if line.startswith(name)), "")

    def _memory_is_limited(self) -> bool:
        for line in (read(f"{self._path}/cgroup") or "").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                while path not in ("", "/"):
                    if read(f"/sys/fs/cgroup{path}/memory.max") not in (None, "max"):
                        return True
                    path = os.path.dirname(path)
            elif "memory" in controllers.split(","):
                limit = read(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")
                return limit is not None and int(limit) < _NO_LIMIT
        return False

    def _writes_a_log(self) -> bool:
        for fd in os.listdir(f"{self._path}/fd"):
            try:
                flags = int((read(f"{self._path}/fdinfo/{fd}") or "").split("flags:")[1].split()[0], 8)
                regular = stat.S_ISREG(os.stat(f"{self._path}/fd/{fd}").st_mode)
            except (OSError, IndexError):
                continue
            if regular and flags & os.O_APPEND and flags & os.O_ACCMODE != os.O_RDONLY:
                return True
        return False


def _monitors() -> Iterator[_Monitor]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The process itself holds it, and whoever forked from it without closing it.
            if any(os.readlink(fd) == "anon_inode:kvm-vm" for fd in (entry / "fd").iterdir()):
                yield _Monitor(int(entry.name))
        except (OSError, KeyError):
            continue  # another user's, or gone meanwhile


def _microvms() -> Iterator[Row]:
    monitors = sorted(_monitors(), key=lambda monitor: monitor.pid)
    if not monitors:
        yield Row("microVMs", "running", "none to be seen: look again, as root, when there are some", "info")
        return
    users: dict[int, list[int]] = {}
    for monitor in monitors:
        users.setdefault(monitor.uid, []).append(monitor.pid)
    for monitor in monitors:
        try:
            faults, unbounded = list(monitor.faults()), list(monitor.unbounded())
        except OSError:
            continue
        others = [str(pid) for pid in users[monitor.uid] if pid != monitor.pid]
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            faults.append(f"its user {monitor.uid} is that of {', '.join(others[:3])}{more} as well")
        advice = "start each by crackle-jailer, with a --uid of its own" if faults else ""
        if unbounded and not faults:
            advice = "crackle-jailer --cgroup memory.max=..., see docs/production.md"
        yield Row(
            "microVMs",
            monitor.name,
            "; ".join(faults + unbounded) or "confined and bounded",
            "problem" if faults else "missing" if unbounded else "ok",
            advice,
        )


def report(root: str = "") -> list[Row]:
    """The rows, of the host whose /proc, /sys and /dev are below `root`; its microVMs are always this one's."""
    rows: list[Row] = []
    for look in (_processor, _kvm, _memory, _kernel, _control_groups, _taps):
        rows += look(root)
    return [*rows, *_microvms()]


def is_fit(rows: list[Row]) -> bool:
    """Whether nothing in the report is a problem."""
    return all(row.state != "problem" for row in rows)


def verdict(rows: list[Row]) -> str:
    """The report in one sentence."""
    count = sum(row.state == "problem" for row in rows)
    better = sum(row.state == "missing" for row in rows)
    found = f"{count} problem{'s' * (count != 1)}" if count else "no problem"
    return f"Fit for strangers' code: {'no' if count else 'yes'}: {found}, {better} to be better"


def render_json(rows: list[Row]) -> None:
    """Print the report as one JSON object on standard output."""
    print_json(rows, fit=is_fit(rows), verdict=verdict(rows))


def render(rows: list[Row]) -> None:
    """Print the report as a table on standard output."""
    print_table(rows, verdict(rows), is_fit(rows))
