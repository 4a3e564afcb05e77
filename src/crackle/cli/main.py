"""`crackle`: the command for a person. Its subcommands are thin; the work is in the library."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from crackle.cli import net as network_commands
from crackle.errors import ConfigError, CrackleError
from crackle.hostnet import DEFAULT_NETWORK

if TYPE_CHECKING:
    from crackle.schema.net import NetworkInterface

app = typer.Typer(
    name="crackle",
    help="MicroVMs on Linux KVM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(network_commands.app, name="net")


@app.command()
def run(
    kernel: Annotated[str, typer.Option(help="Kernel: an uncompressed vmlinux or a bzImage.")],
    rootfs: Annotated[
        str | None, typer.Option(help="Image of the root file system; becomes /dev/vda.")
    ] = None,
    initrd: Annotated[str | None, typer.Option(help="Initial RAM disk.")] = None,
    drive: Annotated[list[str] | None, typer.Option(help="Another disk image; may be repeated.")] = None,
    cpus: Annotated[int, typer.Option(min=1, max=32, help="Number of vCPUs.")] = 1,
    memory: Annotated[int, typer.Option(min=1, help="Guest memory in MiB.")] = 256,
    boot_args: Annotated[str | None, typer.Option(help="Kernel command line instead of the default.")] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Give the guest the root disk read-only.")
    ] = False,
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
) -> None:
    """Boot a microVM with its console on this terminal. Ctrl-] ends it.

    The exit status is 0 when the guest shut itself down, 1 when it failed or could not be started.
    """
    from crackle.cli.run import run as run_microvm
    from crackle.vmm.microvm import DEFAULT_BOOT_ARGS

    arguments = DEFAULT_BOOT_ARGS if boot_args is None else boot_args
    interfaces: list[NetworkInterface] = []

    def boot(console: tuple[int, int]) -> None:
        from crackle import MicroVM

        with MicroVM(
            kernel,
            rootfs,
            initrd=initrd,
            drives=drive or (),
            cpus=cpus,
            memory=memory,
            boot_args=arguments,
            read_only=read_only,
            interfaces=interfaces,
            console=console,
        ) as vm:
            vm.wait()

    if not net:
        if name is not None or network != DEFAULT_NETWORK or allow_host or allow_lan or allow:
            raise ConfigError("--name, --network and --allow... say what --net is to do: give --net as well.")
        raise typer.Exit(run_microvm(boot))
    allowed = network_commands.openings(allow_host, allow_lan, allow)
    with network_commands.attached(name, network, allowed) as place:
        arguments = f"{arguments} {place.boot_argument()}"
        interfaces = [network_commands.interface(place)]
        status = run_microvm(boot)
    raise typer.Exit(status)


@app.command()
def doctor() -> None:
    """Show what this host offers, and whether Linux guests run on its KVM.

    The exit status is 0 when they do.
    """
    from crackle.cli.doctor import render, report, runs_linux

    rows = report()
    render(rows)
    raise typer.Exit(0 if runs_linux(rows) else 1)


@app.command()
def version() -> None:
    """Show the version."""
    from importlib.metadata import version as installed

    print(f"crackle {installed('crackle')}")


def main() -> None:
    """The console script."""
    try:
        app()
    except CrackleError as error:
        print(f"crackle: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
