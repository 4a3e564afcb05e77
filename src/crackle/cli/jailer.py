"""``crackle-jailer``: one microVM in a process that can reach nothing else; Firecracker's jailer's command line.

It executes nothing: this process, or one forked from it, enters the jail and becomes crackle-vmm.
"""

from __future__ import annotations

import gc
import os
import time

from crackle.cli import end_on_interrupt, interrupt_by_exception, vmm
from crackle.errors import CrackleError
from crackle.jail.entry import enter, monitor_arguments
from crackle.jail.options import help_text, parse
from crackle.monitor import options as monitor_options
from crackle.runtime.commandline import UsageError
from crackle.runtime.stream import open_standard_streams
from crackle.runtime.system import close_from
from crackle.version import FIRECRACKER_VERSION, VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

EXIT_OK = 0
EXIT_ERROR = 1


def main() -> NoReturn:
    """The console script: runs :func:`run` and exits with its status."""
    vmm.exit_as(run)


def run(arguments: list[str], connection: int | None = None) -> int:
    """Be the jailer and then the monitor, to its end; the result is the exit status of the process.

    connection: a descriptor that stays open for as long as this process is what it was started as.
    """
    kept = () if connection is None else (connection,)
    started_us = time.monotonic_ns() // 1000
    gc.disable()
    open_standard_streams()
    close_from(3, kept)
    os.environ.clear()
    # It has something to take back.
    interrupt_by_exception()
    try:
        given = _enter(arguments, started_us, kept)
    except UsageError as error:
        _complain(f"Failed to parse arguments: {error}")
        return EXIT_ERROR
    except CrackleError as error:
        _complain(str(error))
        return EXIT_ERROR
    except KeyboardInterrupt:
        end_on_interrupt()
        os.kill(os.getpid(), 2)
    return EXIT_OK if given is None else vmm.run(given)


def _enter(arguments: list[str], started_us: int, kept: Sequence[int]) -> list[str] | None:
    """The arguments for the monitor that this process is from now on; None if something was asked for, and told."""
    jail = parse(arguments)
    if isinstance(jail, str):
        version = f"Jailer v{FIRECRACKER_VERSION}\n\nCrackle v{VERSION}"
        vmm.tell(f"{version}\n\n{help_text()}" if jail == "help" else version)
        return None
    try:
        monitor_options.parse(monitor_arguments(jail))
    except UsageError:
        # It will say so itself, with its own status; there need be no jail for that.
        return monitor_arguments(jail)
    vmm.load()
    return enter(jail, started_us, kept)


def _complain(message: str) -> None:
    try:
        os.write(2, f"{message}\n".encode(errors="backslashreplace"))
    except OSError:
        return


if __name__ == "__main__":
    main()
