"""virtio-net with real Linux guests: ping, streams, files both ways, jumbo frames, offloads, limits, a bridge."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.linux.conftest import Guest

from crackle import NetworkInterface
from crackle.schema import RateLimiter, TokenBucket
from support.network import Namespace, malformed, tshark

pytestmark = pytest.mark.timeout(400)

HOST, GUEST = "10.7.0.1", "10.7.0.2"
RATE = 200_000  # bytes a second, where there is a limit
MAC = "06:f0:0d:00:00:02"
FILE_KIB = 512


class Wire:
    """A TAP with an address, and a guest with another on it."""

    def __init__(self, namespace: Namespace, mtu: int = 1500) -> None:
        self.namespace = namespace
        self.tap = namespace.tap(address=f"{HOST}/24", mtu=mtu)

    def boot(self, boot: Callable[..., Guest], tools: dict[str, object], **fields: Any) -> Guest:
        interface = NetworkInterface("eth0", self.tap, MAC, **fields)
        with self.namespace.entered():
            guest = boot(interfaces=[interface], **tools)
        guest.wait_shell()
        guest.sh(f"ifconfig eth0 {GUEST} netmask 255.255.255.0 up")
        return guest


@pytest.fixture
def wire(namespace: Namespace) -> Wire:
    return Wire(namespace)


def counters(guest: Guest) -> dict[str, Any]:
    found: dict[str, Any] = guest.vm.metrics()["net_eth0"]
    return found


def stream(wire: Wire, *options: str) -> None:
    """An iperf3 session of some megabytes from the host to the guest, the other way with `-R`."""
    done = wire.namespace.run("iperf3", "-J", "-c", GUEST, "-n", "3M", "-w", "128K", *options, timeout=200)
    end = json.loads(done.stdout)["end"]
    assert end["sum_sent"]["bytes"] >= 3 << 20
    # What was still under way when the sender had sent it all is not counted.
    assert end["sum_received"]["bytes"] > 2 << 20


def exchange_files(wire: Wire, guest: Guest, folder: Path, port: int) -> None:
    """A file from the host to the guest and one back, by HTTP on `port`, compared."""
    sent = os.urandom(FILE_KIB << 10)
    (folder / "down").write_bytes(sent)
    wire.namespace.popen("python3", "-m", "http.server", str(port), cwd=folder, stderr=subprocess.DEVNULL)
    wire.namespace.wait_listening(port)
    assert (
        guest.sh(f"curl -s http://{HOST}:{port}/down | sha256sum").split()[0]
        == hashlib.sha256(sent).hexdigest()
    )
    guest.sh(f"dd if=/dev/urandom of=/tmp/up bs=1024 count={FILE_KIB} 2>/dev/null; httpd -p {port} -h /tmp")
    wire.namespace.run("curl", "-sf", "-o", str(folder / "up"), f"http://{GUEST}:{port}/up")
    assert (
        hashlib.sha256((folder / "up").read_bytes()).hexdigest() == guest.sh("sha256sum /tmp/up").split()[0]
    )


def test_ping_streams_and_files_with_offloads_and_without_and_within_limits(
    wire: Wire, boot: Callable[..., Guest], tools: dict[str, object], tmp_path: Path
) -> None:
    guest = wire.boot(boot, tools)
    assert MAC in guest.sh("ifconfig eth0").lower()
    assert "3 packets received" in guest.sh(f"ping -c 3 -i 0.2 {HOST}")
    wire.namespace.run("ping", "-c", "3", "-i", "0.2", GUEST)
    exchange_files(wire, guest, tmp_path, 8000)
    guest.sh("iperf3 -s -D && sleep 1")
    capture = tmp_path / "capture.pcapng"
    for offloads in ("on", "off"):
        if offloads == "off":
            guest.sh("ethtool -K eth0 tso off gso off tx off")
            wire.namespace.run("ethtool", "-K", wire.tap, "tx", "off", "tso", "off", "gso", "off")
        before = counters(guest)
        with wire.namespace.capture(wire.tap, capture):
            stream(wire)
            stream(wire, "-R")
            assert " 0% packet loss" in guest.sh(f"ping -c 2 {HOST}")
        after = counters(guest)
        largest = max(
            (after[f"{way}_bytes_count"] - before[f"{way}_bytes_count"])
            / (after[f"{way}_packets_count"] - before[f"{way}_packets_count"])
            for way in ("rx", "tx")
        )
        assert (largest > 1526) == (offloads == "on")
        assert tshark(capture, "-Y", "_ws.malformed || _ws.short") == []
        if offloads == "off":
            # Every frame has passed complete here, with checksums.
            assert malformed(capture) == []
            # Most of some 4,000: a capture loses frames where the machine has no time for it.
            assert len(tshark(capture)) > 1000
    limit = RateLimiter(TokenBucket(RATE // 10, 100), TokenBucket(50, 100))
    guest.vm.update_interface("eth0", rx_limiter=limit, tx_limiter=limit)
    exchange_files(wire, guest, tmp_path, 8001)
    assert " 0% packet loss" in guest.sh(f"ping -c 2 {HOST}")
    counted = counters(guest)
    assert counted["rx_rate_limiter_throttled"] > 0
    assert counted["tx_rate_limiter_throttled"] > 0
    assert {name: counted[name] for name in FAILURES} == dict.fromkeys(FAILURES, 0)


FAILURES = (
    "activate_fails",
    "cfg_fails",
    "event_fails",
    "rx_fails",
    "tap_read_fails",
    "tap_write_fails",
    "tx_fails",
    "tx_malformed_frames",
    "tx_spoofed_mac_count",
)


def test_jumbo_frames_pass_whole(
    namespace: Namespace, boot: Callable[..., Guest], tools: dict[str, object]
) -> None:
    wire = Wire(namespace, mtu=9000)
    guest = wire.boot(boot, tools, mtu=9000)
    assert "MTU:9000" in guest.sh("ifconfig eth0")
    before = wire.namespace.statistics(wire.tap)
    assert " 0% packet loss" in guest.sh(f"ping -c 3 -i 0.2 -s 8900 {HOST}")
    wire.namespace.run("ping", "-M", "do", "-c", "3", "-i", "0.2", "-s", "8972", GUEST)
    after = wire.namespace.statistics(wire.tap)
    assert after["rx"]["bytes"] - before["rx"]["bytes"] > 3 * 8942 + 3 * 9014
    assert after["rx"]["packets"] - before["rx"]["packets"] < 12  # replies to both, and no fragments
    guest.sh("ethtool -K eth0 tso off gso off; iperf3 -s -D && sleep 1")
    stream(wire, "-R")
    stream(wire)


SECONDS = 5.0


@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_a_limit_set_while_the_guest_runs_holds_over_seconds(
    wire: Wire, boot: Callable[..., Guest], tools: dict[str, object], direction: str
) -> None:
    guest = wire.boot(boot, tools)
    # Large segments would make the steps too large for five seconds.
    guest.sh("ethtool -K eth0 tso off gso off; iperf3 -s -D && sleep 1")
    limits = {f"{direction}_limiter": RateLimiter(TokenBucket(RATE // 20, 50))}
    guest.vm.update_interface("eth0", **limits)
    # What is beyond the limit: TCP that the ring holds back, or UDP that the TAP's queue drops.
    options = ("-R",) if direction == "tx" else ("-u", "-b", "4M", "-l", "1400")
    session = wire.namespace.popen("iperf3", "-c", GUEST, "-t", "100", *options, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while counters(guest)[f"{direction}_rate_limiter_throttled"] < 20:
        assert time.monotonic() < deadline, "nothing is beyond the limit"
        time.sleep(0.1)
    before, begin = counters(guest)[f"{direction}_bytes_count"], time.monotonic()
    time.sleep(SECONDS)
    after, end = counters(guest)[f"{direction}_bytes_count"], time.monotonic()
    session.kill()
    assert (after - before) / (end - begin) == pytest.approx(RATE, rel=0.05)


def test_two_microvms_talk_over_a_bridge(
    namespace: Namespace, boot: Callable[..., Guest], tools: dict[str, object], tmp_path: Path
) -> None:
    bridge = namespace.bridge()
    taps = [namespace.tap(bridge=bridge) for _ in range(2)]
    with namespace.entered():
        guests = [
            boot(interfaces=[NetworkInterface("eth0", tap, f"06:f0:0d:00:00:0{n}")], **tools)
            for n, tap in enumerate(taps, 1)
        ]
    for n, guest in enumerate(guests, 1):
        guest.wait_shell()
        guest.sh(f"ifconfig eth0 10.7.0.{n} netmask 255.255.255.0 up")
    first, second = guests
    with namespace.capture(bridge, tmp_path / "capture.pcapng") as capture:
        assert "3 packets received" in first.sh("ping -c 3 -i 0.2 10.7.0.2")
        second.sh("dd if=/dev/urandom of=/tmp/file bs=1024 count=1024 2>/dev/null; httpd -p 80 -h /tmp")
        first.sh("curl -s -o /tmp/file http://10.7.0.2/file")
    assert first.sh("sha256sum /tmp/file") == second.sh("sha256sum /tmp/file")
    assert tshark(capture, "-Y", "_ws.malformed || _ws.short") == []
    for guest in guests:
        counted = counters(guest)
        assert {name: counted[name] for name in FAILURES} == dict.fromkeys(FAILURES, 0)


def test_a_guest_reaches_the_world_by_routes_and_rules_made_by_hand(
    namespaces: Callable[[], Namespace], boot: Callable[..., Guest], tools: dict[str, object]
) -> None:
    host, world = namespaces(), namespaces()
    out, _ = host.veth(world, address="192.0.2.1/24", peer="192.0.2.2/24")
    tap = host.tap(address="172.16.0.1/30")
    host.switch("net/ipv4/ip_forward", 1)
    for rule in (
        "add table ip microvms",
        "add chain ip microvms out { type nat hook postrouting priority srcnat; }",
        f"add rule ip microvms out ip saddr 172.16.0.2 oifname {out} counter masquerade",
    ):
        host.run("nft", rule)
    arguments = "ip=172.16.0.2::172.16.0.1:255.255.255.252::eth0:off"
    with host.entered():
        guest = boot(interfaces=[NetworkInterface("eth0", tap, MAC)], boot_args=arguments, **tools)
    guest.wait_shell()
    # Which knows no way back to the guest: the host's own address is what it sees.
    assert "2 packets received" in guest.sh("ping -c 2 -i 0.2 192.0.2.2")
    assert "counter packets 0" not in host.run("nft", "list table ip microvms").stdout
    with world.socket() as listener:
        listener.bind(("192.0.2.2", 80))
        listener.listen()
        listener.settimeout(60)
        guest.sh("echo from the guest | nc 192.0.2.2 80 &")
        stream, peer = listener.accept()
        with stream:
            assert peer[0] == "192.0.2.1"
            assert stream.recv(100) == b"from the guest\n"
