"""`crackle disk`: overlays of disks, looked at, merged into what is below them, put over something else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, help="Overlays of disks: look at them, commit them, put them over another base."
)

Overlay = Annotated[Path, typer.Argument(metavar="OVERLAY", help="An overlay that no microVM uses.")]


@app.command()
def show(overlay: Annotated[Path, typer.Argument(metavar="OVERLAY", help="An overlay.")]) -> None:
    """Show what an overlay holds, over what it lies, and whether that is still as it was.

    The exit status is 1 when it is not.
    """
    from crackle.disk import describe

    broken = False
    for name, value in describe(str(overlay)):
        print(f"{name + ':':<8}{value}")
        broken |= name == "broken"
    if broken:
        raise typer.Exit(1)


@app.command()
def commit(overlay: Overlay) -> None:
    """Write what an overlay holds into what lies below it, and leave it empty.

    Other overlays over that can be used no more. What is interrupted is finished by doing it again.
    """
    from crackle.disk import commit

    commit(str(overlay))


@app.command()
def rebase(
    overlay: Overlay,
    below: Annotated[Path, typer.Argument(metavar="BASE", help="The disk that it is to lie over.")],
    is_overlay: Annotated[bool, typer.Option("--overlay", help="BASE is an overlay, too.")] = False,
    unchecked: Annotated[
        bool,
        typer.Option("--unchecked", help="BASE is what was below before, moved or copied: compare nothing."),
    ] = False,
) -> None:
    """Put an overlay over another disk of the same size, or over the base below all its layers.

    The disk that it shows stays the same: what differs is copied into it.
    """
    from crackle.disk import rebase

    rebase(str(overlay), str(below), overlay=is_overlay, checked=not unchecked)
