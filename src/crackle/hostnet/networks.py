"""Networks for microVMs: made, joined, left, listed and taken down. Each call is all or nothing.

Every call also clears away what processes that are no more have left: TAP devices whose `crackle run` has died,
networks made for such a one alone, and tables of bridges that somebody has removed. Raises ConfigError when something
cannot be had.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import ExitStack
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, NamedTuple

from crackle.errors import ConfigError
from crackle.hostnet import DEFAULT_NETWORK, nat, plan
from crackle.hostnet.links import Link, Links
from crackle.hostnet.plan import Bridge, Tap

if TYPE_CHECKING:
    from ipaddress import IPv4Network

_MTU = 1500
_RESOLVERS = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")


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
        fields = [self.address, "", self.gateway, self.netmask, self.name, "eth0", "off", *self.resolvers[:2]]
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


def up(name: str = DEFAULT_NETWORK, range_: IPv4Network | None = None, *, use_nat: bool = True) -> Network:
    """Make a network that stays until `down`. One that is there for the microVMs on it only, stays from now on."""
    plan.check_network(name)
    with Links() as links:
        _sweep(links)
        found = _find(links, name)
        if found is None:
            return _make(links, name, range_, use_nat=use_nat, automatic=False)
        mark = found.mark
        if not mark.automatic or mark.nat != use_nat or range_ not in (None, mark.range):
            raise ConfigError(f"The network {name} exists already, with {mark.range}; take it down first.")
        mark = Bridge(mark.gateway, mark.prefix, False, mark.nat, mark.forwarding)
        links.write(name, mark)
        return Network(name, mark, found.members)


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
) -> Attachment:
    """Make a TAP device and find an address for a microVM on `network`, which is made if it is not there.

    owner: process id of whoever calls `detach`; should it die, that is made up for. user: id of the user who may open
    the TAP device, by default the caller.
    """
    plan.check_network(network)
    if name is not None:
        plan.check_name(name)
    with Links() as links, ExitStack() as undo:
        _sweep(links)
        found = _find(links, network)
        if found is None:
            found = _make(links, network, None, use_nat=True, automatic=True)
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
        mark = Tap(name, str(address), None if owner is None else (owner, _start_time(owner) or 0))
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
        _resolvers(),
    )


def detach(name: str, network: str = DEFAULT_NETWORK, *, owner: int | None = None) -> None:
    """Remove a microVM's TAP device, and the network if it was made for it and nobody else is on it.

    owner: only if it is this process's still; somebody may have taken the network down meanwhile.
    """
    with Links() as links:
        found = _find(links, network)
        members = [] if found is None else [member for member in found.members if member.mark.name == name]
        if owner is not None:
            members = [member for member in members if (member.mark.owner or (0,))[0] == owner]
        for member in members:
            links.remove(member.tap)
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


def _make(links: Links, name: str, range_: IPv4Network | None, *, use_nat: bool, automatic: bool) -> Network:
    chosen = plan.choose_range(range_, links.routes())
    if use_nat:
        _sweep_tables(links)
    uplink = links.uplink()
    # Guests that know the way's narrowest part need not be told by ICMP, which some networks lose.
    mtu = min(_MTU, uplink.mtu) if uplink else _MTU
    mark = Bridge(str(chosen[1]), chosen.prefixlen, automatic, use_nat)
    with ExitStack() as undo:
        links.add_bridge(name, mark, mtu)
        undo.callback(links.remove, name)
        if use_nat:
            nat.add(name, chosen)
            undo.callback(nat.remove, name)
            if not nat.forwards():
                # Written down first: whoever finds it written and not done, does no harm by undoing it.
                mark = Bridge(mark.gateway, mark.prefix, automatic, use_nat, True)
                links.write(name, mark)
                nat.set_forwarding(True)
        undo.pop_all()
    return Network(name, mark, [])


def _unmake(links: Links, network: Network) -> None:
    for member in network.members:
        links.remove(member.tap)
    if network.mark.nat:
        nat.remove(network.name)
    if network.mark.forwarding:
        heir = next((other for other in _look(links) if other.mark.nat and other.name != network.name), None)
        if heir is not None:
            mark = heir.mark
            links.write(heir.name, Bridge(mark.gateway, mark.prefix, mark.automatic, mark.nat, True))
        elif not nat.others_forward():
            nat.set_forwarding(False)
    links.remove(network.name)


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
            _unmake(links, Network(network.name, network.mark, left))


def _sweep_tables(links: Links) -> None:
    """Remove the tables of bridges that somebody else has removed."""
    for name in nat.orphans({link.name for link in links.all()}):
        nat.remove(name)


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
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _resolvers() -> list[str]:
    """The host's name servers that a guest can reach too: IPv4, and not on the host's loopback."""
    for path in _RESOLVERS:
        try:
            with open(path) as file:
                lines = [line.split() for line in file]
        except OSError:
            continue
        found = []
        for words in lines:
            with contextlib.suppress(ValueError, IndexError):
                if words[0] == "nameserver" and not IPv4Address(words[1]).is_loopback:
                    found.append(words[1])
        if found:
            return found
    return []
