"""Jails of crackle-jailer for tests, each of a user that nobody else is: started, looked at from outside, ended."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE = 60.0

JAILER = (sys.executable, "-c", "from crackle.cli.jailer import main; main()")

# Before anything is imported: what is imported once a process is in its jail goes to the file `imports` there.
RECORDED = """
import os, sys
from crackle.cli import jailer
enter = jailer.enter
records = None
def note(event, arguments):
    if records is not None and event == "import":
        os.write(records, arguments[0].encode() + b"\\n")
def enter_and_note(*arguments):
    global records
    given = enter(*arguments)
    records = os.open("/imports", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    return given
jailer.enter = enter_and_note
sys.addaudithook(note)
from crackle.cli.jailer import main; main()
"""

# Starts many at little cost: one process has everything imported, and forks for each line of arguments. It prints the
# process's number and, when it has ended, that and its status; what it says goes to the file that is named.
HERD = """
import json, os, select, sys
from crackle.cli import jailer, vmm
vmm.load()
waits = sys.argv[1] == "one"
said = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def end(pid):
    print(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
left = []
for line in iter(sys.stdin.readline, ""):
    pid = os.fork()
    if not pid:
        os.dup2(os.open("/dev/null", os.O_RDWR), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        status = 70
        try:
            status = jailer.run(json.loads(line))
        finally:
            os._exit(status)
    if waits:
        end(pid)
    else:
        print(pid, flush=True)
        left.append(pid)
for pid in left:
    end(pid)
"""

# Capabilities of no kind.
NONE = "0000000000000000"

_users = itertools.count(61_000)

EMPTY_ROOT = {
    "crackle-vmm.pid": stat.S_IFREG | 0o644,
    "dev": stat.S_IFDIR | 0o700,
    "dev/kvm": stat.S_IFCHR | 0o600,
    "dev/net": stat.S_IFDIR | 0o700,
    "dev/net/tun": stat.S_IFCHR | 0o600,
    "dev/urandom": stat.S_IFCHR | 0o600,
    "run": stat.S_IFDIR | 0o700,
}
"""What every jail has, and its kind and mode; where the host has one, /dev/userfaultfd too."""
if os.path.exists("/dev/userfaultfd"):
    EMPTY_ROOT["dev/userfaultfd"] = stat.S_IFCHR | 0o600


def tree(root: Path) -> dict[str, int]:
    """Every path below, and its mode."""
    return {str(path.relative_to(root)): path.lstat().st_mode for path in sorted(root.rglob("*"))}


DEVICES = {path: mode for path, mode in EMPTY_ROOT.items() if stat.S_ISCHR(mode)}


def files(pid: int) -> dict[str, int]:
    """All but folders in a process's root."""
    return {path: mode for path, mode in tree(Path(f"/proc/{pid}/root")).items() if not stat.S_ISDIR(mode)}


def status(pid: int, name: str, thread: int | None = None) -> list[str]:
    """A line of /proc/PID/status, or of a thread of it."""
    place = f"/proc/{pid}" if thread is None else f"/proc/{pid}/task/{thread}"
    lines = Path(f"{place}/status").read_text().splitlines()
    return next(line.split()[1:] for line in lines if line.startswith(f"{name}:"))


def check_confined(pid: int, user: int, group: int, *, filtered: bool = True) -> None:
    """Every thread of it is that user's, has no privileges, can get none, and asks the kernel for what it may.

    filtered: or will, once its guest runs.
    """
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    for thread in threads:
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert status(pid, kind, thread) == [NONE], kind
        assert status(pid, "NoNewPrivs", thread) == ["1"]
        assert status(pid, "Uid", thread) == [str(user)] * 4
        assert status(pid, "Gid", thread) == [str(group)] * 4
        assert status(pid, "Groups", thread) == []
        if filtered:
            assert status(pid, "Seccomp", thread) == ["2"], thread
    assert len(threads) > 1 or not filtered
    assert os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    assert not os.path.samestat(os.stat(f"/proc/{pid}/root"), os.stat("/"))


def until_gone(*places: Path) -> None:
    """Wait until a cgroup is taken away, which is when nobody is in it any more."""
    deadline = time.monotonic() + PATIENCE
    for place in places:
        while place.exists():
            assert time.monotonic() < deadline, f"{place} is still there"
            select.select([], [], [], 0.01)


OWN = ["/PID/maps", "/PID/pagemap"]
"""What a process in a jail has open beside what it has open without one: of its own /proc."""


def descriptors(pid: int) -> list[str]:
    """What each descriptor of a process is open on, without the numbers of inodes and its own."""
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        # One that has been closed meanwhile is none.
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{fd}").partition(":[")[0])
    return sorted(link.replace(f"/{pid}/", "/PID/") for link in links)


class Jailed:
    """A jail, and the process that was started to be in it: `process`, or `pid` where that is another."""

    def __init__(self, base: Path, name: str = "one") -> None:
        self.base = base
        self.name = name
        self.user = next(_users)
        self.executable = base.parent / "crackle-vmm"
        self.executable.touch()
        self.root = base / "crackle-vmm" / name / "root"
        self.process: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self.text = ""

    def arguments(self, *more: str) -> list[str]:
        """The jailer's, `more` of which may be followed by ``--`` and the monitor's."""
        return [
            *("--id", self.name, "--exec-file", str(self.executable), "--chroot-base-dir", str(self.base)),
            *("--uid", str(self.user), "--gid", str(self.user + 1000)),
            *more,
        ]

    def give(self, *files: Path) -> None:
        """Put copies of the files into the root, the jail's user's."""
        self.root.mkdir(parents=True, exist_ok=True)
        for file in files:
            copy = shutil.copy(file, self.root / file.name)
            os.chown(copy, self.user, self.user + 1000)

    def start(
        self, *more: str, command: Sequence[str] = JAILER, pass_fds: Sequence[int] = (), level: str = "Off"
    ) -> Jailed:
        """Be started, until there is the monitor's API socket, /api.sock.

        level: of the log, which would come between the letters of a guest.
        """
        arguments = self.arguments(*more)
        if "--" not in arguments:
            arguments.append("--")
        arguments += ["--level", level]
        self.process = subprocess.Popen(
            [*command, *arguments, "--api-sock", "api.sock"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
        )
        deadline = time.monotonic() + PATIENCE
        forks = "--new-pid-ns" in arguments or "--daemonize" in arguments
        while not (self.root / "api.sock").exists():
            assert time.monotonic() < deadline, self.read()
            assert forks or self.process.poll() is None, self.process.communicate()
            select.select([], [], [], 0.01)
        self.pid = int((self.root / "crackle-vmm.pid").read_text())
        return self

    def read(self, seconds: float = 0.0) -> str:
        """What it has printed until now, or until it prints more within so many seconds."""
        assert self.process is not None
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], seconds)[0]:
            self.text += os.read(self.process.stdout.fileno(), 65536).decode(errors="replace")
        return self.text

    def wait_for(self, text: str) -> str:
        """Everything printed, once it contains the text."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.read(0.1):
            assert time.monotonic() < deadline, self.text
        return self.text

    def status(self, name: str) -> list[str]:
        """A line of /proc/PID/status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split()[1:] for line in lines if line.startswith(f"{name}:"))

    def namespace(self, kind: str) -> str:
        return os.readlink(f"/proc/{self.pid}/ns/{kind}")

    def imports(self) -> list[str]:
        """What was imported in the jail, by one started with RECORDED."""
        return (self.root / "imports").read_text().split()

    def end(self) -> None:
        """Kill what is in it."""
        if self.process is None:
            return
        if self.pid and self.pid != self.process.pid:
            try:
                end = os.pidfd_open(self.pid)
            except ProcessLookupError:
                pass
            else:
                signal.pidfd_send_signal(end, signal.SIGKILL)
                select.select([end], [], [], PATIENCE)
                os.close(end)
        if self.process.poll() is None:
            self.process.kill()
        self.text += (self.process.communicate()[0] or b"").decode(errors="replace")


class Herd:
    """Processes of HERD, started by lines of arguments. A context manager."""

    def __init__(self, said: Path, *, one_at_a_time: bool) -> None:
        self.said = said
        self._process = subprocess.Popen(
            [sys.executable, "-c", HERD, "one" if one_at_a_time else "all", str(said)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, arguments: Sequence[str]) -> list[int]:
        """The number of the process, and with `one_at_a_time` its status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(list(arguments)) + "\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], PATIENCE)[0], "it goes on and on"
        return [int(word) for word in self._process.stdout.readline().split()]

    def statuses(self) -> dict[int, int]:
        """How all have ended, by their numbers."""
        output, _ = self._process.communicate(timeout=PATIENCE)
        return dict(tuple(map(int, line.split())) for line in output.splitlines())

    def __enter__(self) -> Herd:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
