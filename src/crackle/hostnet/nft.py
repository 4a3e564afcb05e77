"""The packet filter, by the `nft` program, and the switches in /proc/sys that a network needs.

A network has two tables of its own, of the bridge and of the ip family, which `rules` writes. They are put in place and
removed as a whole, in one transaction.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from ipaddress import IPv4Address, IPv4Network, summarize_address_range
from typing import Any

from crackle.errors import ConfigError
from crackle.hostnet import rules
from crackle.hostnet.host import refusal

_FORWARD = "net/ipv4/ip_forward"


def write(text: str) -> None:
    """Do what `text` says, all of it or nothing."""
    _nft(text)


def sets(name: str) -> dict[str, list[IPv4Network]]:
    """The sets of addresses in a network's table, as they are; none when there is no such table."""
    table = rules.PREFIX + name
    if not any(each["name"] == table and each["family"] == "ip" for each in _list("table", "tables")):
        return {}
    found = _list("set", "table", "ip", table)
    return {
        each["name"]: [range_ for element in each.get("elem", []) for range_ in _ranges(element)]
        for each in found
        if each["type"] == "ipv4_addr"
    }


def _ranges(element: Any) -> list[IPv4Network]:
    if isinstance(element, str):
        return [IPv4Network(element)]
    if "prefix" in element:
        return [IPv4Network((element["prefix"]["addr"], element["prefix"]["len"]))]
    first, last = element["range"]
    return list(summarize_address_range(IPv4Address(first), IPv4Address(last)))


def orphans(bridges: set[str]) -> list[str]:
    """Bridges that are no more, but whose tables are."""
    names = {table["name"] for table in _list("table", "tables")}
    ours = {name.removeprefix(rules.PREFIX) for name in names if name.startswith(rules.PREFIX)}
    return sorted(ours - bridges)


def set_switch(path: str, value: int) -> None:
    """Write a number to a file of /proc/sys."""
    path = f"/proc/sys/{path}"
    try:
        with open(path, "w") as file:
            file.write(str(value))
    except OSError as error:
        raise refusal(f"Cannot write {path}, which networks need", error.errno) from None


def forwards() -> bool:
    """Whether Linux forwards packets."""
    try:
        with open(f"/proc/sys/{_FORWARD}", "rb") as file:
            return file.read().strip() != b"0"
    except OSError as error:
        raise refusal(f"Cannot read /proc/sys/{_FORWARD}", error.errno) from None


def set_forwarding(on: bool) -> None:
    """Make Linux forward packets or not."""
    set_switch(_FORWARD, int(on))


def others_forward() -> bool:
    """Whether somebody else filters or translates what is forwarded, and so wants it to be."""
    hooks = ("forward", "prerouting", "postrouting")
    for chain in _list("chain", "chains"):
        if chain.get("hook") in hooks and not chain["table"].startswith(rules.PREFIX):
            return True
    # The older iptables, which nft does not list.
    try:
        with open("/proc/thread-self/net/ip_tables_names", "rb") as file:
            return bool({b"filter", b"nat"} & set(file.read().split()))
    except OSError:
        return False


def find_nft() -> str | None:
    """The path of nft, which an ordinary user's PATH may not lead to."""
    return shutil.which("nft", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def _list(kind: str, *what: str) -> list[dict[str, Any]]:
    """The objects of a kind in what `nft list` says."""
    found = json.loads(_nft("", "--json", "list", *what))["nftables"]
    return [item[kind] for item in found if kind in item]


def _nft(commands: str, *arguments: str) -> str:
    """What nft prints on doing what `arguments` say, or else `commands`, all or none. ConfigError if it does not."""
    program = find_nft()
    if program is None:
        raise ConfigError("Networks need the program nft, to keep them closed: install the package nftables.")
    # In a session of its own, so that Ctrl-C does not end it half way through what is being made or undone. Names that
    # others have given to their tables and interfaces are bytes.
    try:
        done = subprocess.run(
            [program, *(arguments or ("-f", "-"))],
            input=commands,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(f"Cannot run {program}: {os.strerror(error.errno or 0)}.") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        if "not permitted" in reason:
            raise refusal("nft may not change the packet filter", errno.EPERM)
        raise ConfigError(f"nft could not change the packet filter: {reason}")
    return done.stdout
