"""`crackle net`: networks for microVMs; and `attached`, which is what `crackle run --net` does."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from crackle.hostnet import DEFAULT_NETWORK

if TYPE_CHECKING:
    from crackle.hostnet.networks import Attachment
    from crackle.hostnet.plan import Bridge, Openings, Tap
    from crackle.schema.net import NetworkInterface

# What is imported only when a network is touched: pyroute2 takes a quarter of a second.

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

app = typer.Typer(
    no_args_is_help=True,
    help="Networks for microVMs: a bridge, a TAP device for each guest, and what it may reach.",
)

NetworkName = Annotated[str, typer.Argument(help="Name of the network, which is its bridge's too.")]
AllowHost = Annotated[
    bool, typer.Option("--allow-host", help="Let guests use the services of this host, on all its addresses.")
]
AllowLan = Annotated[
    bool,
    typer.Option("--allow-lan", help="Let guests reach private addresses and the networks this host is on."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="CIDR", help="Let guests reach this range or address; may be repeated."),
]
OnNetwork = Annotated[str, typer.Option("--network", help="Name of the network.")]


@app.command()
def up(
    network: NetworkName = DEFAULT_NETWORK,
    addresses: Annotated[
        str | None, typer.Option("--range", help="Address range, like 10.1.2.0/24; by default a free one.")
    ] = None,
    nat: Annotated[bool, typer.Option(help="Let guests reach the world through this host.")] = True,
    allow_host: AllowHost = False,
    allow_lan: AllowLan = False,
    allow: Allow = None,
) -> None:
    """Make a network that stays until it is taken down; leave it as it is if it is there.

    Guests reach the world; this host, its LAN, metadata services and each other only where that is allowed.
    `crackle run --net` makes a network for itself where there is none.
    """
    from crackle.hostnet import networks
    from crackle.hostnet.plan import parse_range

    range_ = None if addresses is None else parse_range(addresses)
    found, made = networks.up(network, range_, use_nat=nat, openings=openings(allow_host, allow_lan, allow))
    there = "" if made else ", there already"
    print(f"{found.name}: {found.mark.range}, gateway {found.mark.gateway}{there}")


@app.command("ls")
def list_() -> None:
    """List networks and the microVMs on them, in the format of /etc/hosts."""
    from crackle.hostnet import networks

    for network in networks.networks():
        notes = [f"gateway {network.mark.gateway}", "NAT" if network.mark.nat else "no NAT"]
        notes += _allowed(network.mark)
        if network.mark.automatic:
            notes.append("goes with its last microVM")
        print(f"# {network.name}: {network.mark.range}, {', '.join(notes)}")
        for member in network.members:
            notes = [member.tap] + ([] if member.running else ["not running"])
            notes += _allowed(member.mark)
            if member.mark.owner is not None:
                notes.append(f"process {member.mark.owner[0]}")
            print(f"{member.mark.address}\t{member.mark.name}\t# {', '.join(notes)}")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the microVM.")],
    network: OnNetwork = DEFAULT_NETWORK,
    user: Annotated[int | None, typer.Option(help="User id that may open the TAP device.")] = None,
    allow_host: AllowHost = False,
    allow_lan: AllowLan = False,
    allow: Allow = None,
) -> None:
    """Make a TAP device for a microVM that crackle-vmm will run.

    Prints the body for PUT /network-interfaces/eth0 and the argument for the guest's kernel command line.
    """
    import msgspec

    from crackle.hostnet import networks

    allowed = openings(allow_host, allow_lan, allow)
    place = networks.attach(name, network, user=user, openings=allowed)
    given = {
        name: value for name, value in msgspec.to_builtins(interface(place)).items() if value is not None
    }
    print(msgspec.json.encode(given).decode())
    print(place.boot_argument())


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Name of the microVM.")],
    network: OnNetwork = DEFAULT_NETWORK,
    force: Annotated[bool, typer.Option("--force", help="Even if the microVM is running.")] = False,
) -> None:
    """Remove a microVM's TAP device."""
    from crackle.hostnet import networks

    networks.detach(name, network, force=force)


@app.command()
def down(
    network: NetworkName = DEFAULT_NETWORK,
    force: Annotated[bool, typer.Option("--force", help="Even if microVMs are running on it.")] = False,
) -> None:
    """Take a network down: bridge, TAP devices, rules, and packet forwarding if it was turned on for it."""
    from crackle.hostnet import networks

    networks.down(network, force=force)


def openings(host: bool, lan: bool, ranges: Sequence[str] | None) -> Openings:
    """What the options say that guests may reach."""
    from crackle.hostnet.plan import Openings, parse_opening

    return Openings(host, lan, tuple(map(parse_opening, ranges or ())))


def _allowed(mark: Bridge | Tap) -> list[str]:
    return [f"may reach the {what}" for what, open_ in (("host", mark.host), ("LAN", mark.lan)) if open_]


def interface(place: Attachment) -> NetworkInterface:
    """The guest's interface for its place on a network. It cannot speak under another MAC address than its own."""
    from crackle.schema.net import NetworkInterface

    return NetworkInterface("eth0", place.tap, place.mac, place.mtu, drop_spoofed_mac=True)


@contextmanager
def attached(name: str | None, network: str, allowed: Openings | None = None) -> Iterator[Attachment]:
    """A place on a network for the microVM in this block. However the block ends, it is given back.

    A signal that asks the process to end ends the block first; then the process exits with 128 and its number.
    """
    from crackle.hostnet import networks
    from crackle.hostnet.plan import Openings

    with contextlib.closing(_Ending()) as ending:
        place = networks.attach(name, network, owner=os.getpid(), openings=allowed or Openings())
        try:
            with ending:
                yield place
        finally:
            networks.detach(place.name, network, owner=os.getpid())


class _Ending:
    """Signals that ask the process to end: noted from the beginning to `close`; in the block they end it, once."""

    def __init__(self) -> None:
        self._open = False
        self._noted = 0
        self._before = {number: signal.signal(number, self._note) for number in _ENDING}

    def __enter__(self) -> None:
        self._open = True
        if self._noted:
            self._note(self._noted, None)

    def __exit__(self, *exc: object) -> None:
        self._open = False

    def _note(self, number: int, _frame: object) -> None:
        self._noted = number
        if self._open:
            self._open = False
            sys.exit(128 + number)

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._noted:
            sys.exit(128 + self._noted)
