"""The metadata service and a Linux guest: curl, sessions, a document larger than a window, and other traffic beside."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.linux.conftest import Guest

from crackle import MmdsConfig, NetworkInterface
from support.network import Namespace

Boot = Callable[..., Guest]

URL = "http://169.254.169.254"
BIG = "".join(str(number) for number in range(40_000))[:190_000]  # three windows of 64 KiB
DOCUMENT = {"latest": {"meta-data": {"ami-id": "ami-1", "tags": {"a": "b"}}}, "number": 5}


@pytest.fixture
def networked(boot: Boot, tools: dict[str, object], namespace: Namespace) -> Callable[..., Guest]:
    """Starts a guest with eth0 at 192.168.7.2, on a TAP whose host end has 192.168.7.1."""

    def start(**options: Any) -> Guest:
        namespace.tap("tap0", address="192.168.7.1/24")
        with namespace.entered():
            guest = boot(interfaces=[NetworkInterface("net0", "tap0")], **tools, **options)
        guest.wait_shell()
        guest.sh(
            "ip addr add 192.168.7.2/24 dev eth0; ip link set eth0 up; ip route add 169.254.169.254 dev eth0"
        )
        return guest

    return start


def test_a_guest_reads_its_metadata_in_version_1(networked: Callable[..., Guest]) -> None:
    guest = networked(mmds=MmdsConfig(["net0"]), metadata=DOCUMENT)
    assert guest.sh(f"wget -q -O - {URL}/") == "latest/\nnumber"
    answer = guest.sh(f"curl -s -H 'Accept: application/json' {URL}/latest/meta-data {URL}/number {URL}/none")
    assert answer == '{"ami-id":"ami-1","tags":{"a":"b"}}5Resource not found: /none.'
    # What the host changes, the guest sees.
    guest.vm.patch_metadata({"latest": {"meta-data": {"ami-id": "ami-2"}}})
    assert guest.sh(f"wget -q -O - {URL}/latest/meta-data/ami-id") == "ami-2"
    # The last connection's end may still be on its way.
    deadline = time.monotonic() + 30
    while (counters := guest.vm.metrics()["mmds"])["connections_destroyed"] < 3:
        assert time.monotonic() < deadline, counters
        time.sleep(0.1)
    assert counters["rx_no_token"] == 5
    assert counters["connections_created"] == 3
    assert counters["rx_accepted_err"] == counters["rx_bad_eth"] == counters["tx_errors"] == 0


def test_a_session_a_large_document_and_a_neighbour_that_is_not_disturbed(
    networked: Callable[..., Guest], namespace: Namespace
) -> None:
    guest = networked(metadata={"big": BIG}, metadata_limit=1 << 20)
    # Without job control, so that the shell does not tell of its end in the middle of something.
    guest.sh("set +m; ping -i 0.2 -c 15 192.168.7.1 > /tmp/pings &")
    assert guest.sh(f"curl -s {URL}/big").startswith("No MMDS token provided.")
    guest.sh(f"T=$(curl -s -X PUT -H 'X-metadata-token-ttl-seconds: 60' {URL}/latest/api/token)")
    answer = guest.sh(f'curl -s -H "X-metadata-token: $T" {URL}/big {URL}/big | sha256sum')
    assert answer.split()[0] == hashlib.sha256(2 * BIG.encode()).hexdigest()
    assert guest.sh(f"curl -s -H 'X-metadata-token: forged' {URL}/big") == "MMDS token not valid."
    assert " 0% packet loss" in guest.sh("wait; cat /tmp/pings")
    # Of what was meant for the service, the host's network saw nothing.
    assert "169.254.169.254" not in namespace.ip("neigh")
    counters = guest.vm.metrics()["mmds"]
    assert (counters["rx_no_token"], counters["rx_invalid_token"]) == (1, 1)
    assert counters["tx_bytes"] > 2 * len(BIG)
