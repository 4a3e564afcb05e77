"""Names and addresses of a network and its microVMs, and what is written on their interfaces. Pure functions."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

import msgspec

from crackle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

RANGES = [IPv4Network((0x0AD50000 + (number << 8), 24)) for number in range(64)]
"""Where a network gets its addresses from if nobody says: the first that is free of 10.213.0.0/24 to 10.213.63.0/24."""

# An interface's name has at most 15 characters (IFNAMSIZ of <linux/if.h>): nine here leave room for "-65533".
_NETWORK = re.compile(r"[a-z][a-z0-9]{0,8}")
# A host name as in RFC 1123, section 2.1, in lower case.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MARK = "crackle "


class Bridge(msgspec.Struct, frozen=True, omit_defaults=True, tag="bridge"):
    """What is written on a network's bridge.

    automatic: it goes when the last microVM does. nat: guests reach the world through the host. forwarding: turning on
    net.ipv4.ip_forward was our doing. host, lan: whether these are open for all guests on it.
    """

    gateway: str
    prefix: int
    automatic: bool = False
    nat: bool = True
    forwarding: bool = False
    host: bool = False
    lan: bool = False

    @property
    def range(self) -> IPv4Network:
        """The network's addresses, the gateway's included."""
        return IPv4Network((self.gateway, self.prefix), strict=False)


class Tap(msgspec.Struct, frozen=True, omit_defaults=True, tag="tap"):
    """What is written on a microVM's TAP device.

    owner: process id and start time of the `crackle run` it belongs to; None when only `crackle net` removes it.
    resolvers: the name servers that the guest was told of. host, lan: whether these are open for this guest.
    """

    name: str
    address: str
    owner: tuple[int, int] | None = None
    resolvers: tuple[str, ...] = ()
    host: bool = False
    lan: bool = False


class Openings(msgspec.Struct, frozen=True):
    """What guests may reach beside the world: services of the host, its LAN, ranges of addresses."""

    host: bool = False
    lan: bool = False
    ranges: tuple[IPv4Network, ...] = ()


def encode(mark: Bridge | Tap) -> str:
    """The alias of an interface that is ours."""
    return _MARK + msgspec.json.encode(mark).decode()


def decode(alias: str) -> Bridge | Tap | None:
    """What an interface's alias says; None when it is not ours."""
    if not alias.startswith(_MARK):
        return None
    try:
        return msgspec.json.decode(alias[len(_MARK) :], type=Bridge | Tap)
    except msgspec.MsgspecError:
        return None


def check_network(name: str) -> str:
    """The name, if it can be a network's."""
    if not _NETWORK.fullmatch(name):
        raise ConfigError(
            f"A network cannot be called {name!r}: its name is a small letter and up to eight more letters or digits."
        )
    return name


def check_name(name: str) -> str:
    """The name, if it can be a microVM's."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"A microVM cannot be called {name!r}: its name is 1 to 63 small letters, digits and inner hyphens."
        )
    return name


def parse_range(text: str) -> IPv4Network:
    """An address range as a user writes it, like 10.1.2.0/24."""
    try:
        network = IPv4Network(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a range of IPv4 addresses like 10.1.2.0/24: {error}.") from None
    if not 16 <= network.prefixlen <= 30:
        raise ConfigError(f"The address range {text} must have a prefix of /16 to /30, to hold guests.")
    return network


def parse_opening(text: str) -> IPv4Network:
    """A range that is to be open as a user writes it: 203.0.113.0/24, or one address."""
    try:
        return IPv4Network(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not an IPv4 address or range like 203.0.113.0/24: {error}.") from None


def choose_range(wanted: IPv4Network | None, taken: Iterable[tuple[IPv4Network, str]]) -> IPv4Network:
    """`wanted`, or the first of RANGES that nothing of `taken`, (range, who has it), overlaps."""
    used = list(taken)
    for candidate in RANGES if wanted is None else [wanted]:
        users = [f"{range_} ({who})" for range_, who in used if range_.overlaps(candidate)]
        if not users:
            return candidate
        if wanted is not None:
            raise ConfigError(f"The address range {wanted} is taken by {users[0]}; choose another one.")
    raise ConfigError("All address ranges that Crackle tries by itself are taken; choose one with --range.")


def free_address(range_: IPv4Network, taken: Collection[str]) -> IPv4Address:
    """The first address for a guest; the first one of the range is the gateway's."""
    for number in range(2, range_.num_addresses - 1):
        if str(range_[number]) not in taken:
            return range_[number]
    raise ConfigError(f"All {range_.num_addresses - 3} guests' addresses of {range_} are taken.")


def mac(address: IPv4Address | str) -> str:
    """A locally administered MAC address that is as unique as the IP address in it."""
    return "02:c7:" + IPv4Address(address).packed.hex(":")
