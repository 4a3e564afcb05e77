"""A TAP device in the place of another interface: what either receives, the other sends (tc(8), u32 and mirred).

For microVMs whose network somebody else has made, an interface in a network namespace with an address of its own: the
guest has that interface's addresses, and nobody on the way needs to know. In the namespace of the calling thread.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from crackle.errors import ConfigError
from crackle.hostnet.host import check_tun
from crackle.hostnet.links import friendly, silence

if TYPE_CHECKING:
    from types import TracebackType

# <linux/pkt_sched.h>: the handle that every ingress qdisc has. <linux/if_ether.h>: all protocols.
_INGRESS = 0xFFFF0000
_ALL_PROTOCOLS = 3
_TAPS = 1000


class Interface(NamedTuple):
    """One that is there. number: its index."""

    number: int
    name: str
    mac: str
    mtu: int
    mark: str


class Redirects:
    """A context manager. Raises ConfigError for what the kernel refuses."""

    def __enter__(self) -> Redirects:
        try:
            self._route = IPRoute()
        except OSError as error:
            raise friendly(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._route.close()
        if isinstance(error, NetlinkError):
            raise friendly(error) from None

    def find(self, name: str) -> Interface | None:
        """The interface of that name."""
        return next((each for each in self._all() if each.name == name), None)

    def marked(self, mark: str) -> list[Interface]:
        """Those that `add` has made with that mark."""
        return [each for each in self._all() if each.mark == mark]

    def _all(self) -> list[Interface]:
        return [
            Interface(
                link["index"],
                link.get("ifname"),
                link.get("address"),
                link.get("mtu"),
                link.get("ifalias") or "",
            )
            for link in self._route.get_links()
        ]

    def add(self, of: Interface, name: str | None, mark: str, uid: int, gid: int) -> Interface:
        """A TAP device that `uid` and `gid` may open, of the same MTU, up, with all that goes through `of`.

        name: None for the first tapN that is free. ConfigError, with nothing left, when it cannot be had.
        """
        check_tun()
        names = {each.name for each in self._all()}
        if name is None:
            name = next(free for number in range(_TAPS) if (free := f"tap{number}") not in names)
        elif name in names:
            raise ConfigError(f"there is an interface {name} already")
        self._route.link("add", ifname=name, kind="tuntap", mode="tap", uid=uid, gid=gid)
        try:
            number = self._route.link_lookup(ifname=name)[0]
            self._route.link("set", index=number, ifalias=mark, mtu=of.mtu, state="up")
            silence(name)
            for source, to in ((of.number, number), (number, of.number)):
                self._redirect(source, to)
            tap = self.find(name)
            if tap is None:
                raise ConfigError(f"the interface {name} is gone again")
        except BaseException:
            self.remove(of, name)
            raise
        return tap

    def remove(self, of: Interface | None, name: str) -> None:
        """Take the TAP device away, and what `of` does for it. What is gone already is no fault."""
        for number in self._route.link_lookup(ifname=name):
            if of is not None and self._leads(of.number) == number:
                self._route.tc("del", "ingress", index=of.number, handle=_INGRESS)
            self._route.link("del", index=number)

    def leads_to(self, source: Interface, to: Interface) -> bool:
        """Whether what `source` receives is sent by `to`."""
        return self._leads(source.number) == to.number

    def _redirect(self, source: int, to: int) -> None:
        if self._leads(source) is not None:
            raise ConfigError(f"interface {source} is redirected already")
        try:
            self._route.tc("add", "ingress", index=source, handle=_INGRESS)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
        self._route.tc(
            "add-filter",
            "u32",
            index=source,
            parent=_INGRESS,
            prio=1,
            protocol=_ALL_PROTOCOLS,
            target=0x10001,  # a class is wanted, and means nothing here
            keys=["0x0/0x0+0"],
            action={"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": to},
        )

    def _leads(self, source: int) -> int | None:
        """The index of the interface that sends what this one receives."""
        for found in self._route.get_filters(index=source, parent=_INGRESS):
            options = found.get_attr("TCA_OPTIONS")
            actions = options.get_attr("TCA_U32_ACT") if options is not None else None
            for _, action in actions["attrs"] if actions is not None else ():
                parameters = action.get_attr("TCA_ACT_OPTIONS")
                mirred = parameters.get_attr("TCA_MIRRED_PARMS") if parameters is not None else None
                if mirred is not None:
                    return int(mirred["ifindex"])
        return None
