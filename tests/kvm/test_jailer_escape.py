"""What code that a guest has got into a jailed monitor can do outside: nothing. A stand-in for it runs in the jail."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.jails import Jailed

from .conftest import Client

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes jails: needs root")

# What it wants is loaded before: that much better off it is than code in a monitor. The environment is lost, so what it
# aims at is in the script. The monitor that it is in starts afterwards all the same.
STAND_IN = """
import ctypes, errno, os, resource, socket, stat, struct, sys
from crackle.cli import jailer, vmm
from crackle.runtime.mappings import kept_open

libc = ctypes.CDLL(None, use_errno=True)
AIMS = @AIMS@

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def connect(kind, address):
    with socket.socket(kind) as other:
        other.settimeout(5)
        other.connect(address)

def in_user_namespace(*arguments):
    pid = os.fork()
    if not pid:
        try:
            call("unshare", 0x10000000 | 0x00020000)    # CLONE_NEWUSER | CLONE_NEWNS
            call(*arguments)
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(status, "")

def leave():
    # Has anybody left a folder of outside open?
    for fd in range(4096):
        try:
            os.fchdir(fd)
        except OSError:
            continue
        return os.listdir(".")
    raise OSError(errno.ENOTDIR, "")

def see_frames():
    # What it has open of /proc: does that say where in the host's memory a page of its own is?
    (entry,) = struct.unpack("=Q", os.pread(kept_open()[1], 8, ctypes.addressof(ROOM) // 4096 * 8))
    if entry >> 63 and not entry & (1 << 55) - 1:
        raise OSError(errno.EPERM, "")
    return hex(entry)

def climb():
    for _ in range(64):
        os.chdir("..")
    os.stat("etc")

# struct file_handle: eight bytes of type 1. struct iovec: eight bytes.
HANDLE = ctypes.create_string_buffer(bytes([8, 0, 0, 0, 1, 0, 0, 0]) + bytes(8))
ROOM = ctypes.create_string_buffer(8)
VECTOR = (ctypes.c_ulong * 2)(ctypes.addressof(ROOM), 8)
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
target = AIMS["process"]
TRIES = {
    "open a file": lambda: os.open(AIMS["file"], os.O_RDONLY),
    "open by climbing": climb,
    "open by descriptor": leave,
    "open by handle": lambda: call("open_by_handle_at", -100, HANDLE, 0),
    "open beside a descriptor": lambda: os.open("../1/status", os.O_RDONLY, dir_fd=kept_open()[0]),
    "see frames of memory": see_frames,
    "open /proc": lambda: os.listdir("/proc"),
    "make a device": lambda: os.mknod("/disk", stat.S_IFBLK | 0o600, os.makedev(8, 0)),
    "execute": lambda: os.execv("/bin/sh", ["sh"]),
    "execute the interpreter": lambda: os.execv("@PYTHON@", ["python"]),
    "connect to a socket": lambda: connect(socket.AF_UNIX, AIMS["socket"]),
    "connect to an abstract socket": lambda: connect(socket.AF_UNIX, "\\0" + AIMS["abstract"]),
    "connect to a port": lambda: connect(socket.AF_INET, ("127.0.0.1", AIMS["port"])),
    "open raw packets": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "trace": lambda: call("ptrace", PTRACE_ATTACH, target, 0, 0),
    "seize": lambda: call("ptrace", PTRACE_SEIZE, target, 0, 0),
    "trace its parent": lambda: call("ptrace", PTRACE_ATTACH, os.getppid(), 0, 0),
    "read memory": lambda: call("process_vm_readv", target, VECTOR, 1, VECTOR, 1, 0),
    "signal": lambda: os.kill(target, 9),
    "open a process": lambda: os.pidfd_open(target),
    "mount": lambda: call("mount", b"none", b"/run", b"tmpfs", 0, None),
    "mount proc": lambda: call("mount", b"proc", b"/run", b"proc", 0, None),
    "unmount": lambda: call("umount2", b"/", 2),
    "change root": lambda: os.chroot("/run"),
    "leave the mount namespace": lambda: call("unshare", 0x00020000),
    "leave the network namespace": lambda: call("unshare", 0x40000000),
    "mount proc in a user namespace": lambda: in_user_namespace("mount", b"proc", b"/run", b"proc", 0, None),
    "be root": lambda: os.setuid(0),
    "have groups": lambda: os.setgroups([0]),
    "lift a limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)),
    "set the clock": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "swap to a file": lambda: call("swapon", b"/echo.elf", 0),
    "read the kernel's log": lambda: call("klogctl", 3, ctypes.create_string_buffer(64), 64),
}

def stand_in(arguments, run=vmm.run):
    for name, do in TRIES.items():
        try:
            got = do()
        except OSError as error:
            print(f"{name}: {errno.errorcode.get(error.errno, error)}", flush=True)
        except ValueError as error:
            print(f"{name}: EPERM ({error})", flush=True)
        else:
            print(f"{name}: DONE {got!r}", flush=True)
    os.chdir("/")
    return run(arguments)

vmm.run = stand_in
jailer.main()
"""

REFUSED = {
    **dict.fromkeys(
        ["open a file", "open by climbing", "open /proc", "execute", "execute the interpreter", "connect to a socket"],
        "ENOENT",
    ),
    **dict.fromkeys(["trace", "seize", "trace its parent", "read memory", "signal", "open a process"], "ESRCH"),
    **dict.fromkeys(["connect to an abstract socket", "connect to a port"], "ECONNREFUSED"),
    **dict.fromkeys(["open by descriptor", "open beside a descriptor"], "ENOTDIR"),
}  # fmt: skip


@pytest.fixture
def targets(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What is outside, and open to everybody: a file, a process of the same user, sockets."""
    (tmp_path / "file").write_text("outside")
    with (
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket() as port,
    ):
        named.bind(str(tmp_path / "socket"))
        (tmp_path / "socket").chmod(0o777)
        abstract.bind(f"\0{tmp_path}")
        port.bind(("127.0.0.1", 0))
        for each in (named, abstract, port):
            each.listen()
        yield {
            "file": str(tmp_path / "file"),
            "socket": str(tmp_path / "socket"),
            "abstract": str(tmp_path),
            "port": port.getsockname()[1],
        }


def test_code_in_the_monitor_reaches_nothing_outside(
    tmp_path: Path, targets: dict[str, Any], namespace: Any, guests: Path
) -> None:
    base = tmp_path / "jails"
    base.mkdir()
    one = Jailed(base)
    one.give(guests / "echo.elf")
    # Of the same user even, which no jail outside a test would have.
    neighbour = subprocess.Popen(["sleep", "1000"], user=one.user, group=one.user + 1000, extra_groups=[])
    try:
        script = STAND_IN.replace("@AIMS@", repr({**targets, "process": neighbour.pid}))
        script = script.replace("@PYTHON@", os.path.realpath(sys.executable))
        one.start("--new-pid-ns", "--netns", namespace.path, command=[sys.executable, "-c", script])
        text = one.wait_for("read the kernel's log: ")
        tried = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line and "[" not in line)
        assert len(tried) == 33, text
        for name, answer in tried.items():
            assert answer.startswith(REFUSED.get(name, "EPERM")), f"{name}: {answer}"
        assert neighbour.poll() is None
        # And it is a monitor like another.
        with_guest(one)
    finally:
        neighbour.kill()
        neighbour.wait()
        one.end()


def with_guest(one: Jailed) -> None:
    api = Client(one.root / "api.sock")
    api.ask("PUT", "/boot-source", {"kernel_image_path": "/echo.elf", "boot_args": ""})
    api.ask("PUT", "/actions", {"action_type": "InstanceStart"})
    one.wait_for("echo\n")


def test_another_process_of_the_jails_user_may_not_trace_it(tmp_path: Path) -> None:
    base = tmp_path / "jails"
    base.mkdir()
    one = Jailed(base).start()
    try:
        script = (
            "import ctypes, os, sys; libc = ctypes.CDLL(None, use_errno=True); pid = int(sys.argv[1]);"
            f"os.setresgid({one.user + 1000}, {one.user + 1000}, {one.user + 1000}); os.setgroups([]);"
            f"os.setresuid({one.user}, {one.user}, {one.user});"
            "assert libc.ptrace(0x4206, pid, 0, 0) < 0 and ctypes.get_errno() == 1;"
            "open(f'/proc/{pid}/mem', 'rb')"
        )
        done = subprocess.run([sys.executable, "-c", script, str(one.pid)], capture_output=True, text=True)
        assert "PermissionError" in done.stderr, done.stderr
    finally:
        one.end()
