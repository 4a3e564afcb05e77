"""Interfaces, addresses and routes of the network namespace that the calling thread is in, by rtnetlink.

Documentation/networking of Linux and rtnetlink(7). `Links` also holds the lock that makes changes one after the other:
a lock on the namespace itself, which needs no file and ends with the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any, NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from crackle.errors import ConfigError
from crackle.hostnet import plan
from crackle.hostnet.host import check_tun, refusal

if TYPE_CHECKING:
    from types import TracebackType

    from crackle.hostnet.plan import Bridge, Tap

_PATIENCE = 30.0  # seconds; a change takes some hundredths
_NAMESPACE = "/proc/thread-self/ns/net"
# <linux/rtnetlink.h>
_MAIN_TABLE = 254  # RT_TABLE_MAIN
_UNICAST = 1  # RTN_UNICAST
_NOARP = 0x40  # NUD_NOARP of <linux/neighbour.h>: an entry that stays

_WIDEST = 8  # bits; what claims to be on the link with fewer is the world through a tunnel


class Link(NamedTuple):
    """An interface. number: its index. carrier: for a TAP device, whether a process has it open."""

    number: int
    name: str
    mtu: int
    carrier: bool
    mark: Bridge | Tap | None


class Links:
    """The interfaces, while nobody else changes them. A context manager."""

    def __enter__(self) -> Links:
        try:
            self._lock = os.open(_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ConfigError(f"Networks need /proc: cannot open {_NAMESPACE}: {reason}.") from None
        try:
            self._take_lock()
            self._route = IPRoute()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _take_lock(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    message = f"Another process has kept this network namespace locked for {_PATIENCE:g} s."
                    raise ConfigError(message) from None
            time.sleep(0.02)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._route.close()
        os.close(self._lock)
        if isinstance(error, NetlinkError):
            raise friendly(error) from None

    def all(self) -> list[Link]:
        """Every interface."""
        return [
            Link(
                link["index"],
                _text(link.get("ifname")),
                link.get("mtu"),
                bool(link.get("carrier")),
                plan.decode(_text(link.get("ifalias"))),
            )
            for link in self._route.get_links()
        ]

    def taken(self) -> list[tuple[IPv4Network, str]]:
        """IPv4 ranges that mean something already, and what has each: routes but the default ones, in every table; with
        them the host's own addresses; and the routers, which need not be in any range."""
        names = {link.number: link.name for link in self.all()}
        found = []
        for route in self._route.get_routes(family=socket.AF_INET):
            via = names.get(route.get("oif"), "a route")
            if route["dst_len"]:
                found.append((IPv4Network((route.get("dst"), route["dst_len"])), via))
            hops = [route, *(route.get("multipath") or [])]
            routers = [hop.get("gateway") for hop in hops if isinstance(hop.get("gateway"), str)]
            found += [(IPv4Network(router), "a router") for router in routers]
        return found

    def connected(self) -> list[IPv4Network]:
        """The networks that this host is on: ranges that are reached without a router."""
        return [
            IPv4Network((route.get("dst"), route["dst_len"]))
            for route in self._route.get_routes(family=socket.AF_INET)
            if route["type"] == _UNICAST
            and route["dst_len"] >= _WIDEST
            and not (route.get("gateway") or route.get("multipath") or route.get("via"))
        ]

    def uplink(self) -> Link | None:
        """The interface of the default route."""
        for route in self._route.get_default_routes(family=socket.AF_INET, table=_MAIN_TABLE):
            for link in self.all():
                if link.number == route.get("oif"):
                    return link
        return None

    def add_bridge(self, name: str, mark: Bridge, mtu: int) -> None:
        """A bridge with the network's gateway address, up."""
        # Its own address rather than the lowest of its ports', which come and go; forwarding at once.
        self._add(
            name,
            mark,
            mtu=mtu,
            kind="bridge",
            address=plan.mac(mark.gateway),
            br_stp_state=0,
            br_forward_delay=0,
            br_mcast_snooping=0,
        )
        try:
            index = self._index(name)
            broadcast = str(mark.range.broadcast_address)
            self._route.addr(
                "add", index=index, address=mark.gateway, prefixlen=mark.prefix, broadcast=broadcast
            )
            self._route.link("set", index=index, state="up")
        except BaseException:
            self.remove(name)
            raise

    def add_tap(self, name: str, mark: Tap, bridge: str, mtu: int, user: int) -> None:
        """A persistent TAP device that `user` may open, on `bridge`, up.

        It gets frames for its guest's address only, and sends none to another TAP device.
        """
        check_tun()
        self._add(name, mark, kind="tuntap", mode="tap", uid=user)
        try:
            index = self._index(name)
            self._route.link("set", index=index, mtu=mtu, master=self._index(bridge))
            self._route.brport("set", index=index, isolated=1, learning=0, unicast_flood=0)
            self._route.fdb("add", ifindex=index, lladdr=plan.mac(mark.address), state=_NOARP)
            self._route.link("set", index=index, state="up")
        except BaseException:
            self.remove(name)
            raise

    def write(self, name: str, mark: Bridge | Tap) -> None:
        """Replace what is written on an interface."""
        self._route.link("set", index=self._index(name), ifalias=plan.encode(mark))

    def remove(self, name: str) -> None:
        """Remove an interface, if it is there."""
        for index in self._route.link_lookup(ifname=name):
            self._route.link("del", index=index)

    def _add(self, name: str, mark: Bridge | Tap, **options: Any) -> None:
        # Making a TAP device that exists means opening it.
        if self._route.link_lookup(ifname=name):
            raise ConfigError(
                f"There is an interface {name} already, which is not Crackle's; choose another network name."
            )
        try:
            self._route.link("add", ifname=name, **options)
        except OSError as error:
            raise friendly(error) from None
        try:
            self.write(name, mark)
            silence(name)
        except BaseException:
            self.remove(name)
            raise

    def _index(self, name: str) -> int:
        found: list[int] = self._route.link_lookup(ifname=name)
        if not found:
            raise NetlinkError(errno.ENODEV, f"interface {name} has gone")
        return found[0]


def _text(name: str | bytes | None) -> str:
    """A name that somebody gave: pyroute2 gives bytes where they are not UTF-8."""
    return name.decode(errors="replace") if isinstance(name, bytes) else name or ""


def silence(name: str) -> None:
    """Have the host announce nothing on an interface: that would wake up every guest."""
    with (
        contextlib.suppress(OSError),
        open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as file,
    ):
        file.write("1")


def friendly(error: NetlinkError | OSError) -> ConfigError:
    """The same in one sentence."""
    code = error.code if isinstance(error, NetlinkError) else error.errno
    return refusal("The kernel refused to change the network", code)
