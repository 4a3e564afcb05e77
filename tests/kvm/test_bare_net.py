"""virtio-net as a bare-metal guest drives it, with the host on the other side of the TAP."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.api.conftest import REAL

from crackle import MicroVM
from crackle.schema import RateLimiter, TokenBucket
from support.card import Host, frame, tcp_segment
from support.network import Namespace

GUEST = bytes.fromhex("060000000001")
PEER = bytes.fromhex("060000000002")
WAYS = ["", "noevent", "nomerge", "nomerge noevent", "large", "large noevent"]


class Wired:
    """Runs the `net` guest on a TAP of a namespace."""

    def __init__(self, namespace: Namespace, machine: Callable[..., Any], mtu: int) -> None:
        self.namespace, self._machine = namespace, machine
        self.tap = namespace.tap(mtu=mtu)
        self.host = Host(namespace, self.tap)

    def start(self, boot_args: str, **section: Any) -> Any:
        """A running machine. section: fields of the interface."""
        interface = {"iface_id": "eth0", "host_dev_name": self.tap, **section}
        with self.namespace.entered():
            return self._machine("net", boot_args, network=[interface]).start()

    def end(self, running: Any) -> dict[str, Any]:
        """The guest's end, which must be a good one, and what its interface counted."""
        assert running.wait_end().exit_code == 0
        assert "FAIL" not in running.text
        found: dict[str, Any] = running.machine.metrics()["net_eth0"]
        running.machine.stop()
        return found


@pytest.fixture
def wired(namespace: Namespace, machine: Callable[..., Any]) -> Iterator[Wired]:
    wired = Wired(namespace, machine, 9000)
    yield wired
    wired.host.close()


def to_guest(size: int, seed: int = 0) -> bytes:
    return frame(size, source=PEER, target=GUEST, seed=seed)


def checksum(frames: list[bytes]) -> int:
    """As the guest computes it."""
    total = 0
    for byte in b"".join(frames):
        total = (total * 31 + byte) & (1 << 64) - 1
    return total


@pytest.mark.parametrize("way", WAYS)
def test_frames_that_the_guest_sends_arrive_in_order(wired: Wired, way: str) -> None:
    counted = wired.end(wired.start(f"{way} t=one,600,50"))
    got = wired.host.frames(50)
    assert [int.from_bytes(one[14:16], "big") for one in got] == list(range(50))
    assert {len(one) for one in got} == {600}
    assert counted["tx_packets_count"] == 50


@pytest.mark.parametrize("way", WAYS)
def test_frames_that_the_host_sends_arrive_whole(wired: Wired, way: str) -> None:
    buffer = 65562 if "large" in way or "nomerge" in way else 700
    size = 1514 if way.startswith("nomerge") else 9014
    running = wired.start(f"{way} buffer={buffer} t=expect,{size},20")
    running.wait_for("net expect ready")
    sent = [to_guest(size, n + 1) for n in range(20)]
    for one in sent:
        wired.host.send(one)
        time.sleep(0.002)
    counted = wired.end(running)
    assert f"seen=20 sum={checksum(sent):#x}\n" in running.text
    assert counted["rx_packets_count"] == 20


def test_frames_of_every_size_come_back_as_they_went(wired: Wired) -> None:
    sizes = [14, 15, 59, 60, 1514, 1515, 2035, 2036, 2037, 4096, 9014]
    sizes += random.Random(1).choices(range(14, 9015), k=60)
    running = wired.start(f"t=echo,0,{len(sizes)}")
    running.wait_for("net echo ready")
    for n, size in enumerate(sizes):
        wired.host.send(to_guest(size, n + 1))
        [back] = wired.host.frames(1)
        sent = to_guest(size, n + 1)
        assert back == sent[6:12] + sent[:6] + sent[12:]
    counted = wired.end(running)
    assert counted["rx_bytes_count"] == counted["tx_bytes_count"] == sum(sizes) + 12 * len(sizes)


def test_segments_of_64_kib_pass_both_ways(wired: Wired) -> None:
    host = Host(wired.namespace, wired.tap, headers=True)
    running = wired.start("large buffer=4096 t=one,65000,3 t=expect,60054,3")
    assert [len(one) - 10 for one in host.frames(3)] == [65000] * 3
    running.wait_for("net expect ready")
    header, segment = tcp_segment(60_000)
    for _ in range(3):
        host.send(header[:10] + segment)
    wired.end(running)
    assert "net expect 60054 seen=3" in running.text
    host.close()


def test_a_flood_in_both_directions_does_no_harm(wired: Wired) -> None:
    running = wired.start("ms=100 t=tx,64 t=tx,1514 t=rx,1000 t=tx,65000 t=one,60,5")
    for n in range(3000):
        wired.host.send(to_guest(1000, 1 + n % 7))
    counted = wired.end(running)
    totals = [int(count) for count in re.findall(r"net tx \d+ frames=(\d+)", running.text)]
    assert len(totals) == 3
    assert counted["tx_packets_count"] == sum(totals) + 5
    assert counted["tap_write_fails"] == counted["rx_fails"] == 0


def test_a_paused_machine_takes_no_frames_and_loses_none(wired: Wired) -> None:
    running = wired.start("t=expect,500,30")
    running.wait_for("net expect ready")
    sent = [to_guest(500, n + 1) for n in range(30)]
    for n, one in enumerate(sent):
        if n % 3 == 0:
            running.machine.pause()
        wired.host.send(one)
        if n % 3 == 2:
            running.machine.resume()
    running.machine.resume()
    wired.end(running)
    assert f"seen=30 sum={checksum(sent):#x}\n" in running.text


def test_a_guest_whose_console_nobody_reads_is_reached_over_its_network(
    wired: Wired, guests: Path, tmp_path: Path
) -> None:
    """As `crackle-vmm` promises: 100,000 bytes to a reader that has stopped, and the guest answers each frame."""
    config = {
        "boot-source": {
            "kernel_image_path": str(guests / "net.elf"),
            "boot_args": "t=talk,50000 t=talk,50000 t=echo,0,10 t=talk,50000 t=echo,0,10",
        },
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": wired.tap}],
    }
    path = tmp_path / "vm.json"
    path.write_text(json.dumps(config))
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    log = tmp_path / "log"
    log.touch()
    command = [*REAL, "--no-api", "--config-file", str(path), "--log-path", str(log)]
    with wired.namespace.entered():
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writing)
    try:
        while "Successfully started" not in log.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        for n in range(20):
            wired.host.send(to_guest(100, n + 1))
            [back] = wired.host.frames(1, 60)
            assert back[14:] == to_guest(100, n + 1)[14:]
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(writing)
    with open(reading, "rb") as output:
        kept = output.read()
    assert 0 < len(kept) <= 4096


def test_an_idle_interface_wakes_nobody(wired: Wired) -> None:
    running = wired.start("end=idle t=one,60,3")
    running.wait_for("net end")
    time.sleep(0.2)
    before = running.machine.io.wakeups
    time.sleep(0.5)
    assert running.machine.io.wakeups == before


def test_a_limit_on_frames_is_kept_by_a_driver_that_polls(wired: Wired) -> None:
    limit = {"ops": {"size": 100, "refill_time": 100}}
    begin = time.monotonic()
    running = wired.start("ms=1000 t=tx,64", tx_rate_limiter=limit)
    counted = wired.end(running)
    sent, seconds = counted["tx_packets_count"], time.monotonic() - begin
    # What waited in the ring at the end went at the same rate.
    assert 900 < sent < 100 + 1050 * seconds
    assert counted["tx_rate_limiter_throttled"] > 5


def test_frames_from_another_address_are_counted_or_dropped(wired: Wired) -> None:
    counted = wired.end(wired.start("from=9 t=one,60,5", guest_mac="06:00:00:00:00:01"))
    assert (counted["tx_spoofed_mac_count"], counted["tx_packets_count"]) == (5, 5)
    assert len(wired.host.frames(5)) == 5
    running = wired.start("from=9 t=one,60,5", guest_mac="06:00:00:00:00:01", drop_spoofed_mac=True)
    assert wired.end(running)["tx_spoofed_mac_count"] == 5
    assert wired.host.nothing_more()


def test_the_library_limits_an_interface_while_the_guest_runs(namespace: Namespace, guests: Path) -> None:
    tap = namespace.tap()
    with namespace.entered():
        vm = MicroVM(guests / "net.elf", boot_args="ms=1000 t=wait,300 t=tx,64", interfaces=[tap])
    with vm:
        vm.update_interface("eth0", tx_limiter=RateLimiter(None, TokenBucket(100, 100)))
        vm.wait(60)
        assert 0 < vm.metrics()["net_eth0"]["tx_packets_count"] < 10_000


def test_a_flood_does_not_keep_the_machine_from_pausing(wired: Wired) -> None:
    running = wired.start("ms=60000 t=rx,1000")
    running.wait_for("net offered")
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            with suppress(OSError):  # the TAP's queue is full
                wired.host.send(to_guest(1000, 1))

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for _ in range(20):
            before = running.machine.metrics()["net_eth0"]["rx_packets_count"]
            running.machine.pause()
            running.machine.resume()
            deadline = time.monotonic() + 20
            while running.machine.metrics()["net_eth0"]["rx_packets_count"] == before:
                assert time.monotonic() < deadline, "nothing is received any more"
                time.sleep(0.001)
    finally:
        stop.set()
        thread.join()
