"""`crackle run --net`: what it makes on the host lasts as long as the guest, however that ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.api.conftest import REAL, Vmm

from support.network import Namespace

COMMAND = (sys.executable, "-m", "crackle.cli.main")


def start(host: Namespace, guests: Path, *arguments: str, guest: str = "idle") -> subprocess.Popen[Any]:
    """A guest that has begun to run: its TAP is open."""
    command = [*COMMAND, "run", "--kernel", guests / f"{guest}.elf", "--memory", "32", "--net", *arguments]
    process = host.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not any(link["ifname"] == "crackle-2" and link["operstate"] == "UP" for link in host.show()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, host.ip("link")
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_guest_and_its_network(
    guests: Path, namespace: Namespace, number: signal.Signals
) -> None:
    before = namespace.state()
    process = start(namespace, guests, "--name", "web")
    listed = namespace.run(*COMMAND, "net", "ls").stdout
    assert f"10.213.0.2\tweb\t# crackle-2, process {process.pid}\n" in listed
    process.send_signal(number)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert namespace.state() == before


def test_what_is_opened_for_a_run_is_shown_and_ends_with_it(guests: Path, namespace: Namespace) -> None:
    before = namespace.state()
    process = start(namespace, guests, "--allow-host", "--allow-lan", "--allow", "203.0.113.0/24")
    listed = namespace.run(*COMMAND, "net", "ls").stdout
    assert f"crackle-2, may reach the host, may reach the LAN, process {process.pid}\n" in listed
    assert (
        "203.0.113.0/24"
        in namespace.run("nft", "list", "set", "ip", "crackle-crackle", "wide-10.213.0.2").stdout
    )
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    assert namespace.state() == before


def test_the_networks_end_comes_with_the_guests(guests: Path, namespace: Namespace) -> None:
    before = namespace.state()
    command = [*COMMAND, "run", "--kernel", guests / "hello.elf", "--memory", "32", "--net"]
    assert namespace.run(*command).returncode == 0
    assert namespace.state() == before


def test_after_a_kill_the_next_use_takes_down_what_was_left(guests: Path, namespace: Namespace) -> None:
    before = namespace.state()
    process = start(namespace, guests)
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}/exe").exists():  # it is told when its parent dies
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert namespace.state() != before
    assert namespace.run(*COMMAND, "net", "ls").stdout == ""
    assert namespace.state() == before


def test_what_cannot_be_is_said_in_one_sentence_and_makes_nothing(
    guests: Path, namespace: Namespace, tmp_path: Path
) -> None:
    before = namespace.state()
    run = ["run", "--kernel", os.fspath(guests / "idle.elf"), "--memory", "32"]
    missing = ["run", "--kernel", os.fspath(tmp_path / "none"), "--net"]
    for reason, arguments in (
        ("cannot be called 'No Name'", [*run, "--net", "--name", "No Name"]),
        ("cannot be called 'x-y'", [*run, "--net", "--network", "x-y"]),
        ("give --net as well", [*run, "--name", "web"]),
        ("give --net as well", [*run, "--allow", "10.0.0.0/8"]),
        ("'10.0.0.1/8' is not an IPv4 address or range", [*run, "--net", "--allow", "10.0.0.1/8"]),
        ("No such file", missing),
    ):
        done = namespace.run(*COMMAND, *arguments, check=False)
        assert done.returncode == 1
        assert reason in done.stdout
        assert done.stdout.count("\n") == 1
        assert namespace.state() == before


def test_what_crackle_net_add_prints_is_what_the_api_takes(
    guests: Path, namespace: Namespace, tmp_path: Path
) -> None:
    before = namespace.state()
    interface, _ = namespace.run(*COMMAND, "net", "add", "web").stdout.splitlines()
    with namespace.entered():
        server = Vmm(tmp_path, [], REAL)
    try:
        assert server.request("PUT", "/network-interfaces/eth0", json.loads(interface)).status == 204
        kernel = os.fspath(guests / "idle.elf")
        assert server.request("PUT", "/boot-source", {"kernel_image_path": kernel}).status == 204
        assert server.request("PUT", "/actions", {"action_type": "InstanceStart"}).status == 204
        refused = namespace.run(*COMMAND, "net", "down", check=False)
        assert refused.stdout == (
            "crackle: On the network crackle run web: end them first, or take it down with --force.\n"
        )
        # The microVM outlives its TAP device.
        namespace.run(*COMMAND, "net", "down", "--force")
        assert namespace.state() == before
        assert server.request("GET", "/").status == 200
    finally:
        server.end()
