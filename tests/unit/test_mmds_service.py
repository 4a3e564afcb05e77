"""The metadata service against Linux's own TCP, over a TAP device, whose messages are those of a wire."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crackle.mmds.packet import SYN
from crackle.mmds.service import Mmds
from crackle.mmds.state import MmdsState
from crackle.schema.mmds import MmdsConfig
from support.metadata import frame, store_of
from support.network import Namespace, malformed

# <linux/if_tun.h>
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
NO_OFFLOADS, CHECKSUM_AND_SEGMENTATION = 0, 0b0111

URL = "http://169.254.169.254"
BIG = "0123456789" * 30_000
DOCUMENT = {"foo": "bar", "latest": {"meta-data": {"ami-id": "ami-1"}}, "big": BIG}


def open_tap(namespace: Namespace, name: str, offloads: int) -> int:
    """A descriptor of a TAP with the offloads its kernel's side may leave to us."""
    with namespace.entered():
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", 12))
    fcntl.ioctl(fd, TUNSETOFFLOAD, offloads)
    return fd


@contextmanager
def service(wires: list[int], version: str = "V1", document: Any = DOCUMENT) -> Iterator[Mmds]:
    """A running service on these wires."""
    mmds = Mmds(MmdsConfig(["eth0"], version, "169.254.169.254"), store_of(document))  # type: ignore[arg-type]
    for wire in wires:
        mmds.take(wire)
    mmds.start()
    try:
        yield mmds
    finally:
        mmds.stop()


@pytest.fixture(params=[NO_OFFLOADS, CHECKSUM_AND_SEGMENTATION], ids=["plain", "offloads"])
def tap(request: pytest.FixtureRequest, namespace: Namespace) -> int:
    name = namespace.tap("tap0", address="169.254.1.1/16")
    return open_tap(namespace, name, request.param)


def curl(namespace: Namespace, *arguments: str) -> str:
    return namespace.run("curl", "--no-progress-meter", "--max-time", "20", *arguments).stdout


def test_curl_reads_the_document(namespace: Namespace, tap: int, tmp_path: Path) -> None:
    with service([tap]) as mmds:
        with namespace.capture("tap0", tmp_path / "capture.pcapng") as capture:
            assert curl(namespace, f"{URL}/foo") == "bar"
            assert curl(namespace, f"{URL}/latest/", f"{URL}/latest/meta-data/ami-id") == "meta-data/ami-1"
            answer = curl(namespace, "-H", "Accept: application/json", f"{URL}/latest")
            assert msgspec.json.decode(answer) == DOCUMENT["latest"]
            assert curl(namespace, f"{URL}/big") == BIG
            # Its kernel sends on its own: what is not read in time waits for its window.
            assert curl(namespace, "--limit-rate", "2M", f"{URL}/big") == BIG
        wait_for(lambda: mmds.counters()["connections_destroyed"] == 5)
        counters = mmds.counters()
        assert counters["connections_created"] == counters["connections_destroyed"] == 5
        assert counters["tx_bytes"] > 2 * len(BIG)
        assert counters["tx_frames"] == counters["tx_count"]
        assert counters["tx_errors"] == counters["rx_accepted_err"] == counters["rx_bad_eth"] == 0
    # With offloads, checksums of what the kernel sends are not there yet when it is recorded.
    theirs = [line for line in malformed(capture) if "169.254.169.254 \u2192" not in line]
    ours = [line for line in malformed(capture) if line not in theirs]
    assert ours == []


def test_a_session_of_version_2(namespace: Namespace, tap: int) -> None:
    with service([tap], "V2") as mmds:
        token = curl(
            namespace, "-X", "PUT", "-H", "X-metadata-token-ttl-seconds: 60", f"{URL}/latest/api/token"
        )
        assert curl(namespace, "-H", f"X-metadata-token: {token}", f"{URL}/foo") == "bar"
        assert curl(namespace, f"{URL}/foo").startswith("No MMDS token provided.")
        assert curl(namespace, "-H", "X-metadata-token: x", f"{URL}/foo") == "MMDS token not valid."
        assert mmds.counters()["rx_no_token"] == mmds.counters()["rx_invalid_token"] == 1


def test_a_request_with_a_body_is_told_off_and_hangs_nothing(namespace: Namespace, tap: int) -> None:
    body = ["-X", "GET", "-H", "Content-Length: 100", "-d", "some body"]
    with service([tap]):
        assert curl(namespace, *body, f"{URL}/") == "Invalid request."
        assert curl(namespace, f"{URL}/foo") == "bar"


def test_many_clients_at_once(namespace: Namespace, tap: int) -> None:
    with service([tap]):
        urls = [f"{URL}/big"] * 20
        answers = curl(namespace, "--parallel", "--parallel-immediate", "--parallel-max", "20", *urls)
        # They arrive in turns.
        assert [answers.count(digit) for digit in "0123456789"] == [20 * 30_000] * 10


def test_a_client_that_goes_on_after_closing_its_side(namespace: Namespace, tap: int) -> None:
    with service([tap]), namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        client.connect(("169.254.169.254", 80))
        client.sendall(b"GET /big HTTP/1.1\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        received = b""
        while data := client.recv(1 << 16):
            received += data
        assert received.endswith(BIG.encode())


def test_ports_that_nobody_serves_are_refused_at_once(namespace: Namespace, tap: int) -> None:
    with service([tap]), namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        with pytest.raises(ConnectionRefusedError):
            client.connect(("169.254.169.254", 81))


# -- the thread, on a wire of its own ------------------------------------------------------------------------------


def wire(room: int = 1 << 17) -> tuple[socket.socket, int]:
    """The device's end of a wire, and the service's, which holds `room` bytes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
    theirs.setblocking(False)
    ours.settimeout(10)
    return ours, theirs.detach()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def thread_called(name: str) -> Path | None:
    """Where /proc tells of this process's thread of that name, if there is one."""
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):
            if (task / "comm").read_text().strip() == name:
                return task
    return None


def switches(name: str) -> int:
    """How often the thread called `name` has been woken."""
    task = thread_called(name)
    assert task is not None
    status = (task / "status").read_text()
    return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)


def test_it_serves_every_interface_and_sleeps_when_nobody_asks() -> None:
    first, second = wire(), wire()
    with service([first[1], second[1]]) as mmds:
        for device, _ in (first, second):
            device.send(frame(SYN))
            assert device.recv(1 << 17)[47 + 12] == 0x12
        assert mmds.counters()["connections_created"] == 2
        for device, _ in (first, second):
            device.send(frame(0x14, 1))  # reset
        wait_for(lambda: mmds.counters()["connections_destroyed"] == 2)
        before = switches("mmds")
        time.sleep(0.5)
        assert switches("mmds") == before


def test_a_wire_that_is_full_loses_nothing() -> None:
    device, fd = wire(room=1)
    ports = range(1000, 1090)
    with service([fd]) as mmds:
        # Nobody reads, and after a few the wire takes no more.
        for port in ports:
            device.send(frame(SYN, port=port, to=81))
        wait_for(lambda: mmds.counters()["rx_count"] == len(ports))
        assert mmds.counters()["tx_count"] < len(ports) // 2
        answers = [device.recv(1 << 17) for _ in ports]
        assert [int.from_bytes(answer[12 + 36 : 12 + 38], "big") for answer in answers] == list(ports)
        assert mmds.counters()["tx_errors"] == 0


def test_while_the_microvm_is_paused_nothing_is_sent_again_and_nobody_wakes() -> None:
    device, fd = wire()
    with service([fd]) as mmds:
        device.send(frame(SYN))
        first = device.recv(1 << 17)
        assert device.recv(1 << 17) == first  # after 0.2 s
        mmds._clock.pause()
        time.sleep(0.6)  # the wait that had begun may end yet
        before = switches("mmds")
        time.sleep(0.5)
        assert switches("mmds") == before
        device.setblocking(False)
        with pytest.raises(BlockingIOError):
            device.recv(1 << 17)
        device.settimeout(10)
        mmds._clock.resume()
        mmds.resume()
        assert device.recv(1 << 17) == first


def test_an_error_that_nobody_foresaw_ends_connections_and_not_the_service(
    namespace: Namespace, tap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service([tap]) as mmds:
        with monkeypatch.context() as patch:
            patch.setattr("crackle.mmds.stack.Stack.transmit", lambda _stack, _now: 1 / 0)
            refused = namespace.run("curl", "--max-time", "1", f"{URL}/foo", check=False)
            assert refused.returncode == 28  # no answer
        assert mmds.counters()["tx_errors"] > 0
        assert curl(namespace, f"{URL}/foo") == "bar"


def test_an_interface_that_goes_away_takes_nothing_with_it() -> None:
    gone, stays = wire(), wire()
    with service([gone[1], stays[1]]):
        gone[0].close()
        stays[0].send(frame(SYN))
        assert stays[0].recv(1 << 17)


def test_stopping_leaves_no_thread_and_no_descriptor() -> None:
    device, fd = wire()
    with service([fd]) as mmds:
        device.send(frame(SYN))
        device.recv(1 << 17)
        assert thread_called("mmds") is not None
    mmds.stop()
    assert device.recv(100) == b""
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    wait_for(lambda: thread_called("mmds") is None)


def test_what_it_saves_says_how_to_set_it_up_again_and_no_data() -> None:
    config = MmdsConfig(["eth0", "eth1"], "V2", "169.254.170.2", True)
    mmds = Mmds(config, store_of({"secret": "value"}))
    state = mmds.save()
    mmds.stop()
    assert msgspec.json.decode(msgspec.json.encode(state), type=MmdsState).config() == config
    assert b"value" not in msgspec.json.encode(state)
