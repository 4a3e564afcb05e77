"""`crackle run --net` with real guests: one flag gives them addresses, names, each other and the world."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import BOOT_ARGS, Guest

from support.network import Namespace

COMMAND = (sys.executable, "-m", "crackle.cli.main")


class Run:
    """A guest that `crackle run` runs, with its console on pipes."""

    def __init__(self, host: Namespace, *arguments: str | Path) -> None:
        self.process = host.popen(
            *COMMAND,
            "run",
            *arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._text = ""

    def expect(self, pattern: str, seconds: float = 180.0) -> re.Match[str]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self._text)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self._text!r}"
            if select.select([self.process.stdout], [], [], 0.2)[0]:
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, f"it has ended: {self._text!r}"
                self._text += data.decode(errors="replace").replace("\r", "")
        self._text = self._text[found.end() :]
        return found

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def wait_shell(self) -> None:
        self.expect("user space after .*\n")
        self.expect(" # ")
        self.type("stty -echo; PS1= PS2=; echo re''ady\n")
        self.expect("ready\n")

    def sh(self, command: str) -> str:
        self.type(f'{command}\necho "<$?>"\n')
        found = self.expect(r"(?s)(.*?)<(\d+)>\n")
        assert found[2] == "0", f"{command!r} ended with status {found[2]}: {found[1]}"
        return found[1].strip()


@pytest.mark.timeout(600)
def test_guests_reach_a_web_server_behind_the_host_and_each_other_where_that_is_open(
    boot: Callable[..., Guest],
    kernels: dict[str, Path],
    stock: dict[str, Path],
    images: dict[str, Path],
    namespaces: Callable[[], Namespace],
    tmp_path: Path,
) -> None:
    host, world = namespaces(), namespaces()
    host.veth(world, address="192.0.2.1/24", peer="192.0.2.2/24")
    host.ip("route add default via 192.0.2.2")
    for address in ("198.51.100.1", "169.254.169.254", "192.168.7.1"):
        world.ip(f"addr add {address}/32 dev lo")
    (tmp_path / "page").write_text("from far away")
    log = open(tmp_path / "log", "wb")  # noqa: SIM115
    server = [sys.executable, "-u", "-m", "http.server", "--bind", "0.0.0.0", "--directory", tmp_path, "80"]
    world.popen(*server, stdout=log, stderr=log)
    before = host.state()

    options = [
        "--rootfs",
        images["ext4"],
        "--read-only",
        "--memory",
        "192",
        "--boot-args",
        BOOT_ARGS,
        "--net",
    ]
    # The one kernel configures its interface itself; the other leaves that to the guest's user space.
    one = Run(host, *options, "--kernel", kernels["acpi"], "--name", "one", "--allow", "10.213.0.0/24")
    one.wait_shell()
    two = Run(host, *options, "--kernel", stock["vmlinux"], "--initrd", stock["initrd"], "--name", "two")
    two.wait_shell()
    assert "inet 10.213.0.2/24" in one.sh("ip addr show eth0")
    assert "inet 10.213.0.3/24" in two.sh("ip addr show eth0")
    assert one.sh("hostname") == "one"
    assert two.sh("hostname") == "two"
    assert " 0% packet loss" in one.sh("ping -c 2 10.213.0.3")
    two.sh("! ping -c 1 -W 2 10.213.0.2")  # that was opened for the other one
    world.wait_listening(80)
    for guest in (one, two):
        assert guest.sh("wget -q -O - http://198.51.100.1/page") == "from far away"
        for closed in ("169.254.169.254", "192.168.7.1", "192.0.2.2"):
            guest.sh(f"! wget -q -T 5 -O - http://{closed}/page")
    assert (tmp_path / "log").read_text().count("192.0.2.1 - - ") == 2  # the host's address, not the guests'

    one.type("reboot -f\n")
    assert one.process.wait(180) == 0
    assert "crackle-2" not in host.ip("link")
    two.process.send_signal(signal.SIGINT)
    assert two.process.wait(180) == 128 + signal.SIGTERM
    assert host.state() == before
    log.close()
