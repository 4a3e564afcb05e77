"""net.*: virtio-net from a polling bare-metal guest on a TAP, beside the reference and beside a loop in C.

All traffic stays in a network namespace that ends with the run. Receiving, what is told is what the guest saw.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections import defaultdict
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.hosts import beside
from bench.monitor import Monitor, alternate, device_seconds, idle_switches
from bench.rows import BUILD, ROOT, Bench, Row, absolute, paired

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MILLISECONDS = 250
TAP = "tap0"
HEADER = 12


class Test(NamedTuple):
    """What is measured: its row, the guest's test, bytes of a frame, and its options.

    group: frames a call of the sender, which does what `sender` says (`bench/tap.c`).
    """

    name: str
    operation: str
    size: int
    options: str = ""
    group: int = 0
    sender: str = "send"


TESTS = (
    Test("net.tx_64", "tx", 64),
    Test("net.tx_64k", "tx", 65000),
    Test("net.rx_1400", "rx", 1400, "buffer=2048", 46),
    Test("net.rx_64k", "rx", 65000, "buffer=4096 large", 1),
)


class Speed(NamedTuple):
    """Frames a second, and seconds of CPU for each GiB, of everything but vCPUs."""

    frames: float
    cpu_per_gib: float


class Network:
    """A network namespace with one TAP, that of a process that does nothing."""

    def __init__(self, queue: int = 4000) -> None:
        """queue: frames that the TAP has room for, here enough for what the sender sends at once; 500 by default."""
        self.process = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        self.path = f"/proc/{self.process.pid}/ns/net"
        while Path(self.path).readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.001)
        no_ipv6 = f"/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6"
        for command in (
            "ip link set lo up",
            f"ip tuntap add dev {TAP} mode tap vnet_hdr",
            f"[ ! -e {no_ipv6} ] || echo 1 > {no_ipv6}",
            f"ip link set {TAP} txqueuelen {queue} up",
        ):
            subprocess.run(self.command("sh", "-c", command), check=True)

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `arguments` there."""
        return ["nsenter", f"--net={self.path}", "--", *arguments]

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def sender(network: Network, tool: Path, test: Test) -> AbstractContextManager[None]:
    """Frames for whoever reads the TAP, where the test is about that."""
    if not test.group:
        return nullcontext()
    return beside(network.command(str(tool), test.sender, TAP, str(test.size), str(test.group)))


@contextmanager
def guest(network: Network, command: Sequence[str], bench: Bench, options: str) -> Iterator[Monitor]:
    """A monitor whose guest runs `net` with these options; it halts at the end of them."""
    with Monitor(network.command(*command), bench.scratch) as monitor:
        interface = {"iface_id": "eth0", "host_dev_name": TAP, "guest_mac": "06:00:00:00:00:01"}
        monitor.configure("net", f"end=idle {options}", network=[interface])
        monitor.start()
        yield monitor


def measure(network: Network, command: Sequence[str], bench: Bench, tool: Path, test: Test) -> Speed:
    """One run of the test in one monitor."""
    options = f"ms={MILLISECONDS} {test.options} t=wait,100 t={test.operation},{test.size}"
    with guest(network, command, bench, options) as monitor:
        monitor.wait_output("net offered")
        with sender(network, tool, test):
            before = device_seconds(monitor.pid)
            printed = monitor.wait_output("net end")
            cpu = device_seconds(monitor.pid) - before
    found = re.search(rf"net {test.operation} {test.size} frames=(\d+) bytes=(\d+) us=(\d+)", printed)
    if not found or not int(found[1]):
        raise RuntimeError(f"no result of {test.name} in: {printed}")
    frames, size, us = map(int, found.groups())
    return Speed(frames / us * 1e6, cpu / (size / (1 << 30)))


def loop(network: Network, tool: Path, test: Test) -> Speed:
    """The same by a loop in C that does nothing else."""
    size, large = ("4096", "1") if "large" in test.options else ("2048", "0")
    what = ["write", TAP, str(test.size)] if test.operation == "tx" else ["read", TAP, size]
    with sender(network, tool, test):
        done = subprocess.run(
            network.command(str(tool), *what, str(MILLISECONDS), large),
            capture_output=True,
            text=True,
            check=True,
        )
    frames, bytes_, us, cpu_us = map(int, re.findall(r"=(\d+)", done.stdout))
    return Speed(frames / us * 1e6, cpu_us / 1e6 / (bytes_ / (1 << 30)))


def idle_wakeups(network: Network, bench: Bench) -> float:
    """Times a second that a thread of ours wakes while the guest halts with its interface open."""
    with guest(network, bench.ours, bench, "") as monitor:
        monitor.wait_output("net end")
        return idle_switches(monitor.pid)


def build_tool() -> Path:
    """`bench/tap.c`, compiled."""
    tool = BUILD / "bench" / "tap"
    tool.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", "-O2", "-o", str(tool), str(ROOT / "bench" / "tap.c")], check=True)
    return tool


def rows(bench: Bench) -> Iterator[Row]:
    """Frames a second."""
    tool = build_tool()
    found: dict[tuple[str, str], list[Speed]] = defaultdict(list)
    with Network() as network:
        for turn, (name, command) in enumerate(alternate(bench.contestants, bench.times(15))):
            for test in TESTS:
                found[name, test.name].append(measure(network, command, bench, tool, test))
                if turn % len(bench.contestants) == 0:
                    found["loop", test.name].append(loop(network, tool, test))
        wakeups = idle_wakeups(network, bench)
    for test in TESTS:
        frames: dict[str, list[Any]] = {
            who: [one.frames for one in found[who, test.name]] for who in ("ours", "reference", "loop")
        }
        yield paired(
            test.name, "frames/s", frames["ours"], frames["reference"], bench.reference_name, ">= 1.0"
        )
        yield paired(f"{test.name}.loop", "frames/s", frames["ours"], frames["loop"], "a loop in C", ">= 0.8")
        cpu = {who: [one.cpu_per_gib for one in found[who, test.name]] for who in ("ours", "reference")}
        yield paired(
            f"{test.name}.cpu", "s/GiB", cpu["ours"], cpu["reference"], bench.reference_name, "<= 1.0"
        )
    yield absolute("net.idle", wakeups, "switches/s", "== 0")
