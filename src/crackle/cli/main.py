"""`crackle`: the command for a person. Its subcommands are thin; the work is in the library."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated

import typer

from crackle.cli import disk as disk_commands
from crackle.cli import end_on_interrupt, interrupt_by_exception, templates
from crackle.cli import net as network_commands
from crackle.cli import snapshot as snapshot_commands
from crackle.errors import ConfigError, CrackleError, reason_of
from crackle.hostnet import DEFAULT_NETWORK
from crackle.runtime.stream import open_standard_streams
from crackle.schema.machine import MAX_VCPUS

if TYPE_CHECKING:
    from crackle.schema.net import NetworkInterface
    from crackle.vmm.identity import CloneOptions

app = typer.Typer(
    name="crackle",
    help="MicroVMs on Linux KVM.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

app.add_typer(disk_commands.app, name="disk")
app.add_typer(network_commands.app, name="net")
app.add_typer(snapshot_commands.app, name="snapshot")


def _show_version(wanted: bool) -> None:
    if wanted:
        from crackle.version import VERSION

        print(f"crackle {VERSION}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command()
def run(
    kernel: Annotated[
        str | None, typer.Argument(metavar="KERNEL", help="Kernel: an uncompressed vmlinux or a bzImage.")
    ] = None,
    rootfs: Annotated[
        str | None,
        typer.Argument(metavar="ROOTFS", help="Image of the root file system; becomes /dev/vda."),
    ] = None,
    kernel_option: Annotated[
        str | None, typer.Option("--kernel", metavar="KERNEL", help="The same as the first argument.")
    ] = None,
    rootfs_option: Annotated[
        str | None, typer.Option("--rootfs", metavar="ROOTFS", help="The same as the second argument.")
    ] = None,
    initrd: Annotated[str | None, typer.Option(help="Initial RAM disk.")] = None,
    drive: Annotated[list[str] | None, typer.Option(help="Another disk image; may be repeated.")] = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, max=MAX_VCPUS, help="Number of vCPUs.", show_default="1")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Guest memory: 512 (MiB), 512M, 2G.", show_default="256M"),
    ] = None,
    cpu_template: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="What the guest sees of its processor: T2A, or a file with a template."
        ),
    ] = None,
    boot_args: Annotated[str | None, typer.Option(help="Kernel command line instead of the default.")] = None,
    append: Annotated[
        list[str] | None,
        typer.Option("--append", "-a", help="More for the kernel command line; may be repeated."),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Give the guest the root disk read-only.")
    ] = False,
    overlay: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File that takes the writes to the root disk, made if it is not there; memory: none, they are lost.",
        ),
    ] = None,
    vsock: Annotated[
        str | None, typer.Option(metavar="PATH", help="Unix socket that leads to the guest's vsock ports.")
    ] = None,
    balloon: Annotated[
        int | None,
        typer.Option(
            metavar="MIB", help="Give the guest a balloon that takes so much of its memory at first; often 0."
        ),
    ] = None,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="Give the guest the host's random numbers, as /dev/hwrng.")
    ] = False,
    metadata: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JSON file that the guest finds at 169.254.169.254; with --net."),
    ] = None,
    api_sock: Annotated[
        str | None, typer.Option(metavar="PATH", help="Serve the API on this Unix socket as well.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Configuration file, as crackle-vmm's; the other options come on top."
        ),
    ] = None,
    net: Annotated[
        bool,
        typer.Option("--net", help="Give the guest a network: address, way out through this host, name."),
    ] = False,
    name: Annotated[str | None, typer.Option(help="The guest's name on its network.")] = None,
    network: Annotated[str, typer.Option(help="The network that --net joins, or makes for this run.")] = (
        DEFAULT_NETWORK
    ),
    allow_host: network_commands.AllowHost = False,
    allow_lan: network_commands.AllowLan = False,
    allow: network_commands.Allow = None,
    jail: Annotated[
        str | None,
        typer.Option(
            metavar="USER[:GROUP]",
            help="Run the guest in a jail: a process of this user, a number, that sees kernel and disks and no more.",
        ),
    ] = None,
    core_scheduling: templates.CoreScheduling = False,
) -> None:
    """Boot a microVM with its console on this terminal. Ctrl-] asks it to shut down; twice pulls the plug.

    The exit status is 0 when the guest shut down, 1 when it failed or could not be started, 143 when the plug was
    pulled.
    """
    from crackle.cli import boot
    from crackle.cli.run import run as run_microvm

    wanted = boot.Wanted(
        kernel=_either("kernel", kernel, kernel_option),
        rootfs=_either("root disk", rootfs, rootfs_option),
        initrd=initrd,
        drives=drive or (),
        cpus=cpus,
        memory=None if memory is None else boot.parse_memory(memory),
        boot_args=boot_args,
        append=append or (),
        read_only=read_only,
        overlay=overlay,
        vsock=vsock,
        balloon=balloon,
        entropy=entropy,
        metadata=metadata,
        config=config,
        jail=jail,
        core_scheduling=core_scheduling,
        cpu_template=cpu_template,
    )
    if not net and (name is not None or network != DEFAULT_NETWORK or allow_host or allow_lan or allow):
        raise ConfigError("--name, --network and --allow... say what --net is to do: give --net as well.")
    arguments = boot.options(wanted)
    if metadata is not None and not (net or arguments.get("interfaces")):
        raise ConfigError("--metadata is for guests with a network: give --net as well.")
    interfaces: list[NetworkInterface] = []
    if jail is not None and api_sock is not None:
        # The process in the jail serves it.
        arguments["api_sock"], api_sock = api_sock, None
    with boot.listening(api_sock) as listener:
        attending = functools.partial(boot.attending, listener)
        if not net:
            status = run_microvm(functools.partial(boot.make, arguments, interfaces), attending)
        else:
            allowed = network_commands.openings(allow_host, allow_lan, allow)
            with network_commands.attached(name, network, allowed) as place:
                arguments["boot_args"] = f"{arguments['boot_args']} {place.boot_argument()}"
                interfaces = [network_commands.interface(place)]
                status = run_microvm(functools.partial(boot.make, arguments, interfaces), attending)
    raise typer.Exit(status)


def _either(what: str, argument: str | None, option: str | None) -> str | None:
    if argument is not None and option is not None:
        raise ConfigError(f"The {what} is given twice: {argument} and {option}.")
    return argument if argument is not None else option


@app.command()
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="For programs: the same as one JSON object.")
    ] = False,
    production: Annotated[
        bool,
        typer.Option(
            "--production", help="Show instead whether it is fit for strangers' code, and what is not."
        ),
    ] = False,
) -> None:
    """Show what this host offers, and whether Linux guests run on its KVM.

    The exit status is 0 when they do; with --production, when there is no problem.
    """
    if production:
        from crackle.cli import production as checks

        found = checks.report()
        (checks.render_json if as_json else checks.render)(found)
        raise typer.Exit(0 if checks.is_fit(found) else 1)
    from crackle.cli.doctor import render, render_json, report, runs_linux

    rows = report()
    (render_json if as_json else render)(rows)
    raise typer.Exit(0 if runs_linux(rows) else 1)


@app.command()
def cni() -> None:
    """For container runtimes: a CNI plugin that gives a microVM the interface that another plugin has made.

    The call is in the environment (CNI_COMMAND, ...), its configuration on standard input. The same as `crackle-cni`,
    which can be linked into the runtime's plugin directory, as tc-redirect-tap too.
    """
    from crackle.hostnet.cni import run as call

    raise typer.Exit(call(os.environ, sys.stdin.buffer.read()))


@app.command()
@templates.for_clones()
def clone(
    snapshot: templates.Snapshot,
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="How many.")] = 1,
    *,
    options: CloneOptions,
) -> None:
    """Run microVMs that go on from a snapshot, each in a process of its own, until all have ended.

    In a template {index} stands for the number of the clone and {id} for its name. What the guests write is shown, each
    line behind the number of its clone. A signal ends all. The exit status is 1 when one of them failed, 143 when a
    signal ended them, and else 0.
    """
    from crackle.cli import clone as clones

    raise typer.Exit(clones.clone(snapshot, n, options))


@app.command()
@templates.for_clones()
def pool(
    snapshot: templates.Snapshot,
    socket: Annotated[Path, typer.Option(metavar="PATH", help="Unix socket at which it gives microVMs.")],
    size: Annotated[int, typer.Option(min=1, help="How many are kept ready.")] = 4,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="How many there may be, in use and ready.", show_default="no limit"),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long a client waits when none is ready.")
    ] = 0.0,
    *,
    options: CloneOptions,
) -> None:
    """Keep microVMs of a snapshot ready, and let one go on for whoever connects, for as long as he is connected.

    He gets a line of JSON with "id", "pid" and "vsock", or with "error" (no capacity), and then the guest's console.
    Templates are as for `crackle clone`.
    """
    from crackle.cli import clone as clones

    clones.serve_pool(snapshot, socket, size, limit, wait, options)


@app.command()
def zygote(
    socket: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Where it listens; else CRACKLE_ZYGOTE, /run/crackle/zygote or one in XDG_RUNTIME_DIR.",
        ),
    ] = None,
    spares: Annotated[
        int, typer.Option(min=0, max=64, help="Processes that are forked before there is a launcher.")
    ] = 0,
) -> None:
    """Keep a warm process, from which crackle-launch has microVMs in a millisecond, until a signal ends it.

    Those that it has started go on when it ends.
    """
    import os

    from crackle.cli.zygote import command

    words = command("--spares", str(spares), *(() if socket is None else ("--socket", socket)))
    os.execv(words[0], words)


_PER_CLONE = "{index} is the clone's number, {id} its name."


@app.command()
def fork(
    socket: Annotated[
        Path, typer.Argument(metavar="API_SOCK", help="Socket of the API of a microVM that runs.")
    ],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many clones.")] = 1,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE", help="Names, with {index} for the clone's number. [default: made up]"
        ),
    ] = None,
    api_sock: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE", help=f"Sockets of their APIs, else <name>.sock beside it. {_PER_CLONE}"
        ),
    ] = None,
    drive: templates.Drive = None,
    overlay: templates.Overlay = None,
    tap: templates.Tap = None,
    vsock: templates.Vsock = None,
    console: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="Files that take what their consoles say.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: what the API answers.")] = False,
) -> None:
    """Have clones of a running microVM go on from where it is, which goes on too.

    Each is a process of its own, and shares memory with the others until it writes to it. Shown are the name, the
    process and the API's socket of each. When one cannot be, there is none.
    """
    import json

    from crackle.cli import fork as forking

    answer = forking.fork(
        socket,
        count,
        names=name,
        api_sock=api_sock,
        drives=templates.pairs("--drive", drive),
        overlays=templates.pairs("--overlay", overlay),
        taps=templates.pairs("--tap", tap),
        vsock=vsock,
        console=console,
    )
    if as_json:
        print(json.dumps(answer))
        return
    for clone in answer["clones"]:
        print(clone["id"], clone["pid"], clone["api_sock"])


@app.command()
def version() -> None:
    """Show the version."""
    _show_version(True)


def main() -> None:
    """The console script."""
    open_standard_streams()
    try:
        interrupt_by_exception()
        try:
            app()
        finally:
            # There is nothing more to clean up.
            end_on_interrupt()
    except KeyboardInterrupt:
        sys.exit(128 + SIGINT)
    except Exception as error:
        reason = str(error) if isinstance(error, CrackleError) else reason_of(error)
        if reason is None:
            raise
        print(f"crackle: {reason}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
