"""`crackle cni`, called as a runtime calls it, after Debian's plugins, in network namespaces of the test's own."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crackle.hostnet import cni
from support.network import Namespace, may_make_namespaces

pytestmark = pytest.mark.skipif(not may_make_namespaces(), reason="network namespaces need root")

PLUGINS = Path("/usr/lib/cni")
ROOT = Path(__file__).resolve().parents[2]
OURS = (sys.executable, "-m", "crackle.hostnet.cni")
GATEWAY = "10.88.0.1"
CONTAINER = "vm-1"


@pytest.fixture
def namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """The host's, and the microVM's."""
    with Namespace() as host, Namespace() as inner:
        yield host, inner


class Runtime:
    """Calls plugins, as the specification says (section 2, "CNI operations")."""

    def __init__(self, host: Namespace, inner: Namespace, data: Path, version: str = "1.0.0") -> None:
        self.host, self.inner, self.version = host, inner, version
        self.ipam = {"type": "host-local", "subnet": "10.88.0.0/24", "dataDir": str(data)}
        self.environment = {
            "CNI_CONTAINERID": CONTAINER,
            "CNI_NETNS": inner.path,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(PLUGINS),
        }

    def call(self, command: str, plugin: tuple[str, ...], **config: Any) -> tuple[int, Any]:
        """The exit status, and what it said."""
        done = subprocess.run(
            self.host.command(*plugin),
            env=os.environ | self.environment | {"CNI_COMMAND": command},
            input=json.dumps({"cniVersion": self.version, "name": "net", "type": "x"} | config),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not done.stderr
        return done.returncode, json.loads(done.stdout) if done.stdout else None

    def first(self, plugin: str, command: str = "ADD", **config: Any) -> Any:
        """Of one of Debian's, the result."""
        status, result = self.call(command, (str(PLUGINS / plugin),), **{"ipam": self.ipam} | config)
        assert status == 0, result
        return result

    def ours(self, command: str, previous: Any, **config: Any) -> tuple[int, Any]:
        return self.call(command, OURS, **({} if previous is None else {"prevResult": previous}), **config)


@pytest.fixture
def runtime(namespaces: tuple[Namespace, Namespace], tmp_path: Path) -> Runtime:
    return Runtime(*namespaces, tmp_path)


def answered(inner: Namespace, tap: str, mac: str, address: str) -> bool:
    """Whether the gateway answers a guest at the TAP device, with that MAC and address, who asks for it by ARP."""
    own = bytes.fromhex(mac.replace(":", ""))
    with inner.entered():
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", tap.encode(), 0x1002))  # TUNSETIFF: TAP, NO_PI
    try:
        asked = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + own + socket.inet_aton(address) + bytes(6)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            os.write(fd, b"\xff" * 6 + own + b"\x08\x06" + asked + socket.inet_aton(GATEWAY))
            time.sleep(0.05)
            try:
                while frame := os.read(fd, 2048):
                    if (
                        frame[:6] == own
                        and frame[12:14] == b"\x08\x06"
                        and frame[28:32] == socket.inet_aton(GATEWAY)
                    ):
                        return True
            except BlockingIOError:
                continue
    finally:
        os.close(fd)
    return False


def taps(inner: Namespace) -> list[str]:
    return [link["ifname"] for link in inner.show() if link.get("linkinfo", {}).get("info_kind") == "tun"]


@pytest.mark.parametrize(
    ("plugin", "version", "config"),
    [
        ("bridge", "1.0.0", {"bridge": "cni0", "isGateway": True, "mtu": 1400}),
        ("ptp", "0.3.1", {"mtu": 1450}),
    ],
)
def test_a_guest_has_the_interface_that_another_plugin_made(
    namespaces: tuple[Namespace, Namespace], tmp_path: Path, plugin: str, version: str, config: dict[str, Any]
) -> None:
    host, inner = namespaces
    runtime = Runtime(host, inner, tmp_path, version)
    runtime.environment["CNI_ARGS"] = "IgnoreUnknown=1;TC_REDIRECT_TAP_UID=1234;TC_REDIRECT_TAP_GID=2345"
    before = runtime.first(plugin, **config)
    status, result = runtime.ours("ADD", before)
    assert status == 0, result
    # What went before stays; behind it the TAP device, and the guest's own interface.
    assert result["cniVersion"] == version
    assert result["interfaces"][:-2] == before["interfaces"]
    tap, guest = result["interfaces"][-2:]
    assert tap["sandbox"] == inner.path
    assert guest["sandbox"] == CONTAINER
    assert guest["name"] == tap["name"] == "tap0"
    replaced = next(each for each in before["interfaces"] if each["name"] == "eth0")
    assert guest["mac"] == replaced["mac"] != tap["mac"]
    (address,) = [each for each in result["ips"] if each.get("interface") == len(result["interfaces"]) - 1]
    assert address["address"] == before["ips"][0]["address"]
    assert result.get("routes") == before.get("routes")
    link = next(each for each in inner.show() if each["ifname"] == "tap0")
    assert link["mtu"] == config["mtu"]
    data = link["linkinfo"]["info_data"]
    assert (str(data["user"]), str(data["group"])) == ("1234", "2345")
    assert runtime.ours("CHECK", result) == (0, None)
    assert answered(inner, "tap0", guest["mac"], address["address"].partition("/")[0])
    # Gone, and gone again; then what went before.
    for _ in range(2):
        assert runtime.ours("DEL", result) == (0, None)
    assert not taps(inner)
    assert "ingress" not in inner.run("tc", "qdisc", "show", "dev", "eth0").stdout
    runtime.first(plugin, "DEL", **config)


def test_the_list_of_plugins_in_the_documents(runtime: Runtime) -> None:
    text = (ROOT / "docs" / "network.md").read_text()
    plugins = json.loads(text.partition("```json\n")[2].partition("```")[0])["plugins"]
    assert [plugin["type"] for plugin in plugins] == ["ptp", "crackle-cni"]
    runtime.ipam |= plugins[0].pop("ipam")
    plugins[0].pop("ipMasq")  # by iptables
    result = runtime.first("ptp", **plugins[0])
    status, result = runtime.ours("ADD", result, **plugins[1])
    assert status == 0
    assert result["ips"][-1]["address"] == "192.168.127.2/24"
    (tap,) = [link for link in runtime.inner.show() if link["ifname"] == "tap0"]
    assert str(tap["linkinfo"]["info_data"]["user"]) == "1001"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("ip link set tap0 mtu 1300", "the MTU of tap0 is 1300, and that of eth0 1500"),
        ("ip link set tap0 alias other", "the TAP device tap0 of vm-1 is not there"),
        ("ip link del tap0", "the TAP device tap0 of vm-1 is not there"),
        ("tc qdisc del dev eth0 ingress", "tap0 is not in the place of eth0"),
        ("tc qdisc del dev tap0 ingress", "tap0 is not in the place of eth0"),
        ("ip link del eth0", "there is no interface eth0"),
    ],
)
def test_a_check_finds_what_is_no_more_as_it_was(runtime: Runtime, change: str, sentence: str) -> None:
    status, result = runtime.ours("ADD", runtime.first("ptp"))
    assert (status, runtime.ours("CHECK", result)) == (0, (0, None))
    runtime.inner.run(*change.split())
    status, told = runtime.ours("CHECK", result)
    assert (status, told["code"]) == (1, 100)
    assert sentence in told["msg"]


def test_two_microvms_and_a_name_of_choice(runtime: Runtime) -> None:
    before = runtime.first("ptp")
    runtime.environment["CNI_ARGS"] = "TC_REDIRECT_TAP_NAME=mine"
    status, result = runtime.ours("ADD", before, uid=77)
    assert status == 0
    assert result["interfaces"][-1]["name"] == "mine"
    status, told = runtime.ours("ADD", before)
    assert (status, told["msg"]) == (1, "eth0 of vm-1 has a TAP device already")
    runtime.environment["CNI_CONTAINERID"] = "vm-2"
    status, told = runtime.ours("ADD", before)
    assert (status, told["msg"]) == (1, "there is an interface mine already")
    # Nothing of the refused ones is there, and nothing of the first is gone.
    assert taps(runtime.inner) == ["mine"]
    runtime.environment["CNI_ARGS"] = ""
    status, told = runtime.ours("ADD", before)
    assert status == 1
    assert "is redirected already" in told["msg"]
    assert taps(runtime.inner) == ["mine"]
    runtime.environment["CNI_CONTAINERID"] = CONTAINER
    assert runtime.ours("CHECK", result)[0] == 0


ENVIRONMENT = {"CNI_CONTAINERID": CONTAINER, "CNI_NETNS": "/proc/self/ns/net", "CNI_IFNAME": "eth0"}
NONE: dict[str, Any] = {"interfaces": [], "ips": []}


@pytest.mark.parametrize(
    ("change", "command", "previous", "code", "sentence"),
    [
        ({}, "ADD", None, 7, "there is no prevResult: another plugin has to make the interface first"),
        ({}, "ADD", NONE, 7, "prevResult has no interface eth0 in /proc/self/ns/net"),
        ({}, "ADD", {"interfaces": 3}, 7, "the interfaces of prevResult are no list"),
        ({}, "ADD", 3, 7, "prevResult is no JSON object"),
        ({}, "CHECK", NONE, 7, "prevResult has no interface of the microVM vm-1"),
        ({}, "FROB", NONE, 4, "CNI_COMMAND is 'FROB', which is none of ADD, CHECK, DEL, VERSION"),
        ({"CNI_CONTAINERID": "a/b"}, "ADD", NONE, 4, "CNI_CONTAINERID is 'a/b', which is no name"),
        ({"CNI_IFNAME": "x" * 16}, "DEL", NONE, 4, "CNI_IFNAME is 'xxxxxxxxxxxxxxxx', which is no name"),
        ({"CNI_NETNS": ""}, "ADD", NONE, 4, "CNI_NETNS is not set"),
        ({"CNI_ARGS": "nonsense"}, "ADD", NONE, 4, "CNI_ARGS has 'nonsense', which is no NAME=VALUE"),
        ({"CNI_ARGS": "TC_REDIRECT_TAP_UID=me"}, "ADD", NONE, 7, "uid is 'me', which is no number of a uid"),
        ({"CNI_ARGS": "TC_REDIRECT_TAP_NAME=a b"}, "ADD", NONE, 4, "which is no name of an interface"),
    ],
)
def test_a_call_that_cannot_be_meant_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    command: str,
    previous: Any,
    code: int,
    sentence: str,
) -> None:
    config = {"cniVersion": "1.0.0", "name": "net", "type": "x"}
    if previous is not None:
        config["prevResult"] = previous
    environment = {**ENVIRONMENT, "CNI_COMMAND": command, **change}
    assert cni.run(environment, json.dumps(config).encode()) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["code"], told["cniVersion"]) == (code, "1.0.0")
    assert sentence in told["msg"]


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_configuration_that_is_no_json(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert cni.run({**ENVIRONMENT, "CNI_COMMAND": "ADD"}, text.encode("latin-1")) == 1
    assert json.loads(capsys.readouterr().out)["code"] == 6


def test_a_namespace_that_is_none(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    previous = {"interfaces": [{"name": "eth0", "sandbox": str(tmp_path / "file")}]}
    runtime.environment["CNI_NETNS"] = str(tmp_path / "file")
    status, told = runtime.ours("ADD", previous)
    assert (status, told["code"]) == (1, 4)
    assert "is no network namespace to join" in told["msg"]
    runtime.environment["CNI_NETNS"] = str(tmp_path / "none")
    assert runtime.ours("DEL", previous) == (0, None)


def test_versions(runtime: Runtime) -> None:
    status, told = runtime.ours("VERSION", None)
    assert status == 0
    assert told == {"cniVersion": "1.0.0", "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0"]}
    runtime.version = "0.2.0"
    status, told = runtime.ours("ADD", NONE)
    assert (status, told["code"]) == (1, 1)
    assert "CNI 0.2.0 is not supported" in told["msg"]
