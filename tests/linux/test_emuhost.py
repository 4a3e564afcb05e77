"""tools/emuhost: looks like this machine with a complete KVM, and its command like an ordinary child."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

EMUHOST = Path(__file__).resolve().parents[2] / "tools" / "emuhost"

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        os.uname().nodename == "emuhost" or not shutil.which("qemu-system-x86_64"),
        reason="runs QEMU, which is not installed or would be run in itself",
    ),
]


def emuhost(
    *arguments: str | Path,
    options: Sequence[str | Path] = (),
    stdin: bytes = b"",
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    command = [EMUHOST, "--memory", "1024", "--timeout", "120", *options, "--", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=cwd, env=env, timeout=200)


# What the emulated host must offer, each tried by a program that ends with an AssertionError if it is not so.
FACILITIES = r"""
import ctypes, fcntl, os, socket, struct, subprocess, tempfile
libc = ctypes.CDLL(None, use_errno=True)

kvm = os.open("/dev/kvm", os.O_RDWR)
assert fcntl.ioctl(kvm, 0xAE00) == 12                             # KVM_GET_API_VERSION
vm = fcntl.ioctl(kvm, 0xAE01)                                     # KVM_CREATE_VM
assert fcntl.ioctl(vm, 0xAE60) == 0                               # KVM_CREATE_IRQCHIP
vcpu = fcntl.ioctl(vm, 0xAE41)                                    # KVM_CREATE_VCPU
print("kvm")

tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"tap0", 0x1002))      # TUNSETIFF, IFF_TAP | IFF_NO_PI
print("tun")

os.mkdir("/sys/fs/cgroup/test")
controllers = open("/sys/fs/cgroup/test/cgroup.controllers").read().split()
assert {"cpu", "memory", "pids", "io", "cpuset"} <= set(controllers), controllers
print("cgroup2")

subprocess.run(["ip", "netns", "add", "test"], check=True)
subprocess.run(["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"], check=True)
subprocess.run(["ip", "link", "set", "veth1", "netns", "test"], check=True)
print("netns")

ring = libc.syscall(425, 8, ctypes.create_string_buffer(120))     # io_uring_setup
assert ring >= 0, os.strerror(ctypes.get_errno())
print("io_uring")

fault = libc.syscall(323, os.O_CLOEXEC)                           # userfaultfd
assert fault >= 0, os.strerror(ctypes.get_errno())
fcntl.ioctl(fault, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))    # UFFDIO_API
print("userfaultfd")

server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
for path in ("/tmp", "/dev/shm", os.path.expanduser("~")):
    tempfile.NamedTemporaryFile(dir=path).write(b"x")
os.openpty()
libc.unshare(0x20000)                                             # CLONE_NEWNS
print("files")
"""


def test_status_streams_directory_and_environment_are_passed(tmp_path: Path) -> None:
    script = 'cat; pwd; echo "$1 $GREETING"; echo complaint >&2; exit 7'
    environment = os.environ | {"GREETING": 'it\'s\na "test" $HOME'}
    done = emuhost("sh", "-c", script, "sh", "a  b'c", stdin=b"first\n\0line", cwd=tmp_path, env=environment)
    assert done.stdout.decode() == f"first\n\0line{tmp_path}\na  b'c it's\na \"test\" $HOME\n"
    assert done.stderr == b"complaint\n"
    assert done.returncode == 7


def test_offers_what_a_monitor_and_a_jailer_need() -> None:
    done = emuhost("python3", "-c", FACILITIES)
    assert done.stderr == b""
    assert done.stdout.split() == [
        b"kvm",
        b"tun",
        b"cgroup2",
        b"netns",
        b"io_uring",
        b"userfaultfd",
        b"files",
    ]


def test_only_shared_directories_are_written_through(tmp_path: Path) -> None:
    shared, private = tmp_path / "it's, shared", tmp_path / "private"
    shared.mkdir()
    private.mkdir()
    (shared / "in").write_bytes(b"x" * 100_000)
    script = 'cp "$1/in" "$1/out" && cp "$1/in" "$2/out" && ls "$2"'
    done = emuhost("sh", "-c", script, "sh", shared, private, options=["--share", shared])
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"")
    assert (shared / "out").read_bytes() == b"x" * 100_000
    assert not list(private.iterdir())


def test_much_output_arrives_whole_and_what_is_left_running_is_ended() -> None:
    script = "sleep 1000 & head -c 20000000 /dev/zero; head -c 3000000 /dev/zero >&2"
    done = emuhost("sh", "-c", script)
    assert done.returncode == 0
    assert (len(done.stdout), len(done.stderr)) == (20_000_000, 3_000_000)


def test_the_timeout_ends_it() -> None:
    start = time.monotonic()
    done = emuhost("sh", "-c", "echo started; trap '' TERM; sleep 1000", options=["--timeout", "10"])
    assert done.returncode == 124
    assert time.monotonic() - start < 60
    assert b"did not end in time" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind_when_it_is_ended(number: signal.Signals) -> None:
    host = subprocess.Popen(
        [EMUHOST, "--", "sh", "-c", "echo started; sleep 1000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert host.stdout is not None
    assert host.stdout.readline() == b"started\n"
    children = Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()
    assert len(children) == 1
    host.send_signal(number)
    assert host.wait(20) == (-9 if number == signal.SIGKILL else 128 + number)
    host.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{children[0]}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{children[0]}/exe").exists()


def test_a_command_that_does_not_exist_gives_127() -> None:
    assert emuhost("no-such-command").returncode == 127


def test_two_run_side_by_side() -> None:
    hosts = [
        subprocess.Popen(
            [EMUHOST, "--", "echo", str(number)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        for number in range(2)
    ]
    assert [host.communicate(timeout=200)[0] for host in hosts] == [b"0\n", b"1\n"]
