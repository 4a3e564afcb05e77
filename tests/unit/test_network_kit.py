"""The networks that tests are given are real, separate, and gone afterwards."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

from support.network import Namespace, malformed, tshark


def machine_links() -> str:
    return subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout


def test_cables_and_bridges_carry_frames_between_namespaces(namespaces: Callable[[], Namespace]) -> None:
    before = machine_links()
    left, middle, right = namespaces(), namespaces(), namespaces()
    bridge = middle.bridge(address="10.0.0.3/24")
    middle.veth(left, peer="10.0.0.1/24", bridge=bridge)
    middle.veth(right, peer="10.0.0.2/24", bridge=bridge)
    left.run("ping", "-c", "1", "-W", "5", "10.0.0.2")
    right.run("ping", "-c", "1", "-W", "5", "10.0.0.3")
    assert machine_links() == before


def test_a_socket_belongs_to_the_namespace_it_was_made_in(namespace: Namespace) -> None:
    listener = namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 80))
    listener.listen()
    namespace.wait_listening(80)
    client = namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.connect(("127.0.0.1", 80))
    listener.close()
    client.close()


def test_frames_on_a_tap_are_captured_and_judged(namespace: Namespace, tmp_path: Path) -> None:
    name = namespace.tap(address="10.1.0.1/24")
    with namespace.entered():
        tap = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x5002))  # TAP, NO_PI, VNET_HDR
    ethernet = bytes.fromhex("ffffffffffff 020000000001 0800")
    ip = bytes.fromhex("4500001c 00000000 4011 0000 0a010002 0a010001")  # its checksum is wrong
    frame = ethernet + ip + struct.pack(">HHHH", 9, 9, 8, 0)
    with namespace.capture(name, tmp_path / "capture") as capture:
        os.write(tap, bytes(10) + frame)
    os.close(tap)
    assert len(tshark(capture)) == 1
    assert len(malformed(capture)) == 1
    assert namespace.statistics(name)["rx"]["packets"] == 1


def test_it_ends_with_its_processes_and_interfaces() -> None:
    with Namespace() as namespace:
        namespace.tap()
        sleeper = namespace.popen("sleep", "1000")
    assert sleeper.returncode == -9
