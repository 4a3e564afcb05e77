"""Busy Linux guests that are saved and go on again and again, everything in use each time: `make soak`."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.linux.conftest import Guest
from tests.linux.test_vsock import connect

from crackle import Drive, MicroVM, MmdsConfig, NetworkInterface, RateLimiter, TokenBucket
from support.network import Namespace

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3500)]

ROUNDS = int(os.environ.get("CRACKLE_SOAK_ROUNDS", "50"))
HOST, GUEST, MAC = "10.7.0.1", "10.7.0.2", "06:f0:0d:00:00:02"
MIB = 1 << 20
STREAMS = 200
LIMIT = RateLimiter(TokenBucket(MIB, 100), TokenBucket(400, 1000))
WRONG = "BUG:|lockup|stall|I/O error|Call Trace|EXT4-fs error|Oops"

# Each goes on by itself: a counter, a disk that is written and verified under a limit, a TCP server, a vsock server.
WORKLOADS = """\
(n=0; while :; do n=$((n+1)); echo $n > /run/n.new; mv /run/n.new /run/n; usleep 50000; done) &
(i=0; while fio --name=v --filename=/dev/vdb --rw=randrw --bsrange=512-32k --bs_unaligned=0 --direct=1 \
--ioengine=psync --thread --numjobs=2 --size=2m --offset_increment=2m --fsync=16 --verify=crc32c --verify_fatal=1 \
--do_verify=1 --randseed=$i > /run/fio.log 2>&1; do i=$((i+1)); echo $i > /run/verified; done; \
echo failed > /run/fio.failed) &
(while :; do nc -l -p 7 -e cat; done) &
(while :; do vsock sum 52 200; done) > /run/vsock.log 2>&1 &"""


class Place:
    """Where a microVM goes on: a directory, a network and file names of its own."""

    def __init__(self, number: int, root: Path, namespace: Namespace) -> None:
        self.directory = root / f"place{number}"
        self.directory.mkdir()
        self.disk = self.directory / "disk"
        self.vsock = str(self.directory / "v.sock")
        self.state = self.directory / "state"
        self.namespace = namespace
        self.tap = namespace.tap(f"tap{number}", address=f"{HOST}/24")

    def leave(self) -> None:
        """Make room for the next."""
        self.namespace.ip(f"link del {self.tap}")


@pytest.fixture
def streams() -> Iterator[list[socket.socket]]:
    """Connections that stay open while a snapshot is taken."""
    opened: list[socket.socket] = []
    yield opened
    for each in opened:
        each.close()


@pytest.mark.parametrize(("cpus", "memory"), [(1, 256), (2, 256), (4, 4608)])
def test_a_busy_guest_goes_on_through_a_chain_of_snapshots(
    boot: Callable[..., Guest],
    stock: dict[str, Path],
    tools: dict[str, object],
    namespaces: Callable[[], Namespace],
    streams: list[socket.socket],
    tmp_path: Path,
    cpus: int,
    memory: int,
) -> None:
    """Full and differential ones in turn, each in another directory and network, the disk under another path."""
    networks = namespaces(), namespaces()
    place = Place(0, tmp_path, networks[0])
    with open(place.disk, "wb") as disk:
        disk.truncate(8 * MIB)
    tools["memory"] = memory
    with place.namespace.entered():
        guest = boot(
            stock["vmlinux"],
            initrd=stock["initrd"],
            **tools,
            cpus=cpus,
            drives=[
                Drive("data", False, path_on_host=str(place.disk), io_engine="Async", rate_limiter=LIMIT)
            ],
            interfaces=[NetworkInterface("eth0", place.tap, MAC, tx_rate_limiter=LIMIT)],
            vsock=place.vsock,
            mmds=MmdsConfig(["eth0"], "V2"),
            metadata={"round": "none"},
            track_dirty_pages=True,
        ).wait_shell()
    vm = guest.vm
    guest.sh(f"set +m; ifconfig eth0 {GUEST} netmask 255.255.255.0 up; ip route add 169.254.169.254 dev eth0")
    guest.sh("head -c 3000000 /dev/urandom > /run/blob; md5sum /run/blob > /run/sums; echo 0 > /run/verified")
    for workload in WORKLOADS.replace("\\\n", "").splitlines():
        guest.sh(workload)
    counted = verified = 0
    saved = tmp_path / "memory"
    try:
        for number in range(1, ROUNDS + 1):
            until(guest, f"[ $(cat /run/n) -gt {counted} ]")
            for each in streams:
                each.close()
            streams[:] = opened(guest, place.vsock)
            vm.pause()
            place = moved(vm, place, Place(number, tmp_path, networks[number % 2]), saved, number)
            with place.namespace.entered():
                vm = MicroVM.restore(
                    place.state,
                    saved,
                    drives={"data": place.disk},
                    interfaces={"eth0": place.tap},
                    vsock=place.vsock,
                    metadata={"round": str(number)},
                    track_dirty_pages=True,
                    clock_realtime=True,
                )
            guest = Guest(vm)
            counted, before = int(guest.sh("cat /run/n")), counted
            assert counted >= before
            verified = checked(guest, place, number, cpus)
    finally:
        vm.stop()
    print(
        f"\n{cpus} vCPUs, {memory} MiB: {ROUNDS} rounds, counted to {counted}, disk verified {verified} times"
    )


def moved(vm: MicroVM, here: Place, there: Place, saved: Path, number: int) -> Place:
    """Save the guest, end it, and take its disk elsewhere."""
    differential = number % 2 == 0
    vm.snapshot(there.state, saved, differential=differential)
    vm.stop()
    os.rename(here.disk, there.disk)
    here.leave()
    return there


def checked(guest: Guest, place: Place, number: int, cpus: int) -> int:
    """Memory, disk, network, metadata, clock and processors; how often the disk has been verified."""
    guest.sh("md5sum -c /run/sums; [ ! -e /run/fio.failed ] || { cat /run/fio.log; false; }")
    # Since it went on: requests are answered, and what they read is what was written before.
    done = int(guest.sh("cat /run/verified"))
    if number % 10 == 0:
        until(guest, f"[ $(cat /run/verified) -gt {done} ]", 300)
    place.namespace.run("ping", "-c", "2", "-i", "0.2", GUEST)
    with place.namespace.socket() as echo:
        echo.settimeout(60)
        echo.connect((GUEST, 7))
        echo.sendall(b"still there?")
        assert echo.recv(100) == b"still there?"
    # A session is opened anew, and the document is the one that was given.
    guest.sh(
        "T=$(curl -s -X PUT -H 'X-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token)"
    )
    assert guest.sh('curl -s -H "X-metadata-token: $T" http://169.254.169.254/round') == str(number)
    assert guest.sh("nproc") == str(cpus)
    assert not guest.sh(f"dmesg | grep -E '{WRONG}' || true")
    assert abs(int(guest.sh("date +%s")) - time.time()) < 30
    return done


def opened(guest: Guest, path: str) -> list[socket.socket]:
    """Streams to the guest's vsock server, which starts anew when those before have ended."""
    deadline = time.monotonic() + 120
    tries: list[str] = []
    while True:
        streams: list[socket.socket] = []
        try:
            for _ in range(STREAMS):
                streams.append(connect(path, 52))
                streams[-1].sendall(bytes(100))
            return streams
        except (AssertionError, OSError) as error:
            tries.append(f"{len(streams)}, then {error!r:.80}")
            for each in streams:
                each.close()
            assert time.monotonic() < deadline, (
                f"the guest's server does not come back: {tries[:3]} ... {tries[-3:]}; {guest.vm.metrics()['vsock']}; "
                + guest.sh(
                    "tail -n 3 /run/vsock.log; ps | grep 'vsock su[m]'; cat /proc/$(pidof vsock)/wchan"
                )
            )
            time.sleep(0.2)


def until(guest: Guest, condition: str, timeout: float = 60.0) -> None:
    """Wait in the guest; its shell's own clock has nothing to do with it."""
    assert re.fullmatch(r"\[ .* \]", condition)
    guest.sh(f"until {condition}; do usleep 20000; done", timeout=timeout)
