"""`crackle snapshot`: what is in a snapshot, and differential ones merged into their bases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Snapshots: look at them, merge differential ones.")


@app.command()
def show(
    state: Annotated[Path, typer.Argument(help="State file, or the directory of a snapshot.")],
) -> None:
    """Show what a snapshot was taken of."""
    from crackle.snapshot.inspect import describe

    for name, value in describe(str(state / "state" if state.is_dir() else state)):
        print(f"{name + ':':<13}{value}")


@app.command()
def rebase(
    base: Annotated[Path, typer.Option("--base", help="Memory file that gets the changes.")],
    diff: Annotated[Path, typer.Option("--diff", help="Memory file of a differential snapshot.")],
) -> None:
    """Merge the memory file of a differential snapshot into that of the snapshot before it.

    The base then belongs to the state file of the differential snapshot. It is replaced as a whole, or not at all.
    """
    from crackle.snapshot.inspect import rebase

    rebase(str(base), str(diff))
