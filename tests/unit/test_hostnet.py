"""Networks for microVMs: what is made on the host, that packets pass as they should, and that nothing stays behind."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crackle.cli.net import attached
from crackle.errors import ConfigError
from crackle.hostnet import networks, nft, plan
from support.mounts import with_mounts
from support.network import Namespace

ME = os.getpid()


def set_forwarding(namespace: Namespace, value: int) -> None:
    namespace.switch("net/ipv4/ip_forward", value)


def open_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(
        tap, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x5002)
    )  # TUNSETIFF: TAP, NO_PI, VNET_HDR
    return tap


@pytest.fixture
def host(namespace: Namespace) -> Iterator[Namespace]:
    """A namespace that plays the host, and in which the test is."""
    set_forwarding(namespace, 0)
    with namespace.entered():
        yield namespace


def test_a_network_is_a_bridge_an_address_and_nat_and_goes_without_a_trace(host: Namespace) -> None:
    before = host.state()
    made, _ = networks.up()
    assert (made.name, str(made.mark.range)) == ("crackle", "10.213.0.0/24")
    link = next(link for link in host.show() if link["ifname"] == "crackle")
    assert link["linkinfo"]["info_kind"] == "bridge"
    assert "UP" in link["flags"]
    assert link["address"] == "02:c7:0a:d5:00:01"
    assert "10.213.0.1/24 brd 10.213.0.255" in host.ip("addr show crackle")
    assert (
        'ip saddr 10.213.0.0/24 oifname != "crackle" masquerade' in host.run("nft", "list", "ruleset").stdout
    )
    assert host.run("cat", "/proc/sys/net/ipv4/ip_forward").stdout == "1\n"
    networks.down()
    assert host.state() == before


def test_each_microvm_has_a_tap_on_the_bridge_an_address_and_a_name(host: Namespace) -> None:
    networks.up()
    one, two = networks.attach("web"), networks.attach(user=54321)
    assert (one.address, one.name, one.tap, one.mac) == (
        "10.213.0.2",
        "web",
        "crackle-2",
        "02:c7:0a:d5:00:02",
    )
    assert (two.address, two.name, two.tap) == ("10.213.0.3", "vm3", "crackle-3")
    tap = next(link for link in host.show() if link["ifname"] == two.tap)
    assert tap["master"] == "crackle"
    assert tap["linkinfo"]["info_data"]["user"] in ("54321", 54321)
    names = [member.mark.name for network in networks.networks() for member in network.members]
    assert names == ["web", "vm3"]
    networks.detach("web")
    assert networks.attach("db").address == "10.213.0.2"


def test_the_guests_kernel_is_told_all_it_needs() -> None:
    place = networks.Attachment(
        "n", "n-2", "web", "02:c7:0a:00:00:02", 1500, "10.0.0.2", "10.0.0.1", "255.255.255.0", ["9.9.9.9"]
    )
    assert place.boot_argument() == "ip=10.0.0.2::10.0.0.1:255.255.255.0:web:eth0:off:9.9.9.9"


def test_a_network_made_for_a_microvm_goes_with_the_last_one(host: Namespace) -> None:
    before = host.state()
    networks.attach("one", owner=ME)
    networks.attach("two", owner=ME)
    networks.detach("one", owner=ME)
    assert [network.name for network in networks.networks()] == ["crackle"]
    networks.detach("two", owner=ME)
    assert host.state() == before


def test_a_network_made_for_a_microvm_can_be_kept(host: Namespace) -> None:
    networks.attach("one", owner=ME)
    networks.up()
    networks.detach("one", owner=ME)
    assert [network.mark.automatic for network in networks.networks()] == [False]


def test_what_a_killed_process_left_is_cleared_at_the_next_use(host: Namespace) -> None:
    before = host.state()
    program = (
        "import os, time; from crackle.hostnet import networks;"
        "networks.attach('one', owner=os.getpid()); print('up', flush=True); time.sleep(1000)"
    )
    process = host.popen(sys.executable, "-c", program, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert networks.networks()[0].members[0].running
    process.kill()
    process.wait()
    assert host.state() != before
    assert networks.networks() == []
    assert host.state() == before


def test_a_tap_that_is_open_is_not_cleared_though_its_process_cannot_be_seen(host: Namespace) -> None:
    place = networks.attach("one", owner=1 << 22)
    tap = open_tap(place.tap)
    assert networks.networks()[0].members[0].running
    os.close(tap)
    assert networks.networks() == []


def test_a_network_in_use_is_taken_down_by_force_only(host: Namespace) -> None:
    before = host.state()
    networks.up()
    tap = open_tap(networks.attach("web").tap)
    networks.attach("idle")
    with pytest.raises(ConfigError, match="run web: end them first"):
        networks.down()
    networks.down(force=True)
    os.close(tap)
    assert host.state() == before


def test_two_networks_share_forwarding_until_the_last_goes(host: Namespace) -> None:
    before = host.state()
    networks.up("one")
    networks.up("two")
    networks.down("one")
    assert nft.forwards()
    networks.down("two")
    assert host.state() == before


def test_forwarding_stays_on_where_it_was_on_or_somebody_else_has_begun_to_use_it(host: Namespace) -> None:
    set_forwarding(host, 1)
    networks.up()
    networks.down()
    assert nft.forwards()
    set_forwarding(host, 0)
    networks.up()
    host.run("nft", "add table ip other; add chain ip other c { type filter hook forward priority 0; }")
    networks.down()
    assert nft.forwards()
    assert "other" in host.run("nft", "list", "ruleset").stdout


def test_a_range_in_use_is_not_taken(host: Namespace, namespaces: Callable[[], Namespace]) -> None:
    host.veth(namespaces(), address="10.213.0.77/25")
    assert str(networks.up()[0].mark.range) == "10.213.1.0/24"
    with pytest.raises(ConfigError, match=r"10\.213\.0\.0/20 is taken by 10\.213\.0\.0/25 \(veth\d+\)"):
        networks.up("big", plan.parse_range("10.213.0.0/20"))
    assert str(networks.up("small", plan.parse_range("10.9.0.0/30"))[0].mark.range) == "10.9.0.0/30"
    assert networks.attach("one", "small").address == "10.9.0.2"
    with pytest.raises(ConfigError, match=r"All 1 guests' addresses of 10\.9\.0\.0/30 are taken"):
        networks.attach("two", "small")


def test_names_that_are_taken_or_impossible_are_refused_and_nothing_is_made(host: Namespace) -> None:
    host.bridge("foreign")
    host.tap("other-2")
    networks.up("mine")
    networks.attach("web", "mine")
    before = host.state()
    for reason, call in (
        ("interface foreign already, which is not Crackle's", lambda: networks.up("foreign")),
        ("interface foreign already, which is not Crackle's", lambda: networks.attach("a", "foreign")),
        ("interface other-2 already, which is not Crackle's", lambda: networks.attach("a", "other")),
        ("network mine exists already, with 10.213.0.0/24", lambda: networks.up("mine", use_nat=False)),
        ("microVM called web on the network mine already", lambda: networks.attach("web", "mine")),
        ("cannot be called 'No_good'", lambda: networks.attach("No_good", "mine")),
        ("cannot be called 'a;b'", lambda: networks.up("a;b")),
        ("no network none", lambda: networks.down("none")),
        ("no microVM called web on the network none", lambda: networks.detach("web", "none")),
        ("no microVM called db on the network mine", lambda: networks.detach("db", "mine")),
    ):
        with pytest.raises(ConfigError, match=reason):
            call()
        assert host.state() == before


@pytest.mark.parametrize(
    "text", ["10.0.0.0/33", "10.0.0.1/24", "fe80::/64", "x", "10.0.0.0/31", "10.0.0.0/8"]
)
def test_a_bad_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="range"):
        plan.parse_range(text)


def test_a_failure_half_way_leaves_nothing(host: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = host.state()
    with monkeypatch.context() as patch:
        patch.setattr("crackle.hostnet.nft.shutil.which", lambda *_, **__: None)
        with pytest.raises(ConfigError, match="install the package nftables"):
            networks.attach("web")
    assert host.state() == before
    host.run("mkdir", "-p", "/dev/net")
    with monkeypatch.context() as patch:
        patch.setattr("crackle.hostnet.links.Links.add_tap", _fail)
        with pytest.raises(OSError, match="made up"):
            networks.attach("web")
    assert host.state() == before


def _fail(*_: object) -> None:
    raise OSError("made up")


def test_processes_at_the_same_time_get_different_addresses(host: Namespace) -> None:
    before = host.state()
    found: list[str] = []

    def join() -> None:
        with host.entered():
            found.append(networks.attach(owner=ME).address)

    threads = [threading.Thread(target=join) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [f"10.213.0.{number}" for number in range(2, 10)]
    networks.down(force=True)
    assert host.state() == before


def test_guests_reach_the_world_behind_the_host_and_the_world_does_not_reach_them(
    host: Namespace, namespaces: Callable[[], Namespace], tmp_path: Path
) -> None:
    world, guest = namespaces(), namespaces()
    _, there = host.veth(world, address="192.0.2.1/24", peer="192.0.2.2/24", mtu=1400)
    host.ip("route add default via 192.0.2.2")
    world.ip("route add 10.213.0.0/24 via 192.0.2.1")
    networks.up()
    assert networks.attach("web").mtu == 1400
    host.veth(guest, peer="10.213.0.100/24", bridge="crackle")
    guest.ip("route add default via 10.213.0.1")
    world.ip(f"addr add 198.51.100.1/24 dev {there}")
    with world.capture(there, tmp_path / "world") as capture:
        guest.run("ping", "-c", "1", "-W", "5", "198.51.100.1")
    assert world.run("ping", "-c", "1", "-W", "1", "10.213.0.100", check=False).returncode == 1
    seen = subprocess.run(
        ["tshark", "-n", "-r", capture, "-Y", "icmp", "-T", "fields", "-e", "ip.src"],
        capture_output=True,
        text=True,
    ).stdout.split()
    assert seen == ["192.0.2.1", "198.51.100.1"]


# -- the command ---------------------------------------------------------------------------------------------------


def crackle(
    host: Namespace, *arguments: str, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return host.run(*prefix, sys.executable, "-m", "crackle.cli.main", *arguments, check=False)


def test_the_command_makes_lists_and_removes(host: Namespace) -> None:
    before = host.state()
    assert (
        crackle(host, "net", "up", "lab", "--range", "10.7.0.0/24").stdout
        == "lab: 10.7.0.0/24, gateway 10.7.0.1\n"
    )
    added = crackle(host, "net", "add", "web", "--network", "lab").stdout.splitlines()
    assert '"host_dev_name":"lab-2","guest_mac":"02:c7:0a:07:00:02"' in added[0]
    assert added[1].startswith("ip=10.7.0.2::10.7.0.1:255.255.255.0:web:eth0:off")
    listed = crackle(host, "net", "ls").stdout
    assert listed == ("# lab: 10.7.0.0/24, gateway 10.7.0.1, NAT\n10.7.0.2\tweb\t# lab-2, not running\n")
    taken = crackle(host, "net", "add", "web", "--network", "lab")
    assert (taken.returncode, taken.stdout) == (
        1,
        "crackle: There is a microVM called web on the network lab already.\n",
    )
    assert crackle(host, "net", "down", "lab").returncode == 0
    assert host.state() == before


def test_making_a_network_twice_is_fine_and_other_settings_are_refused(host: Namespace) -> None:
    assert crackle(host, "net", "up", "lab").stdout == "lab: 10.213.0.0/24, gateway 10.213.0.1\n"
    before = host.state()
    again = crackle(host, "net", "up", "lab")
    assert (again.returncode, again.stdout) == (
        0,
        "lab: 10.213.0.0/24, gateway 10.213.0.1, there already\n",
    )
    for other in (["--no-nat"], ["--allow-lan"], ["--allow", "10.9.9.9"], ["--range", "10.214.0.0/24"]):
        done = crackle(host, "net", "up", "lab", *other)
        assert done.returncode == 1
        assert "The network lab exists already, with 10.213.0.0/24 and other settings" in done.stdout
    assert host.state() == before
    opened = ["--allow-host", "--allow", "203.0.113.0/24", "--allow", "10.9.9.9", "--allow", "10.9.9.8"]
    assert crackle(host, "net", "up", "open", *opened).returncode == 0
    assert "there already" in crackle(host, "net", "up", "open", *opened[:1], *reversed_pairs(opened)).stdout
    assert (
        "# open: 10.213.1.0/24, gateway 10.213.1.1, NAT, may reach the host\n"
        in crackle(host, "net", "ls").stdout
    )


def reversed_pairs(options: list[str]) -> list[str]:
    pairs = [options[n : n + 2] for n in range(1, len(options), 2)]
    return [word for pair in reversed(pairs) for word in pair]


def test_a_running_guests_tap_is_removed_by_force_only(host: Namespace) -> None:
    networks.up()
    tap = open_tap(networks.attach("web").tap)
    before = host.state()
    refused = crackle(host, "net", "remove", "web")
    assert refused.returncode == 1
    assert refused.stdout == (
        "crackle: The microVM web on the network crackle is running: end it first, or remove it with --force.\n"
    )
    assert host.state() == before
    assert crackle(host, "net", "remove", "web", "--force").returncode == 0
    assert "crackle-2" not in host.ip("link")
    os.close(tap)


@pytest.mark.parametrize(
    ("hide", "words"),
    [
        ("mount -t tmpfs none /dev/net", "There is no /dev/net/tun"),
        (
            "mount -t tmpfs none /dev/net; mknod -m 600 /dev/net/tun c 10 200; mount -o remount,nodev /dev/net",
            "Cannot open /dev/net/tun: Permission denied; give this user, or this container, the right",
        ),
        ("mount -t tmpfs none /proc", "Networks need /proc: cannot open /proc/thread-self/ns/net"),
    ],
)
def test_what_was_refused_is_named_and_nothing_is_made(host: Namespace, hide: str, words: str) -> None:
    before = host.state()
    command = [sys.executable, "-m", "crackle.cli.main", "net", "add", "web"]
    done = host.run(*with_mounts(hide), *command, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith(f"crackle: {words}")
    assert done.stdout.count("\n") == 1
    assert "CAP_NET_ADMIN" not in done.stdout
    assert host.state() == before


def test_without_permission_one_sentence_says_what_is_needed(host: Namespace) -> None:
    before = host.state()
    powerless = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    done = crackle(host, "net", "up", prefix=powerless)
    assert done.returncode == 1
    assert done.stdout.startswith("crackle: Changing the network needs CAP_NET_ADMIN: run as root")
    assert done.stdout.count("\n") == 1
    assert host.state() == before
    networks.up()
    assert crackle(host, "net", "ls", prefix=powerless).stdout.startswith("# crackle: 10.213.0.0/24")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_block_and_what_was_made_for_it(host: Namespace, number: signal.Signals) -> None:
    before = host.state()
    program = (
        "import time\nfrom crackle.cli.net import attached\n"
        "with attached('web', 'crackle'):\n print('up', flush=True)\n while True: time.sleep(0.05)"
    )
    process = host.popen(sys.executable, "-c", program, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert host.state() == before


def test_signals_at_any_moment_leave_nothing(host: Namespace) -> None:
    before = host.state()
    program = (
        "import os, sys, time\nfrom crackle.cli.net import attached\nfrom crackle.hostnet import networks\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "with attached('web', 'crackle'):\n pass\n"
    )
    for step in range(5):
        process = host.popen(
            sys.executable, "-c", program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(step * 0.025)
        process.terminate()
        process.wait(20)
        assert host.state() == before


def test_a_network_taken_down_by_force_is_not_missed_at_the_end(host: Namespace) -> None:
    before = host.state()
    with attached("web", "crackle") as place:
        networks.down(force=True)
        again = networks.attach("web")
        assert again.tap == place.tap
    assert [member.mark.name for network in networks.networks() for member in network.members] == ["web"]
    networks.detach("web")
    assert host.state() == before
