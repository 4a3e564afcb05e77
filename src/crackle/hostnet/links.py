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

if TYPE_CHECKING:
    from types import TracebackType

    from crackle.hostnet.plan import Bridge, Tap

_PATIENCE = 30.0  # seconds; a change takes some hundredths
_MAIN_TABLE = 254  # RT_TABLE_MAIN of <linux/rtnetlink.h>


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
        self._lock = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
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
                link.get("ifname"),
                link.get("mtu"),
                bool(link.get("carrier")),
                plan.decode(link.get("ifalias")),
            )
            for link in self._route.get_links()
        ]

    def routes(self) -> list[tuple[IPv4Network, str]]:
        """IPv4 ranges that are reached some way other than by default, and the interface for each."""
        names = {link.number: link.name for link in self.all()}
        found = []
        for route in self._route.get_routes(family=socket.AF_INET):
            if route["dst_len"] and route.get("table") == _MAIN_TABLE:
                via = names.get(route.get("oif"), "a route")
                found.append((IPv4Network((route.get("dst"), route["dst_len"])), via))
        return found

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
        """A persistent TAP device that `user` may open, on `bridge`, up."""
        self._add(name, mark, kind="tuntap", mode="tap", uid=user)
        try:
            self._route.link("set", index=self._index(name), mtu=mtu, master=self._index(bridge), state="up")
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
            # The host's own announcements on it would wake up every guest.
            with (
                contextlib.suppress(OSError),
                open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as file,
            ):
                file.write("1")
        except BaseException:
            self.remove(name)
            raise

    def _index(self, name: str) -> int:
        found: list[int] = self._route.link_lookup(ifname=name)
        if not found:
            raise NetlinkError(errno.ENODEV, f"interface {name} has gone")
        return found[0]


def friendly(error: NetlinkError | OSError) -> ConfigError:
    """The same in one sentence."""
    code = error.code if isinstance(error, NetlinkError) else error.errno
    if code in (errno.EPERM, errno.EACCES):
        return ConfigError(plan.NOT_ALLOWED)
    if code in (errno.ENOENT, errno.ENODEV) and isinstance(error, OSError):
        return ConfigError("There is no /dev/net/tun: load the tun module.")
    return ConfigError(f"The kernel refused to change the network: {os.strerror(code or 0)}.")
