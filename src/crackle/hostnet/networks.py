"""Networks for microVMs: made, joined, left, listed and taken down. Each call is all or nothing.

Every call also clears away what processes that are no more have left: TAP devices whose `crackle run` has died,
networks made for such a one alone, and tables of bridges that somebody has removed. Whatever changes a network
writes its rules anew, from what stands on its interfaces. Raises ConfigError when something cannot be had.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import ExitStack
from ipaddress import IPv4Network
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from crackle.errors import ConfigError
from crackle.hostnet import DEFAULT_NETWORK, nft, plan, rules
from crackle.hostnet.host import guests_name_servers, name_servers
from crackle.hostnet.links import Link, Links
from crackle.hostnet.plan import Bridge, Openings, Tap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crackle.hostnet.rules import Ranges

_MTU = 1500
_CLOSED = Openings()
_TOLD = 2  # name servers that fit the kernel parameter


class Attachment(NamedTuple):
    """What a microVM needs to know of its place in a network: its TAP device here, its addresses there."""

    network: str
    tap: str
    name: str
    mac: str
    mtu: int
    address: str
    gateway: str
    netmask: str
    resolvers: list[str]

    def boot_argument(self) -> str:
        """The kernel parameter that configures the guest's eth0 (Documentation/admin-guide/nfs/nfsroot.rst)."""
        fields = [self.address, "", self.gateway, self.netmask, self.name, "eth0", "off", *self.resolvers]
        return "ip=" + ":".join(fields)


class Member(NamedTuple):
    """A microVM on a network, as `networks` lists it."""

    tap: str
    mark: Tap
    running: bool


class Network(NamedTuple):
    """A network, as `networks` lists it."""

    name: str
    mark: Bridge
    members: list[Member]


def networks() -> list[Network]:
    """What there is. Anybody may ask; only who may change the network clears away as well."""
    with contextlib.suppress(ConfigError), Links() as links:
        _sweep(links)
    with Links() as links:
        return _look(links)


def up(
    name: str = DEFAULT_NETWORK,
    range_: IPv4Network | None = None,
    *,
    use_nat: bool = True,
    openings: Openings = _CLOSED,
) -> tuple[Network, bool]:
    """Make a network that stays until `down`; also, whether it was made just now.

    One that is there with these settings is left as it is; one that is there for the microVMs on it only, stays from
    now on. openings: what everybody on it may reach.
    """
    plan.check_network(name)
    with Links() as links:
        _sweep(links)
        found = _find(links, name)
        if found is None:
            return _make(links, name, range_, openings, use_nat=use_nat, automatic=False), True
        mark = found.mark
        ranges = rules.sort(openings.ranges, mark.range)
        wanted = (range_ or mark.range, use_nat, openings.host, openings.lan, ranges)
        if (mark.range, mark.nat, mark.host, mark.lan, rules.kept(nft.sets(name))) != wanted:
            raise ConfigError(
                f"The network {name} exists already, with {mark.range} and other settings: take it down first, "
                f"or give it another name."
            )
        if mark.automatic:
            mark = msgspec.structs.replace(mark, automatic=False)
            links.write(name, mark)
        return Network(name, mark, found.members), False


def down(name: str = DEFAULT_NETWORK, *, force: bool = False) -> None:
    """Take a network down, and the TAP devices on it; only with `force` if microVMs are running on it."""
    with Links() as links:
        _sweep(links)
        found = _find(links, name)
        if found is None:
            raise ConfigError(f"There is no network {name}.")
        _sweep_tables(links)
        running = [member.mark.name for member in found.members if member.running]
        if running and not force:
            raise ConfigError(
                f"On the network {name} run {', '.join(running)}: end them first, or take it down with --force."
            )
        _unmake(links, found)


def attach(
    name: str | None = None,
    network: str = DEFAULT_NETWORK,
    *,
    owner: int | None = None,
    user: int | None = None,
    openings: Openings = _CLOSED,
) -> Attachment:
    """Make a TAP device and find an address for a microVM on `network`, which is made if it is not there.

    owner: process id of whoever calls `detach`; should it die, that is made up for. user: id of the user who may open
    the TAP device, by default the caller. openings: what this guest may reach beside what all on the network may.
    """
    plan.check_network(network)
    if name is not None:
        plan.check_name(name)
    with Links() as links, ExitStack() as undo:
        _sweep(links)
        found = _find(links, network)
        if found is None:
            found = _make(links, network, None, _CLOSED, use_nat=True, automatic=True)
            undo.callback(_unmake, links, found)
        marks = [member.mark for member in found.members]
        address = plan.free_address(found.mark.range, {mark.address for mark in marks})
        number = int(address) - int(found.mark.range.network_address)
        names = [mark.name for mark in marks]
        if name is None:
            name = f"vm{number}"
            while name in names:
                name += "x"
        elif name in names:
            raise ConfigError(f"There is a microVM called {name} on the network {network} already.")
        tap = f"{network}-{number}"
        mtu = next(link.mtu for link in links.all() if link.name == network)
        resolvers = guests_name_servers()[:_TOLD]
        process = None if owner is None else (owner, _start_time(owner) or 0)
        mark = Tap(name, str(address), process, tuple(resolvers), openings.host, openings.lan)
        member = Member(tap, mark, False)
        # Closed before it is there.
        _write(links, found._replace(members=[*found.members, member]), {mark.address: openings.ranges})
        undo.callback(_write, links, found)
        links.add_tap(tap, mark, network, mtu, os.geteuid() if user is None else user)
        undo.pop_all()
    return Attachment(
        network,
        tap,
        name,
        plan.mac(address),
        mtu,
        str(address),
        found.mark.gateway,
        str(found.mark.range.netmask),
        resolvers,
    )


def detach(
    name: str, network: str = DEFAULT_NETWORK, *, owner: int | None = None, force: bool = False
) -> None:
    """Remove a microVM's TAP device, and the network if it was made for it and nobody else is on it.

    owner: only if it is this process's still; somebody may have taken the network down meanwhile. Without it, a
    microVM that is running keeps its TAP device, but for `force`.
    """
    with Links() as links:
        found = _find(links, network)
        members = [] if found is None else [member for member in found.members if member.mark.name == name]
        if owner is not None:
            members = [member for member in members if (member.mark.owner or (0,))[0] == owner]
        for member in members:
            if member.running and owner is None and not force:
                raise ConfigError(
                    f"The microVM {name} on the network {network} is running: end it first, or remove it with --force."
                )
            links.remove(member.tap)
        if found is not None and members:
            _write(links, found._replace(members=[each for each in found.members if each not in members]))
        _sweep(links)
        if not members and owner is None:
            raise ConfigError(f"There is no microVM called {name} on the network {network}.")


def _look(links: Links) -> list[Network]:
    found = links.all()
    return [
        Network(
            link.name,
            link.mark,
            [
                Member(tap.name, tap.mark, _in_use(tap))
                for tap in found
                if isinstance(tap.mark, Tap) and tap.name.rpartition("-")[0] == link.name
            ],
        )
        for link in found
        if isinstance(link.mark, Bridge)
    ]


def _find(links: Links, name: str) -> Network | None:
    return next((network for network in _look(links) if network.name == name), None)


def _make(
    links: Links,
    name: str,
    range_: IPv4Network | None,
    openings: Openings,
    *,
    use_nat: bool,
    automatic: bool,
) -> Network:
    servers = [(IPv4Network(each), "a name server") for found in name_servers() for each in found]
    chosen = plan.choose_range(range_, [*links.taken(), *servers])
    _sweep_tables(links)
    uplink = links.uplink()
    # Guests that know the way's narrowest part need not be told by ICMP, which some networks lose.
    mtu = min(_MTU, uplink.mtu) if uplink else _MTU
    mark = Bridge(str(chosen[1]), chosen.prefixlen, automatic, use_nat, host=openings.host, lan=openings.lan)
    network = Network(name, mark, [])
    with ExitStack() as undo:
        links.add_bridge(name, mark, mtu)
        undo.callback(links.remove, name)
        undo.callback(nft.write, rules.remove(name))
        _write(links, network, {"": openings.ranges})
        if use_nat and not nft.forwards():
            # Written down first: whoever finds it written and not done, does no harm by undoing it.
            network = network._replace(mark=msgspec.structs.replace(mark, forwarding=True))
            links.write(name, network.mark)
            nft.set_forwarding(True)
        undo.pop_all()
    return network


def _write(
    links: Links, network: Network, given: Mapping[str, Sequence[IPv4Network]] = MappingProxyType({})
) -> None:
    """Put the network's rules in place, for the guests on it.

    given: what is open for a new one, by its address ("": for all); for the others that stays as it is.
    """
    own = network.mark.range
    sets = nft.sets(network.name)

    def ranges(address: str) -> Ranges:
        return rules.sort(given[address], own) if address in given else rules.kept(sets, address)

    for_all = ranges("")
    members = [rules.Member(each.tap, each.mark, ranges(each.mark.address)) for each in network.members]
    nft.write(rules.render(network.name, network.mark, for_all, members, links.connected()))
    if rules.opens_neighbours(own, [for_all, *(member.ranges for member in members)]):
        # The host answers for the neighbours (RFC 3069) and passes on what it is sent for them.
        nft.set_switch(f"net/ipv4/neigh/{network.name}/proxy_delay", 0)
        for switch in ("proxy_arp_pvlan", "forwarding"):
            nft.set_switch(f"net/ipv4/conf/{network.name}/{switch}", 1)


def _unmake(links: Links, network: Network) -> None:
    for member in network.members:
        links.remove(member.tap)
    if network.mark.forwarding:
        heir = next((other for other in _look(links) if other.mark.nat and other.name != network.name), None)
        if heir is not None:
            links.write(heir.name, msgspec.structs.replace(heir.mark, forwarding=True))
        elif not nft.others_forward():
            nft.set_forwarding(False)
    links.remove(network.name)
    nft.write(rules.remove(network.name))


def _sweep(links: Links) -> None:
    """Clear away what nobody will."""
    for network in _look(links):
        left = []
        for member in network.members:
            if member.mark.owner is not None and not member.running:
                links.remove(member.tap)
            else:
                left.append(member)
        if network.mark.automatic and not left:
            _unmake(links, network._replace(members=[]))
        elif len(left) < len(network.members):
            _write(links, network._replace(members=left))


def _sweep_tables(links: Links) -> None:
    """Remove the tables of bridges that somebody else has removed."""
    for name in nft.orphans({link.name for link in links.all()}):
        nft.write(rules.remove(name))


def _in_use(tap: Link) -> bool:
    """Whether the microVM's process, or the one that cares for it, lives. A process of another PID namespace may not be
    seen here, but that the device is open is."""
    assert isinstance(tap.mark, Tap)
    if tap.carrier:
        return True
    return tap.mark.owner is not None and _start_time(tap.mark.owner[0]) == tap.mark.owner[1]


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks after the boot (proc(5)); None when it is no more."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in b"ZX" else int(fields[19])
