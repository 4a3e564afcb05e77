"""NAT for a network: an nftables table of its own, and the switch that makes Linux forward packets.

The table is made and removed as a whole by the `nft` program, in one transaction. It lets guests out under the host's
address and lets in what answers them; nothing else from outside gets to a guest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from crackle.errors import ConfigError
from crackle.hostnet import plan

if TYPE_CHECKING:
    from ipaddress import IPv4Network

_FORWARD = "/proc/sys/net/ipv4/ip_forward"
_PREFIX = "crackle-"


def add(bridge: str, range_: IPv4Network) -> None:
    """Make the table of the network with this bridge."""
    _nft(f"""
        table ip {_PREFIX}{bridge} {{
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                ip saddr {range_} oifname != "{bridge}" masquerade
            }}
            chain forward {{
                type filter hook forward priority filter; policy accept;
                oifname "{bridge}" iifname != "{bridge}" ct state != {{ established, related }} drop
            }}
        }}
    """)


def remove(bridge: str) -> None:
    """Remove the table, if it is there."""
    # Adding it first makes removing it work either way.
    _nft(f"table ip {_PREFIX}{bridge}\ndelete table ip {_PREFIX}{bridge}")


def orphans(bridges: set[str]) -> list[str]:
    """Bridges that are no more, but whose tables are."""
    tables = [item["table"] for item in _list("tables") if "table" in item]
    names = [table["name"].removeprefix(_PREFIX) for table in tables if table["name"].startswith(_PREFIX)]
    return [name for name in names if name not in bridges]


def forwards() -> bool:
    """Whether Linux forwards packets."""
    with open(_FORWARD) as file:
        return file.read().strip() != "0"


def set_forwarding(on: bool) -> None:
    """Make Linux forward packets or not."""
    try:
        with open(_FORWARD, "w") as file:
            file.write("1" if on else "0")
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(f"Cannot change net.ipv4.ip_forward, which NAT needs: {reason}.") from None


def others_forward() -> bool:
    """Whether somebody else filters or translates what is forwarded, and so wants it to be."""
    chains = [item["chain"] for item in _list("chains") if "chain" in item]
    hooks = ("forward", "prerouting", "postrouting")
    if any(chain.get("hook") in hooks and not chain["table"].startswith(_PREFIX) for chain in chains):
        return True
    # The older iptables, which nft does not list.
    try:
        with open("/proc/thread-self/net/ip_tables_names") as file:
            return bool({"filter", "nat"} & set(file.read().split()))
    except OSError:
        return False


def find_nft() -> str | None:
    """The path of nft, which an ordinary user's PATH may not lead to."""
    return shutil.which("nft", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def _list(what: str) -> list[dict[str, dict[str, str]]]:
    found: list[dict[str, dict[str, str]]] = json.loads(_nft("", "--json", "list", what))["nftables"]
    return found


def _nft(commands: str, *arguments: str) -> str:
    """What nft prints on doing what `arguments` say, or else `commands`, all or none. ConfigError if it does not."""
    program = find_nft()
    if program is None:
        raise ConfigError(
            "NAT needs the program nft: install the package nftables, or go without (--no-nat)."
        )
    # In a session of its own, so that Ctrl-C does not end it half way through what is being made or undone.
    done = subprocess.run(
        [program, *(arguments or ("-f", "-"))],
        input=commands,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        if "not permitted" in reason:
            raise ConfigError(plan.NOT_ALLOWED)
        raise ConfigError(f"nft could not change the packet filter: {reason}")
    return done.stdout
