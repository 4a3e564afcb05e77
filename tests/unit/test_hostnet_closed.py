"""What guests of `crackle net` reach: the world, and of the rest only what was opened; with real TAP devices."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from crackle.errors import ConfigError
from crackle.hostnet import host as this_host
from crackle.hostnet import networks, nft, plan
from crackle.hostnet.plan import Openings
from support.network import Namespace, wired

WORLD, METADATA, WIRE_SERVER, DIRECT = "198.51.100.1", "169.254.169.254", "168.63.129.16", "192.0.2.2"
LAN = ["10.99.0.1", "172.20.0.1", "192.168.7.1", "100.64.3.1", "198.18.0.1"]
HOST = ["10.213.0.1", "192.0.2.1", "203.0.113.7"]
BEYOND = [WORLD, METADATA, WIRE_SERVER, *LAN]
EVERYTHING = [*BEYOND, DIRECT, *HOST]


class Site:
    """A host with a world behind it, where every address answers on every port; guests are joined to it one by one."""

    def __init__(self, host: Namespace, world: Namespace, stack: ExitStack) -> None:
        self.host, self.world, self._stack = host, world, stack
        host.veth(world, address="192.0.2.1/24", peer=f"{DIRECT}/24")
        host.ip(f"route add default via {DIRECT}")
        host.ip("addr add 203.0.113.7/32 dev lo")
        for address in BEYOND:
            world.ip(f"addr add {address}/32 dev lo")
        self._listeners = [listening(where, port) for where in (host, world) for port in (53, 80)]

    def guest(self, guest: Namespace, openings: Openings = Openings()) -> networks.Attachment:  # noqa: B008
        """A guest on the network "crackle"."""
        place = networks.attach(openings=openings)
        self._stack.enter_context(wired(self.host, place.tap, guest, place.mac, f"{place.address}/24"))
        return place

    def close(self) -> None:
        for each in self._listeners:
            each.close()


def listening(where: Namespace, port: int = 80, address: str = "") -> socket.socket:
    listener = where.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen()
    return listener


def reaches(guest: Namespace, address: str, port: int = 80) -> bool:
    """Whether a connection is made. What is closed says so, or nothing; it is not the other end that refuses."""
    with guest.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(2)
        try:
            result = client.connect_ex((address, port))
        except TimeoutError:
            result = errno.EAGAIN
    assert result in (0, errno.EAGAIN, errno.EHOSTUNREACH, errno.ENETUNREACH), os.strerror(result)
    return result == 0


def open_ones(guest: Namespace, addresses: list[str] = EVERYTHING) -> set[str]:
    return {address for address in addresses if reaches(guest, address)}


@pytest.fixture(autouse=True)
def resolv_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The host's resolv.conf, which names nobody at first."""
    file = tmp_path / "resolv.conf"
    monkeypatch.setattr(this_host, "_RESOLVERS", (os.fspath(file),))
    return file


@pytest.fixture
def site(namespaces: Callable[[], Namespace]) -> Iterator[Site]:
    """The test is in the host's namespace."""
    host, world = namespaces(), namespaces()
    with host.entered(), ExitStack() as stack:
        site = Site(host, world, stack)
        stack.callback(site.close)
        yield site


def test_a_guest_reaches_the_world_and_nothing_else(site: Site, namespaces: Callable[[], Namespace]) -> None:
    one, two = namespaces(), namespaces()
    networks.up()
    site.guest(one)
    neighbour = site.guest(two).address
    listener = listening(two)
    assert open_ones(one, [*EVERYTHING, neighbour]) == {WORLD}
    with pytest.raises(AssertionError, match="Packet filtered"):
        one.run("ping", "-c", "1", "-W", "1", HOST[0])
    # The host itself reaches its guests, whose answers come back.
    assert reaches(site.host, neighbour)
    listener.close()


@pytest.mark.parametrize(
    ("openings", "opened"),
    [
        (Openings(host=True), set(HOST)),
        (Openings(lan=True), {*LAN, DIRECT}),
        (Openings(ranges=(IPv4Network("192.168.0.0/16"), IPv4Network("10.99.0.1"))), {LAN[2], LAN[0]}),
        (Openings(ranges=(IPv4Network("169.254.169.254"),)), {METADATA}),
        (Openings(ranges=(IPv4Network("169.254.169.0/24"),)), {METADATA}),
        (Openings(ranges=(IPv4Network("192.0.2.1"),)), {HOST[1]}),
        # A wide range opens the LAN within, and neither the host, nor metadata, nor neighbours.
        (Openings(ranges=(IPv4Network("0.0.0.0/0"),)), {*LAN, DIRECT}),
    ],
    ids=["host", "lan", "ranges", "metadata", "metadata-range", "one-of-the-hosts", "all"],
)
def test_what_is_opened_is_open_and_nothing_else(
    site: Site, namespaces: Callable[[], Namespace], openings: Openings, opened: set[str]
) -> None:
    guest, other = namespaces(), namespaces()
    site.guest(guest, openings)
    neighbour = site.guest(other).address
    listener = listening(other)
    assert open_ones(guest, [*EVERYTHING, neighbour]) == {WORLD} | opened
    # It was opened for that guest alone, and stays as it is when others come.
    assert open_ones(other, [LAN[0], METADATA, *HOST]) == set()
    listener.close()


def test_the_hosts_services_are_not_its_loopback_and_not_metadata_that_it_serves(
    site: Site, namespaces: Callable[[], Namespace]
) -> None:
    guest = namespaces()
    site.host.ip(f"addr add {METADATA}/32 dev lo")
    site.guest(guest, Openings(host=True))
    site.host.switch("net/ipv4/conf/crackle/route_localnet", 1)
    guest.ip("addr del 127.0.0.1/8 dev lo")
    guest.ip("route add 127.0.0.0/8 via 10.213.0.1")
    assert open_ones(guest, [*HOST, METADATA, "127.0.0.1"]) == set(HOST)


def test_what_is_opened_for_a_network_is_open_for_all_on_it(
    site: Site, namespaces: Callable[[], Namespace]
) -> None:
    one, two = namespaces(), namespaces()
    networks.up(openings=Openings(True, False, (IPv4Network("192.168.7.0/24"), IPv4Network(METADATA))))
    site.guest(one)
    site.guest(two, Openings(lan=True))
    assert open_ones(one) == {WORLD, METADATA, LAN[2], *HOST}
    assert open_ones(two) == {WORLD, METADATA, *LAN, DIRECT, *HOST}


@pytest.mark.parametrize("calls_iptables", [0, 1])
@pytest.mark.parametrize("nat", [True, False])
def test_neighbours_are_open_where_the_networks_own_range_is_named(
    site: Site, namespaces: Callable[[], Namespace], calls_iptables: int, nat: bool
) -> None:
    site.host.switch("net/bridge/bridge-nf-call-iptables", calls_iptables)
    one, two, three = namespaces(), namespaces(), namespaces()
    networks.up(use_nat=nat)
    named = site.guest(one).address
    site.guest(two, Openings(ranges=(IPv4Network(named),)))
    last = site.guest(three, Openings(ranges=(IPv4Network("10.213.0.0/24"),))).address
    listeners = [listening(each) for each in (one, two, three)]
    assert open_ones(one, ["10.213.0.3", last]) == set()
    assert open_ones(two, [named, last]) == {named}
    assert open_ones(three, [named, "10.213.0.3", HOST[0]]) == {named, "10.213.0.3"}
    for each in listeners:
        each.close()


def test_an_opening_ends_with_its_guest_for_connections_that_are_there_too(
    site: Site, namespaces: Callable[[], Namespace]
) -> None:
    guest = namespaces()
    networks.up()
    place = site.guest(guest, Openings(lan=True))
    with guest.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.connect((LAN[0], 80))
        member = networks.networks()[0].members[0]
        site.host.ip(f"link set dev {place.tap} alias {place.tap}")
        # The next guest is given the same address, and could send what belongs to this connection.
        site.host.ip(f"link del {place.tap}")
        assert networks.attach("next").address == member.mark.address
        assert nft.sets("crackle").get(f"wide-{place.address}") is None
        rules = site.host.run("nft", "list", "chain", "ip", "crackle-crackle", "guests").stdout
        assert "vmap" not in rules
        assert "ct direction reply ct state { established, related } accept" in rules
        assert rules.count("ct state") == 1


def test_the_name_servers_that_guests_are_told_answer_them_and_do_nothing_else(
    site: Site, namespaces: Callable[[], Namespace], resolv_conf: Path
) -> None:
    guest, other = namespaces(), namespaces()
    resolv_conf.write_text(f"nameserver 127.0.0.53\nnameserver {LAN[2]}\nnameserver {HOST[1]}\n")
    networks.up()
    place = site.guest(guest)
    assert place.resolvers == [LAN[2], HOST[1]]
    assert place.boot_argument().endswith(f":off:{LAN[2]}:{HOST[1]}")
    # Another one comes when the host has moved; the first keeps what it was told.
    resolv_conf.write_text(f"nameserver {METADATA}\n")
    assert site.guest(other).resolvers == [METADATA]
    for server in (LAN[2], HOST[1], METADATA):
        assert reaches(guest, server, 53)
        assert not reaches(guest, server, 80)
    assert not reaches(guest, LAN[0], 53)
    assert not reaches(guest, HOST[0], 53)


# -- whose address -------------------------------------------------------------------------------------------------


@contextmanager
def raw(guest: Namespace, interface: str) -> Iterator[socket.socket]:
    with guest.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sender:
        sender.bind((interface, 0))
        yield sender


def waiting(seen: socket.socket) -> list[bytes]:
    """The frames that have arrived."""
    frames = []
    seen.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            frames.append(seen.recv(2000))
    return frames


def bytes_of(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def arp(sender: str, address: str, asked: str, source: str = "") -> bytes:
    """A request from `sender`, who says to have `address`, in a frame from `source`."""
    ethernet = b"\xff" * 6 + bytes_of(source or sender) + b"\x08\x06"
    fields = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + bytes_of(sender) + socket.inet_aton(address)
    return (ethernet + fields + bytes(6) + socket.inet_aton(asked)).ljust(60, b"\0")


def udp(source: str, target: str, address: str, asked: str) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 32, 0, 0, 64, 17, 0)
    head += socket.inet_aton(address) + socket.inet_aton(asked)
    total = sum(struct.unpack(">10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack(">H", ~total & 0xFFFF) + head[12:]
    packet = (
        bytes_of(target) + bytes_of(source) + b"\x08\x00" + head + struct.pack(">HHHH", 9, 9, 12, 0) + b"hey!"
    )
    return packet.ljust(60, b"\0")


def test_a_guest_speaks_under_its_own_addresses_only(site: Site, namespaces: Callable[[], Namespace]) -> None:
    guest = namespaces()
    networks.up(openings=Openings(host=True))
    place = networks.attach()
    other = networks.attach()
    site.host.veth(watcher := namespaces(), bridge="crackle")
    receiver = site.host.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("10.213.0.1", 9))
    receiver.settimeout(0.3)
    bridge = plan.mac("10.213.0.1")

    def arrives(frame: bytes) -> bool:
        sender.send(frame)
        try:
            return receiver.recv(100) == b"hey!"
        except TimeoutError:
            return False

    wire = wired(site.host, place.tap, guest, place.mac, f"{place.address}/24")
    end = watcher.show("link")[-1]["ifname"]
    with wire as interface, raw(guest, interface) as sender, raw(watcher, end) as seen:
        assert arrives(udp(place.mac, bridge, place.address, "10.213.0.1"))
        assert not arrives(udp(place.mac, bridge, other.address, "10.213.0.1"))
        assert not arrives(udp(other.mac, bridge, place.address, "10.213.0.1"))
        assert not arrives(udp(other.mac, bridge, other.address, "10.213.0.1"))
        assert not arrives(udp(bridge, bridge, place.address, "10.213.0.1"))
        assert arrives(udp(place.mac, bridge, place.address, "10.213.0.1"))
        waiting(seen)
        good = arp(place.mac, place.address, "10.213.0.1")
        for bad in (
            arp(other.mac, other.address, "10.213.0.1"),
            arp(place.mac, other.address, "10.213.0.1"),
            arp(place.mac, "10.213.0.1", "10.213.0.1"),
            arp(place.mac, place.address, "10.213.0.1", source=other.mac),
            arp(other.mac, place.address, "10.213.0.1", source=place.mac),
            b"\xff" * 6 + bytes_of(place.mac) + b"\x86\xdd" + bytes(60),  # IPv6
            b"\xff" * 6 + bytes_of(place.mac) + b"\x81\x00" + bytes(60),  # in a VLAN
            good,
        ):
            sender.send(bad)
        seen.setblocking(True)
        seen.settimeout(5)
        assert seen.recv(2000).rstrip(b"\0") == good.rstrip(b"\0")
    receiver.close()


def test_a_tap_gets_only_what_is_for_its_guest(site: Site, namespaces: Callable[[], Namespace]) -> None:
    one, two = namespaces(), namespaces()
    networks.up()
    first = site.guest(one).address
    site.guest(two)
    interface = two.show("link")[-1]["ifname"]
    with raw(two, interface) as seen:
        site.host.run("ping", "-c", "3", "-i", "0.05", "-W", "2", first)
        assert [frame for frame in waiting(seen) if frame[12:14] == b"\x08\x00"] == []


def test_no_ipv6_leaves_a_guest_or_the_bridge(site: Site, namespaces: Callable[[], Namespace]) -> None:
    guest = namespaces()
    networks.up(openings=Openings(True, True, (IPv4Network("0.0.0.0/0"),)))
    site.guest(guest)
    guest.switch(f"net/ipv6/conf/{guest.show('link')[-1]['ifname']}/disable_ipv6", 0)
    done = guest.run("ping", "-c", "1", "-W", "1", f"ff02::1%{guest.show('link')[-1]['ifname']}", check=False)
    assert done.returncode != 0
    assert "inet6" not in site.host.ip("addr show crackle")


# -- what is there already ---------------------------------------------------------------------------------------------


def test_rules_that_somebody_flushed_are_there_again_at_the_next_use(
    site: Site, namespaces: Callable[[], Namespace]
) -> None:
    guest = namespaces()
    networks.up(openings=Openings(ranges=(IPv4Network(METADATA),)))
    site.guest(guest)
    site.host.run("nft", "flush", "ruleset")
    networks.attach("next")
    # Closed: what had been opened one range at a time is not known any more.
    assert open_ones(guest, [WORLD, METADATA, *HOST]) == {WORLD}


@pytest.mark.parametrize(
    ("setup", "who"),
    [
        ("addr add 10.213.0.2/32 dev lo", r"10\.213\.0\.2/32 \(lo\)"),
        ("route add 10.213.0.0/23 dev lo table 52", r"10\.213\.0\.0/23 \(lo\)"),
        ("route add blackhole 10.213.0.128/25", r"10\.213\.0\.128/25"),
        ("route add default via 10.213.0.9 dev lo onlink", r"10\.213\.0\.9/32 \(a router\)"),
    ],
)
def test_no_range_is_taken_that_means_something_already(namespace: Namespace, setup: str, who: str) -> None:
    namespace.ip(setup)
    with namespace.entered():
        with pytest.raises(ConfigError, match=f"10.213.0.0/24 is taken by {who}"):
            networks.up("one", IPv4Network("10.213.0.0/24"))
        found = networks.up("two")[0].mark.range
        assert found.subnet_of(IPv4Network("10.213.0.0/16"))
        assert str(found) != "10.213.0.0/24"


def test_no_range_is_taken_that_a_name_server_is_in(namespace: Namespace, resolv_conf: Path) -> None:
    resolv_conf.write_bytes(b"# r\xe9seau\nnameserver 10.213.0.53\nnameserver 10.213.1.53\n")
    with namespace.entered():
        assert str(networks.up()[0].mark.range) == "10.213.2.0/24"
        with pytest.raises(
            ConfigError, match=r"10\.213\.1\.0/24 is taken by 10\.213\.1\.53/32 \(a name server\)"
        ):
            networks.up("other", IPv4Network("10.213.1.0/24"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"# r\xe9seau\nnameserver 9.9.9.9\n", ["9.9.9.9"]),
        (b"nameserver\nnameserver \xff\nnameserver 9.9.9.9.9\n\0\nnameserver fe80::1%eth0\n", []),
        (b"\xff\nnameserver\t9.9.9.9 # x", ["9.9.9.9"]),
        (b"nameserver 0.0.0.0\nnameserver 127.0.0.1\nnameserver 224.0.0.1\nnameserver 255.255.255.255\n", []),
        (b"nameserver \xd9\xa1.1.1.1\nNAMESERVER 8.8.8.8\n", []),
        (b"x" * 100_000, []),
        (b"", []),
    ],
)
def test_odd_lines_of_resolv_conf_are_passed_over(resolv_conf: Path, content: bytes, told: list[str]) -> None:
    resolv_conf.write_bytes(content)
    assert this_host.guests_name_servers() == told


def test_what_is_no_file_is_not_read(resolv_conf: Path) -> None:
    for make in (os.mkfifo, os.mkdir):
        make(resolv_conf)
        assert this_host.guests_name_servers() == []
        (os.unlink if make is os.mkfifo else os.rmdir)(resolv_conf)
    resolv_conf.symlink_to(resolv_conf)
    assert this_host.guests_name_servers() == []


def test_names_of_others_that_are_not_utf8_do_not_matter(namespace: Namespace) -> None:
    namespace.run("ip", "link", "add", b"\xff\xfe", "type", "bridge")  # type: ignore[arg-type]
    namespace.run("ip", "link", "set", b"\xff\xfe", "alias", b"caf\xe9")  # type: ignore[arg-type]
    namespace.run("nft", b'add table ip o { comment "caf\xe9" ; }')  # type: ignore[arg-type]
    with namespace.entered():
        networks.up()
        assert [network.name for network in networks.networks()] == ["crackle"]
        networks.down()


@pytest.mark.parametrize("text", ["10.0.0.0/33", "10.0.0.1/24", "fe80::1", "", "x"])
def test_a_bad_opening_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an IPv4 address or range like"):
        plan.parse_opening(text)


def test_the_longest_marks_fit_an_alias() -> None:
    tap = plan.Tap("n" * 63, "255.255.255.255", (1 << 22, 1 << 40), ("255.255.255.255",) * 2, True, True)
    bridge = plan.Bridge("255.255.255.255", 24, True, False, True, True, True)
    for mark in (tap, bridge):
        assert len(plan.encode(mark)) < 256  # IFALIASZ of <linux/if.h>
        assert plan.decode(plan.encode(mark)) == mark
