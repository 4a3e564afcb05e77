"""The options that say what a clone has of its own, for every command that makes some."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Snapshot = Annotated[Path, typer.Argument(metavar="SNAPSHOT", help="Directory of the snapshot.")]
Id = Annotated[str | None, typer.Option("--id", metavar="TEMPLATE", help="Name of each clone.")]
Tap = Annotated[
    list[str] | None,
    typer.Option(
        metavar="IFACE=TEMPLATE", help="TAP device of an interface, as eth0=tap{index}; may be repeated."
    ),
]
Mac = Annotated[
    list[str] | None,
    typer.Option(metavar="IFACE=TEMPLATE", help="Another MAC address, for a guest that looks at it again."),
]
Drive = Annotated[
    list[str] | None,
    typer.Option(metavar="DRIVE=TEMPLATE", help="Another file for a drive; may be repeated."),
]
Overlay = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DRIVE=TEMPLATE",
        help="Overlay that takes the writes to a drive, as rootfs={id}.overlay, or rootfs=memory; may be repeated.",
    ),
]
Vsock = Annotated[
    str | None, typer.Option(metavar="TEMPLATE", help="Path of the vsock device's Unix socket.")
]
Metadata = Annotated[Path | None, typer.Option(metavar="FILE", help="JSON file with the metadata.")]
