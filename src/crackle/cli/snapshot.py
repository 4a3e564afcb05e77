"""`crackle snapshot`: what is in a snapshot, seen, changed, merged, served and warmed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crackle.cli import templates

if TYPE_CHECKING:
    from crackle.vmm.identity import CloneOptions

app = typer.Typer(no_args_is_help=True, help="Snapshots: look at them, change, merge, serve and warm them.")


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


@app.command()
def edit(
    state: Annotated[Path, typer.Argument(help="State file, or the directory of a snapshot.")],
    drive: Annotated[
        list[str] | None, typer.Option(metavar="ID=PATH", help="Another file for a drive; may be repeated.")
    ] = None,
    interface: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=TAP", help="Another TAP device for an interface; may be repeated."),
    ] = None,
    vsock: Annotated[
        str | None, typer.Option(metavar="PATH", help="Another path for the vsock device's socket.")
    ] = None,
    instance_id: Annotated[str | None, typer.Option("--id", help="Another instance id.")] = None,
) -> None:
    """Have a snapshot name other files, TAP devices or sockets. What the guest knows of them stays as it is.

    The state file is replaced as a whole, or not at all; the memory file is the same.
    """
    from crackle.snapshot.inspect import edit

    edit(
        str(state / "state" if state.is_dir() else state),
        drives=templates.pairs("--drive", drive, "ID=PATH"),
        interfaces=templates.pairs("--interface", interface, "ID=TAP"),
        vsock=vsock,
        instance_id=instance_id,
    )


@app.command()
def serve(
    snapshot: Annotated[Path, typer.Argument(help="Memory file, or the directory of a snapshot.")],
    socket: Annotated[
        str, typer.Option("--socket", metavar="PATH", help="Unix socket for whoever loads the snapshot.")
    ],
    record: Annotated[
        bool, typer.Option("--record", help="Note anew which pages a microVM wants first.")
    ] = False,
) -> None:
    """Give the memory of a snapshot to the microVMs that load it (mem_backend "Uffd"), until Ctrl-C.

    What the first of them wants in its first ten seconds is noted beside the memory file, and read ahead for others.
    """
    import contextlib
    import os
    import sys

    from crackle.snapshot.handler import Handler, listen

    def report(sentence: str) -> None:
        print(f"crackle snapshot serve: {sentence}", file=sys.stderr)

    memory = snapshot / "memory" if snapshot.is_dir() else snapshot
    listener = listen(socket)
    try:
        handler = Handler(str(memory), listener, report, record=record)
        try:
            handler.serve()
        finally:
            handler.close()
    finally:
        with contextlib.suppress(OSError):
            os.unlink(socket)


@app.command()
@templates.for_clones(without=("identifier", "mac", "handler", "jail", "core_scheduling"))
def warm(
    snapshot: templates.Snapshot,
    seconds: Annotated[float, typer.Option(min=0.001, help="How long the guest runs.")] = 10.0,
    *,
    options: CloneOptions,
) -> None:
    """Note which pages of a snapshot's memory a microVM wants first, for `crackle snapshot serve` to read ahead.

    One clone runs for a while, and is stopped. What it writes to drives that are not named is kept in memory. Templates
    are as for `crackle clone`.
    """
    from crackle.snapshot.workingset import path_beside
    from crackle.vmm.clones import Snapshot

    options["console"] = lambda _index: (-1, -1)
    with Snapshot(snapshot) as saved:
        size = saved.warm(seconds, **options)
        print(f"{size / (1 << 20):.1f} MiB are read ahead from now on: {path_beside(saved.paths[1])}")
