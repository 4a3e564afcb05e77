"""The emulated KVM host: QEMU emulates a processor with AMD SVM, and the Linux in it offers a complete KVM.

Its root file system is this machine's, read over 9p, with a layer in RAM on top that takes all writes.
Nothing is kept in files: sockets and the initial RAM file system are handed to QEMU as open descriptors, and
QEMU is killed by the kernel when this process ends, however it ends.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import termios
import tty
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from . import cache, cpio, debian, kernel
from .relay import Input, NotUpError, Output, Patience, Tail, relay

HERE = Path(__file__).parent
PACKAGES = ("qemu-system-x86",)
MODULES = ("virtio_pci", "9p", "9pnet_virtio", "overlay", "virtio_console", "kvm_amd", "tun")
KERNEL_ARGUMENTS = (
    "console=ttyS0 panic=-1 mitigations=off nokaslr no_timer_check nowatchdog random.trust_cpu=on audit=0 "
    "cgroup_no_v1=all"
)
# QEMU 7.2 does not intercept XSETBV, so the KVM inside does not learn which XSAVE features a guest turned on.
# Linux notices (a warning, unless it is given noxsave), and goes without XSAVE. Hiding XSAVE is no way out:
# monitors insist on it.
PROCESSOR = "EPYC,+svm,+npt"
STATUS_TIMEOUT = 124
STATUS_FAILED = 125
# Once in some dozens of times the machine freezes while it boots, before the command runs. Booting takes 5 to 20 s.
BOOT_TRIES = 3
BOOT_PATIENCE = 75.0


class EmuhostError(Exception):
    """The emulated host could not be started, or died before the command ended."""


class Ended(Exception):  # noqa: N818 - not an error: the way out from a signal
    """The run was ended from outside; `status` is the exit status for that."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Options:
    """What to run and in how large a machine: `memory` in MiB, `timeout` in seconds; `console`: show it."""

    command: list[str]
    cpus: int = 1
    memory: int = 4096
    timeout: float = 900
    shares: list[Path] = field(default_factory=list)
    console: bool = False


def prepare() -> tuple[kernel.DebianKernel, Path]:
    """Install QEMU, and make the kernel and the initial RAM file system if they are not in the cache."""
    if not Path("/usr/bin/qemu-system-x86_64").exists():
        debian.install(PACKAGES)
    host = kernel.debian_kernel("linux-image-amd64")
    busybox = debian.unpacked("busybox-static") / "bin" / "busybox"
    _index_modules(host, busybox)
    scripts = {"init": HERE / "emuhost-boot.sh", "init2": HERE / "emuhost-init.sh"}
    name = cache.key(host.version, busybox, HERE / "cpio.py", *scripts.values(), *MODULES)

    def make(path: Path) -> None:
        archive = cpio.Archive()
        for directory in ("dev", "proc", "sys", "lower", "layer", "root", "job"):
            archive.directory(directory)
        archive.file("busybox", busybox.read_bytes(), 0o755)
        for target, script in scripts.items():
            archive.file(target, script.read_bytes(), 0o755)
        for number, module in enumerate(kernel.load_order(host, MODULES)):
            archive.file(f"modules/{number:02}-{module.name}", module.read_bytes())
        path.write_bytes(archive.finish())

    return host, cache.made(cache.cache_dir() / "emuhost" / f"initramfs-{host.version}-{name}.cpio", make)


def _index_modules(host: kernel.DebianKernel, busybox: Path) -> None:
    """Make modules.dep and modules.alias, so that modprobe finds every other module inside."""
    if not (host.modules / "modules.alias").exists():
        with cache.locked("emuhost-modules"):
            root = host.modules.parent.parent.parent
            subprocess.run(
                [busybox, "depmod", "-b", root, host.version], check=True, stdout=subprocess.DEVNULL
            )


def _job(options: Options, host: kernel.DebianKernel, token: str, terminal: os.terminal_size | None) -> bytes:
    """A second archive, to follow the first: the command, and what else differs from run to run."""
    command = ["/run/emuhost/busybox", "env", "-i"]
    command += [f"{name}={value}" for name, value in os.environ.items()]
    if terminal:
        # util-linux's script gives the command a terminal; the shell in it sets the terminal's size.
        size = f"stty rows {terminal.lines} cols {terminal.columns}; exec {shlex.join(options.command)}"
        command += ["script", "--quiet", "--return", "--flush", "--command", size, "/dev/null"]
    else:
        command += options.command
    limits = "ulimit -n 1048576; ulimit -l unlimited; ulimit -c 0\n"
    run = f"{limits}cd {shlex.quote(os.getcwd())} || exit 125\nexec {shlex.join(command)}\n"
    archive = cpio.Archive()
    archive.file("job/run", os.fsencode(run) + b"")
    shares = "".join(f"share{number} {path}\n" for number, path in enumerate(options.shares))
    archive.file("job/shares", os.fsencode(shares))
    archive.file("job/modules", os.fsencode(f"{host.modules.parent}\n"))
    archive.file("job/token", f"token={token}\n".encode())
    return archive.finish()


def _memory_file(name: str, *contents: bytes) -> int:
    fd = os.memfd_create(name)
    for content in contents:
        written = 0
        while written < len(content):
            written += os.write(fd, content[written:])
    return fd


def _share(path: str, tag: str, *, readonly: bool) -> list[str]:
    if "," in path:
        path = path.replace(",", ",,")
    mode = ",readonly=on" if readonly else ""
    return ["-virtfs", f"local,path={path},mount_tag={tag},security_model=none,multidevs=remap{mode}"]


def _qemu(options: Options, vmlinux: Path, initrd: int, ports: dict[str, socket.socket]) -> list[str]:
    arguments = KERNEL_ARGUMENTS + (" loglevel=7" if options.console else " quiet")
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "qemu-system-x86_64",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
    ]
    command += ["-display", "none", "-monitor", "none", "-M", "q35,accel=tcg", "-cpu", PROCESSOR]
    command += ["-smp", str(options.cpus), "-m", str(options.memory)]
    command += ["-kernel", str(vmlinux), "-initrd", f"/proc/self/fd/{initrd}", "-append", arguments]
    command += _share("/", "root", readonly=True)
    for number, path in enumerate(options.shares):
        command += _share(str(path), f"share{number}", readonly=False)
    for name, port in ports.items():
        command += ["-chardev", f"socket,id={name},fd={port.fileno()}"]
    command += ["-serial", "chardev:console", "-device", "virtio-serial-pci"]
    for number, name in enumerate(("stdin", "stdout", "stderr", "control"), 1):
        command += ["-device", f"virtserialport,chardev={name},name={name},nr={number}"]
    return command


def _on_signal(number: int, _frame: FrameType | None) -> None:
    raise Ended(128 + number, f"ended by {signal.Signals(number).name}")


def _on_alarm(_number: int, _frame: FrameType | None) -> None:
    raise Ended(STATUS_TIMEOUT, "the command did not end in time")


def run(options: Options) -> int:
    """Run the command in an emulated host; returns its exit status, or 124 when the time was up.

    Raises EmuhostError when the host fails rather than the command.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_signal)
    signal.signal(signal.SIGALRM, _on_alarm)
    try:
        host, initramfs = prepare()
        signal.setitimer(signal.ITIMER_REAL, options.timeout)
        for _ in range(BOOT_TRIES):
            try:
                return _run(options, host, initramfs)
            except NotUpError:
                print("emuhost: the emulated host froze while it booted", file=sys.stderr)
        raise EmuhostError(f"the emulated host did not boot in {BOOT_TRIES} tries")
    except Ended as end:
        print(f"emuhost: {end}", file=sys.stderr)
        return end.status
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _run(options: Options, host: kernel.DebianKernel, initramfs: Path) -> int:
    interactive = os.isatty(0) and os.isatty(1)
    token = secrets.token_hex(16)
    job = _job(options, host, token, os.get_terminal_size() if interactive else None)
    initrd = _memory_file("initramfs", initramfs.read_bytes(), job)
    errors = os.memfd_create("qemu-errors")
    mine: dict[str, socket.socket] = {}
    its: dict[str, socket.socket] = {}
    for name in ("console", "stdin", "stdout", "stderr", "control"):
        mine[name], its[name] = socket.socketpair()
    attributes = termios.tcgetattr(0) if interactive else None
    qemu = subprocess.Popen(
        _qemu(options, host.vmlinux, initrd, its),
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        pass_fds=[initrd, *(port.fileno() for port in its.values())],
        start_new_session=True,
    )
    try:
        process = os.pidfd_open(qemu.pid)
        for port in its.values():
            port.close()
        if attributes:
            tty.setraw(0)
        control, console = Tail(mine["control"]), Tail(mine["console"], 2 if options.console else None)
        outputs = [Output(mine["stdout"], 1, token.encode()), Output(mine["stderr"], 2, token.encode())]
        # A processor that sleeps and misses its timer sleeps for ever: an interrupt of the serial port wakes it.
        nudged = mine["console"]
        relay(
            Input(0, mine["stdin"]),
            outputs,
            [control, console],
            process,
            Patience(f"/proc/{qemu.pid}/task", BOOT_PATIENCE),
            nudged,
        )
        while not control.data.endswith(b"\n") and not control.ended:
            control.receive()
        if control.data:
            return int(control.data)
        said = os.pread(errors, 4096, 0) + console.data
        raise EmuhostError("the emulated host ended by itself:\n" + said.decode(errors="replace"))
    finally:
        if attributes:
            termios.tcsetattr(0, termios.TCSADRAIN, attributes)
        qemu.kill()
        qemu.wait()
