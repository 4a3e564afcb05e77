"""What guests may reach, as rules of nftables. Pure functions: a network and those on it in, text for `nft` out.

Closed unless opened: the host's own addresses, link-local and metadata addresses, the other guests, the LAN. The world
is open, and port 53 of the name servers that a guest was given. Each TAP device speaks IPv4 under its own addresses
only.

Guests' packets are judged before anything translates their destination (priority mangle), by where they were sent,
each one: an opening that ends, ends for connections that are there, too. Only answers to what was begun from elsewhere
pass unseen. Ports of the bridge cannot speak to each other (they are "isolated"); a neighbour that is open is reached
through the host, so that all rules are in one place.
"""

from __future__ import annotations

from ipaddress import IPv4Network, collapse_addresses
from typing import TYPE_CHECKING, NamedTuple

from crackle.hostnet import plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from crackle.hostnet.plan import Bridge, Tap

PREFIX = "crackle-"
"""What the name of a network's tables begins with; the network's name follows."""

# Where clouds keep what is the host's alone: RFC 3927's range, Azure's wire server, Alibaba's and Oracle's metadata.
METADATA = [
    IPv4Network(text) for text in ("169.254.0.0/16", "168.63.129.16", "100.100.100.200", "192.0.0.192")
]
# RFC 1918, RFC 6598 (carriers' NAT), RFC 2544 (benchmarks): addresses that mean something within a site only.
LAN = [
    IPv4Network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15")
]
# A host's own, whatever its kernel lets in (route_localnet); so is metadata that the host itself serves.
LOOPBACK = [IPv4Network("127.0.0.0/8")]
# RFC 6890: nobody's, or nobody's over a router: "this network", protocol assignments, multicast, reserved.
SPECIAL = [IPv4Network(text) for text in ("0.0.0.0/8", "192.0.0.0/24", "224.0.0.0/4", "240.0.0.0/4")]


class Ranges(NamedTuple):
    """Addresses that were opened one range at a time.

    single: addresses that were named, open whatever they are. special: parts of the network's own range and of where
    metadata is, but for what is the host's there. wide: ranges that open the world and the LAN, but not what happens to
    lie within and is closed for a reason of its own.
    """

    single: list[IPv4Network]
    special: list[IPv4Network]
    wide: list[IPv4Network]


class Member(NamedTuple):
    """A microVM's TAP device, and the ranges that are open for it alone."""

    tap: str
    mark: Tap
    ranges: Ranges


def sort(ranges: Iterable[IPv4Network], own: IPv4Network) -> Ranges:
    """What each of `ranges` opens, for a network with the range `own`."""
    found = Ranges([], [], [])
    for range_ in ranges:
        if range_.prefixlen == range_.max_prefixlen:
            found.single.append(range_)
        elif any(range_.subnet_of(each) for each in (own, *METADATA)):
            found.special.append(range_)
        else:
            found.wide.append(range_)
    return Ranges(*(list(collapse_addresses(each)) for each in found))


def opens_neighbours(own: IPv4Network, ranges: Iterable[Ranges]) -> bool:
    """Whether any of the guests may reach any other one."""
    return any(range_.overlaps(own) for each in ranges for range_ in (*each.single, *each.special))


def kept(sets: Mapping[str, list[IPv4Network]], address: str = "") -> Ranges:
    """The ranges of a network, or of its guest with this address, as they stand in the sets that `render` made."""
    return Ranges(*(sets.get(kind + _suffix(address), []) for kind in Ranges._fields))


def render(
    name: str, mark: Bridge, ranges: Ranges, members: Sequence[Member], connected: Iterable[IPv4Network]
) -> str:
    """The network's tables, whole: `nft -f` puts them in the place of those that are there, in one transaction.

    ranges: what is open for all on the network. connected: the networks that the host is on.
    """
    table = PREFIX + name
    neighbours = opens_neighbours(mark.range, [ranges, *(member.ranges for member in members)])
    lines = [f"table {family} {table}\ndelete table {family} {table}" for family in ("bridge", "ip")]
    lines += [f"table bridge {table} {{", *_pinning(mark, members, neighbours), "}"]
    lines += [f"table ip {table} {{", *_judging(name, mark, ranges, members, list(connected))]
    if mark.nat:
        lines += [*_translating(name, mark)]
    return "\n".join([*lines, "}"])


def remove(name: str) -> str:
    """Commands that remove a network's tables, if they are there."""
    # Adding them first makes removing them work either way.
    table = PREFIX + name
    return "\n".join(f"table {family} {table}\ndelete table {family} {table}" for family in ("bridge", "ip"))


def _pinning(mark: Bridge, members: Sequence[Member], neighbours: bool) -> Iterator[str]:
    """No frame of a TAP device but IPv4 and ARP under its own addresses; ARP only asks for whom it may speak to."""
    senders = [f'"{each.tap}" . {plan.mac(each.mark.address)} . {each.mark.address}' for each in members]
    yield _set("taps", "ifname", [f'"{each.tap}"' for each in members])
    yield _set("senders", "ifname . ether_addr . ipv4_addr", senders)
    asked = mark.range if neighbours else mark.gateway
    arp = "iifname . ether saddr . arp saddr ip @senders iifname . arp saddr ether . arp saddr ip @senders"
    yield f"""
    chain pinned {{
        ether type ip iifname . ether saddr . ip saddr @senders accept
        {arp} arp daddr ip {asked} accept
        drop
    }}
    chain prerouting {{
        type filter hook prerouting priority filter; policy accept;
        iifname @taps goto pinned
    }}
    # Frames for the bridge itself (IEEE 802.1D, 7.12.6) come by here only.
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname @taps goto pinned
    }}"""


def _judging(
    name: str, mark: Bridge, ranges: Ranges, members: Sequence[Member], connected: list[IPv4Network]
) -> Iterator[str]:
    """What guests send through the host or to it."""
    lan = collapse_addresses([*LAN, *connected])
    guarded = collapse_addresses([mark.range, *METADATA])
    closed = collapse_addresses([mark.range, *METADATA, *LAN, *LOOPBACK, *SPECIAL, *connected])
    yield _set("resolvers", "ipv4_addr", {text for each in members for text in each.mark.resolvers})
    yield _set("lan", "ipv4_addr; flags interval", lan)
    yield _set("guarded", "ipv4_addr; flags interval", guarded)
    yield _set("own", "ipv4_addr; flags interval", [*METADATA, *LOOPBACK])
    yield _set("closed", "ipv4_addr; flags interval", closed)
    for_all, sets = _door("", mark.host, mark.lan, ranges)
    yield from sets
    jumps = []
    for each in members:
        rules, sets = _door(each.mark.address, each.mark.host, each.mark.lan, each.ranges)
        if rules:
            chain = "guest" + _suffix(each.mark.address)
            yield "\n".join([*sets, f"    chain {chain} {{", *rules, "    }"])
            jumps.append(f"{each.mark.address} : jump {chain}")
    yield "\n".join(
        [
            f"""
    chain guests {{
        ip saddr != {mark.range} drop
        ct direction reply ct state {{ established, related }} accept
        meta l4proto {{ tcp, udp }} th dport 53 ip daddr @resolvers accept""",
            *for_all,
            *([f"        ip saddr vmap {{ {', '.join(jumps)} }}"] if jumps else []),
            f"""\
        fib daddr type {{ broadcast, multicast }} drop
        fib daddr type local reject with icmp type admin-prohibited
        ip daddr @closed reject with icmp type admin-prohibited
    }}
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        iifname "{name}" goto guests
    }}""",
        ]
    )


def _door(address: str, host: bool, lan: bool, ranges: Ranges) -> tuple[list[str], list[str]]:
    """Rules that open what is to be open for all ("") or for the guest with this address, and their sets."""
    suffix = _suffix(address)
    sets = [
        _set(kind + suffix, "ipv4_addr; flags interval", found)
        for kind, found in zip(Ranges._fields, ranges, strict=True)
        if found
    ]
    elsewhere = "        fib daddr type unicast ip daddr"
    rules = [
        (bool(ranges.single), f"        ip daddr @single{suffix} accept"),
        (host, "        fib daddr type { local, broadcast, multicast } ip daddr != @own accept"),
        (bool(ranges.special), f"{elsewhere} @special{suffix} accept"),
        (bool(ranges.wide), f"{elsewhere} != @guarded ip daddr @wide{suffix} accept"),
        (lan, f"{elsewhere} != @guarded ip daddr @lan accept"),
    ]
    return [rule for wanted, rule in rules if wanted], sets


def _translating(name: str, mark: Bridge) -> Iterator[str]:
    """Guests go out under the host's address, and what answers them comes in; nothing else does from outside."""
    yield f"""
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {mark.range} oifname != "{name}" masquerade
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        oifname "{name}" iifname != "{name}" ct state != {{ established, related }} drop
    }}"""


def _suffix(address: str) -> str:
    return f"-{address}" if address else ""


def _set(name: str, kind: str, elements: Iterable[object]) -> str:
    text = ", ".join(map(str, elements))
    return f"    set {name} {{ type {kind}; {f'elements = {{ {text} }}' if text else ''}\n    }}"
