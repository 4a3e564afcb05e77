"""The tools that tests of networks and disks use in guests work there."""

from __future__ import annotations

from collections.abc import Callable

from tests.linux.conftest import Guest


def test_the_tools_disk_has_what_tests_of_networks_and_disks_use(
    boot: Callable[..., Guest], tools: dict[str, object]
) -> None:
    guest = boot(**tools).wait_shell()
    guest.sh("echo found > /tmp/file; httpd -p 127.0.0.1:80 -h /tmp")
    assert guest.sh("curl -s http://127.0.0.1/file") == "found"
    guest.sh("iperf3 -s -D && sleep 1; iperf3 -c 127.0.0.1 -n 1M")
    assert "err= 0" in guest.sh(
        "fio --name=x --filename=/tmp/disk --size=256k --rw=randwrite --verify=crc32c"
    )
    assert "lo" in guest.sh("ethtool -k lo")
