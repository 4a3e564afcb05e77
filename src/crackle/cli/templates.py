"""The options that say what a clone has of its own, for every command that makes some."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crackle.errors import ConfigError

if TYPE_CHECKING:
    from crackle.schema import jail as schema
    from crackle.vmm.identity import CloneOptions

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
Handler = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="Socket of a page-fault handler, as of `crackle snapshot serve`."),
]
Jail = Annotated[
    str | None,
    typer.Option(
        metavar="USER[:GROUP]",
        help="Run each clone in a jail: a process of this user and group, numbers to which that of the clone is added.",
    ),
]
CoreScheduling = Annotated[
    bool,
    typer.Option(
        "--core-scheduling", help="Share no core with other processes where cores have several threads."
    ),
]


def options_of(
    identifier: Id = None,
    tap: Tap = None,
    mac: Mac = None,
    drive: Drive = None,
    overlay: Overlay = None,
    vsock: Vsock = None,
    metadata: Metadata = None,
    handler: Handler = None,
    jail: Jail = None,
    core_scheduling: CoreScheduling = False,
) -> CloneOptions:
    """What `Snapshot.clone` wants, of what was typed. ConfigError for what cannot be meant."""
    import json

    from crackle.errors import os_reason
    from crackle.schema.drive import Overlay as Layer

    options: CloneOptions = {
        "interfaces": pairs("--tap", tap),
        "macs": pairs("--mac", mac),
        "drives": pairs("--drive", drive),
        "overlays": {
            name: Layer(memory=True) if where == "memory" else where
            for name, where in pairs("--overlay", overlay).items()
        },
    }
    if identifier is not None:
        options["instance_id"] = identifier
    if vsock is not None:
        options["vsock"] = vsock
    if handler is not None:
        options["handler"] = handler
    if core_scheduling:
        options["core_scheduling"] = True
    if jail is not None:
        options["jail"] = _jail(jail, [vsock, *(where for _, where in pairs("--overlay", overlay).items())])
    if metadata is not None:
        try:
            options["metadata"] = json.loads(metadata.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the metadata: {os_reason(error)}: {metadata}") from None
        except ValueError as error:
            raise ConfigError(f"the metadata is no JSON: {error}: {metadata}") from None
    return options


def _jail(text: str, files: Sequence[str | None]) -> Callable[[int], schema.Jail]:
    """What makes the jail of each clone, which sees the folders in which these files are to be made."""
    from crackle.cli.boot import parse_user
    from crackle.schema import jail as schema

    user, group = parse_user(text)
    made = (file for file in files if file not in (None, "memory"))
    paths = tuple({os.path.dirname(os.path.abspath(str(file))) for file in made})
    return lambda index: schema.Jail(uid=user + index, gid=group + index, paths=paths)


def for_clones(*, without: Sequence[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function that is given `options`, by name: it has instead what `options_of` is given."""
    typed = [parameter for parameter in _parameters(options_of) if parameter.name not in without]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            options = options_of(**{parameter.name: given.pop(parameter.name) for parameter in typed})
            function(**given, options=options)

        parameters = [parameter for parameter in _parameters(function) if parameter.name != "options"] + typed
        # Where typer looks for what a command takes.
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    # A type that is not imported here.
    signature = inspect.signature(function, locals={"CloneOptions": Any}, eval_str=True)
    return list(signature.parameters.values())


def pairs(option: str, given: Sequence[str] | None, form: str = "NAME=TEMPLATE") -> dict[str, str]:
    """From words of that form. ConfigError."""
    found = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{option} wants {form}, not {text!r}")
        found[name] = value
    return found
