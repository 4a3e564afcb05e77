"""Real networks for tests: network namespaces of their own, with TAP devices, bridges and veth pairs in them.

A namespace has no name and no file: it lives as long as this process holds its descriptor and a process is in it, so
that nothing of it can be left behind, however the test ends. Needs root; the fixtures `namespace` and `namespaces` skip
the test without. /sys/class/net keeps showing the machine's interfaces: ask netlink (`ip`) instead.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

_TUNSETIFF, _IFF_TAP_NO_PI = 0x400454CA, 0x1002  # <linux/if_tun.h>
CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_libc = ctypes.CDLL(None, use_errno=True)
_number = itertools.count()


class Namespace:
    """A network namespace with only its loopback, which is up. A context manager.

    Every process started with `popen` is killed at the end.
    """

    def __init__(self) -> None:
        self.fd = _new_namespace()
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"
        """A path of it, for setns, nsenter and `ip link set ... netns`, while this object is open."""
        self._processes: list[subprocess.Popen[Any]] = []
        self.ip("link set lo up")

    # -- being in it ---------------------------------------------------------------------------------------------

    def command(self, *arguments: str | os.PathLike[str]) -> list[str]:
        """The command line that runs `arguments` in the namespace; the process keeps its id."""
        return ["nsenter", f"--net={self.path}", "--", *map(os.fspath, arguments)]

    def run(
        self, *arguments: str | os.PathLike[str], check: bool = True, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the namespace to its end. AssertionError with its output when it fails, if `check`."""
        done = subprocess.run(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            **options,
        )
        assert not check or done.returncode == 0, f"{arguments} ended with {done.returncode}: {done.stdout}"
        return done

    def popen(self, *arguments: str | os.PathLike[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program in the namespace; it ends with the namespace at the latest."""
        options = {"stdin": subprocess.DEVNULL} | options
        self._processes.append(subprocess.Popen(self.command(*arguments), **options))
        return self._processes[-1]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread, and threads it starts meanwhile, are in the namespace: open TAPs and sockets here."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self.fd)
            try:
                yield
            finally:
                _setns(before)
        finally:
            os.close(before)

    def socket(self, *arguments: Any) -> socket.socket:
        """`socket.socket(*arguments)` of the namespace; it stays there wherever it is used."""
        with self.entered():
            return socket.socket(*arguments)

    # -- what is in it -------------------------------------------------------------------------------------------

    def ip(self, command: str) -> str:
        """Output of `ip COMMAND`, in one string as in a shell script without quotes."""
        return self.run("ip", *command.split()).stdout

    def show(self, what: str = "-details link") -> list[dict[str, Any]]:
        """`ip -json WHAT`, parsed: `show("addr")`, `show("-s link show dev tap0")`, `show("route")`."""
        found: list[dict[str, Any]] = json.loads(self.run("ip", "-json", *what.split()).stdout or "[]")
        return found

    def tap(
        self,
        name: str = "",
        *,
        address: str = "",
        bridge: str = "",
        mtu: int = 1500,
        mac: str = "",
        owner: int | None = None,
    ) -> str:
        """A persistent TAP device that is up; returns its name. It can be opened with IFF_VNET_HDR as it is.

        address: like "10.0.0.1/24". bridge: the bridge it is put into. owner: a user id that may open it.
        """
        name = name or f"tap{next(_number)}"
        user = "" if owner is None else f" user {owner}"
        self.ip(f"tuntap add dev {name} mode tap vnet_hdr{user}")
        self._set_up(name, address, bridge, mtu, mac)
        return name

    def bridge(self, name: str = "", *, address: str = "", mtu: int = 1500) -> str:
        """A bridge that forwards at once (no spanning tree) and is up; returns its name."""
        name = name or f"br{next(_number)}"
        self.ip(f"link add {name} type bridge stp_state 0 forward_delay 0")
        self._set_up(name, address, "", mtu, "")
        return name

    def veth(
        self, other: Namespace, *, address: str = "", peer: str = "", bridge: str = "", mtu: int = 1500
    ) -> tuple[str, str]:
        """A cable to `other`: names of the end here and the end there, both up.

        address, peer: addresses of the two ends, like "10.0.0.1/24". bridge: what this end is put into.
        """
        here, there = f"veth{next(_number)}", f"veth{next(_number)}"
        self.ip(f"link add {here} type veth peer name {there}")
        self.ip(f"link set {there} netns {other.path}")
        self._set_up(here, address, bridge, mtu, "")
        other._set_up(there, peer, "", mtu, "")
        return here, there

    def _set_up(self, name: str, address: str, bridge: str, mtu: int, mac: str) -> None:
        # No IPv6: its announcements would be frames that no test asked for.
        self.switch(f"net/ipv6/conf/{name}/disable_ipv6", 1)
        extra = (f" master {bridge}" if bridge else "") + (f" address {mac}" if mac else "")
        self.ip(f"link set {name} mtu {mtu}{extra} up")
        if address:
            self.ip(f"addr add {address} dev {name}")

    def switch(self, path: str, value: int) -> None:
        """Write a number to a file of the namespace's /proc/sys: `switch("net/ipv4/ip_forward", 1)`.

        Nothing happens where the kernel has no such file (without IPv6, for instance).
        """
        with self.entered(), suppress(FileNotFoundError):
            Path("/proc/sys", path).write_text(str(value))

    def state(self) -> tuple[str, ...]:
        """Everything that something could leave behind: interfaces, addresses, routes, packet filter, forwarding."""
        forward = self.run("cat", "/proc/sys/net/ipv4/ip_forward").stdout
        ruleset = self.run("nft", "list", "ruleset").stdout
        return self.ip("-o link"), self.ip("-o addr"), self.ip("route"), ruleset, forward

    def statistics(self, name: str) -> dict[str, dict[str, int]]:
        """Counters of an interface: `statistics("tap0")["rx"]["packets"]`; what a guest sends, its TAP receives."""
        found: dict[str, dict[str, int]] = self.show(f"-s link show dev {name}")[0]["stats64"]
        return found

    # -- watching it ---------------------------------------------------------------------------------------------

    @contextmanager
    def capture(self, interface: str, path: Path, *, snap: int = 0) -> Iterator[Path]:
        """Record the interface's frames into the pcapng file `path`, all that passed before the block ends.

        snap: bytes kept of each frame; 0 for all.
        """
        command = ["dumpcap", "-q", "-i", interface, "-w", path, "-s", str(snap)]
        process = self.popen(*command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _wait(lambda: path.exists() and path.stat().st_size > 0, "dumpcap has begun", process)
            yield path
            time.sleep(0.5)  # dumpcap looks at what has arrived a few times a second
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)

    def wait_listening(self, port: int, seconds: float = 30.0) -> None:
        """Until something in the namespace listens on TCP `port`."""
        _wait(lambda: f":{port} " in self.run("ss", "-Hltn").stdout, f"listening on {port}", None, seconds)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
        os.close(self.fd)

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def wired(host: Namespace, tap: str, guest: Namespace, mac: str, address: str) -> Iterator[str]:
    """`guest` is behind the TAP device `tap` of `host`, as a microVM would be; the name of its interface.

    address: the guest's own, like "10.0.0.2/24"; the first of its range is its router.
    """
    there = guest.tap(mac=mac)
    ends = []
    for namespace, name in ((host, tap), (guest, there)):
        with namespace.entered():
            ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
            fcntl.ioctl(ends[-1], _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP_NO_PI))
    stop, stopper = os.pipe()

    def relay() -> None:
        other = dict(zip(ends, reversed(ends), strict=True))
        while stop not in (ready := select.select([stop, *ends], [], [])[0]):
            for end in ready:
                with suppress(OSError):
                    os.write(other[end], os.read(end, 65536))

    thread = threading.Thread(target=relay)
    thread.start()
    try:
        guest.ip(f"addr add {address} dev {there}")
        guest.ip(f"route add default via {IPv4Interface(address).network[1]}")
        yield there
    finally:
        os.close(stopper)
        thread.join()
        for end in (stop, *ends):
            os.close(end)
        guest.ip(f"link del {there}")


def tshark(capture: Path, *arguments: str) -> list[str]:
    """Lines that tshark prints of a capture, with checksums verified: `tshark(file, "-Y", "_ws.malformed")`.

    A frame that was segmented or checksummed by nobody yet (offloads) has no right checksum: capture where it has.
    """
    command = ["tshark", "-n", "-r", capture, "-o", "ip.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE"]
    done = subprocess.run(
        [*command, "-o", "udp.check_checksum:TRUE", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def malformed(capture: Path) -> list[str]:
    """What tshark holds for broken in a capture: frames that are malformed, cut short, or lie about a checksum."""
    filter_ = "_ws.malformed || _ws.short || ip.checksum.status == 0 || tcp.checksum.status == 0"
    return tshark(capture, "-Y", filter_ + " || udp.checksum.status == 0")


def may_make_namespaces() -> bool:
    """Whether this process may make network namespaces."""
    try:
        os.close(_new_namespace())
    except OSError:
        return False
    return True


def _wait(
    condition: Any, what: str, process: subprocess.Popen[Any] | None = None, seconds: float = 30.0
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        assert process is None or process.poll() is None, f"ended too early: {process and process.args}"
        time.sleep(0.02)


def _new_namespace() -> int:
    """A descriptor of a new network namespace, made in a thread, which alone is in it for a moment."""
    result: list[int | OSError] = []

    def make() -> None:
        try:
            if _libc.unshare(CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            result.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
