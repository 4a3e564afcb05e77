"""``crackle-vmm``: one microVM in one process, with Firecracker's command line and API.

The API socket accepts before anything large is imported; what a client sends meanwhile waits in the socket.
"""

from __future__ import annotations

import gc
import os
import sys

from crackle.api.listener import listen
from crackle.cli import end_on_interrupt
from crackle.errors import ConfigError, CrackleError, os_reason, reason_of
from crackle.monitor.options import Options, help_text, parse
from crackle.runtime.commandline import UsageError
from crackle.runtime.filters import set_last_words, use_filters
from crackle.runtime.stream import open_standard_streams
from crackle.seccomp import default_filters
from crackle.telemetry.logger import Logger
from crackle.telemetry.sink import BAD_INPUT, Sink
from crackle.version import FIRECRACKER_VERSION, VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from typing import NoReturn

    from crackle.seccomp import Filters
    from crackle.vmm.shell import Shell

# Exit statuses, as Firecracker's.
EXIT_OK = 0
EXIT_ERROR = 1
EXIT_BAD_CONFIGURATION = 152
EXIT_BAD_ARGUMENTS = 153


class ExitError(CrackleError):
    """Ends the process with ``status`` after the message is shown."""

    def __init__(self, message: str, status: int = EXIT_ERROR) -> None:
        super().__init__(message)
        self.status = status


def main() -> NoReturn:
    """The console script: runs :func:`run` and exits with its status."""
    exit_as(run)


def exit_as(program: Callable[[list[str]], int]) -> NoReturn:
    """Run it with this process's arguments and exit with its status.

    At once: threads that Python ends when it finalizes load code for that, which no filter allows.
    """
    status = EXIT_ERROR
    try:
        status = program(sys.argv[1:])
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(status)


def prepare_shell() -> Shell | None:
    """What nearly every microVM will want; None where it cannot be made: then the microVM says why."""
    from crackle.schema.machine import default_machine_config
    from crackle.vmm.shell import Shell

    shell = Shell(default_machine_config(), on_thread=False)
    if shell.is_whole:
        return shell
    shell.close()
    return None


def load() -> None:
    """Import everything that any microVM may want, for a process where nothing can be imported later, or should be."""
    # As _serve does: msgspec would import it where it is installed.
    sys.modules.setdefault("typing_extensions", None)  # type: ignore[arg-type]
    import crackle.monitor.process
    import crackle.seccomp.custom  # noqa: F401
    from crackle.api import routes
    from crackle.vmm.preload import preload_all

    preload_all()
    routes.make_ready()
    default_filters()
    if sys.modules["typing_extensions"] is None:
        del sys.modules["typing_extensions"]


def run(arguments: list[str], shell: Shell | None = None) -> int:
    """Run a microVM to its end; the result is the exit status of the process. shell: what there is for it already."""
    # Nothing made during start-up is garbage: collecting then would only cost time.
    gc.disable()
    open_standard_streams()
    # Until the loop takes signals.
    end_on_interrupt()
    logger: Logger | None = None
    try:
        logger = Logger()
        try:
            options = parse(arguments)
        except UsageError as error:
            raise ExitError(
                f"Arguments parsing error: {error} For more information try --help.", EXIT_BAD_ARGUMENTS
            ) from None
        if "help" in options:
            tell(f"{_versions()}\n\n{help_text()}")
            return EXIT_OK
        if "version" in options:
            tell(_versions())
            return EXIT_OK
        if "snapshot-version" in options or "describe-snapshot" in options:
            tell(_snapshot_version(options.value("describe-snapshot")))
            return EXIT_OK
        status = _serve(options, logger, shell)
    except Exception as error:
        message = str(error) if isinstance(error, CrackleError) else f"{reason_of(error) or repr(error)}."
        status = error.status if isinstance(error, ExitError) else EXIT_ERROR
        _complain(message)
        if logger is None:
            return status
        logger.error(message)
    if status == EXIT_OK:
        logger.info("Crackle exiting successfully. exit_code=0")
    else:
        logger.error(f"Crackle exiting with error. exit_code={status}")
    return status


def _versions() -> str:
    """Whose API is spoken, in the first line as clients read it, and what speaks it."""
    return f"Firecracker v{FIRECRACKER_VERSION}\n\nCrackle v{VERSION}"


def _complain(message: str) -> None:
    """Tell standard error, if it is there."""
    try:
        os.write(2, f"Error: {message}\n".encode(errors="backslashreplace"))
    except OSError:
        return


def tell(text: str) -> None:
    """Print what was asked for. A reader that leaves early has what it wanted."""
    left = f"{text}\n".encode()
    try:
        while left:
            left = left[os.write(1, left) :]
    except BrokenPipeError:
        return
    except OSError as error:
        raise ExitError(f"Cannot write to standard output: {os_reason(error)}.") from None


def _serve(options: Options, logger: Logger, shell: Shell | None) -> int:
    _refuse_unsupported(options)
    _configure_logger(options, logger)
    logger.info(f"Running Crackle v{VERSION}")
    metrics_sink = _open_metrics(options)
    filters = _given_filters(options)
    config_path = options.value("config-file")
    config = None if config_path is None else _read(config_path, "configuration file")
    metadata_path = options.value("metadata")
    metadata = None if metadata_path is None else _read(metadata_path, "mmds content file")
    listener = None
    if "no-api" not in options:
        path = options.value("api-sock") or ""
        listener = _listen(path)
        logger.info(f'Listening on API socket ("{path}").')

    # msgspec asks for typing_extensions, which costs 20 ms where it is installed, and does as well without.
    sys.modules.setdefault("typing_extensions", None)  # type: ignore[arg-type]
    try:
        from crackle.schema.machine import default_machine_config
        from crackle.vmm.shell import Shell

        # Threads that are born from now on have them; this one, when the guest starts.
        use_filters(None if "no-seccomp" in options else filters or default_filters())
        set_last_words(*logger.last_words())
        # Most clients configure and start a machine at once: begin with the default one while the rest is imported.
        if shell is None and config is None:
            shell = Shell(default_machine_config())
        from crackle.monitor.process import VmmProcess

        if sys.modules["typing_extensions"] is None:
            del sys.modules["typing_extensions"]
        process = VmmProcess(options, logger, metrics_sink, listener, config, shell, metadata)
        gc.freeze()
        gc.enable()
        return process.run()
    except CrackleError as error:
        raise ExitError(str(error)) from None


def _snapshot_version(path: str | None) -> str:
    """The version of the format of a state file; without one, of those that this Crackle writes."""
    from crackle.snapshot.statefile import VERSION, describe, version_text

    if path is None:
        return version_text(VERSION)
    from crackle.snapshot.pair import read_state

    problem = "When printing Snapshot Data format"

    try:
        data = read_state(path)
    except ConfigError as error:
        raise ExitError(f"{problem}: Unable to open snapshot state file: {error}") from None
    try:
        return version_text(describe(data))
    except ConfigError as error:
        raise ExitError(f"{problem}: Invalid data format version of snapshot file: {error}: {path}") from None


def _refuse_unsupported(options: Options) -> None:
    for name, what in (("enable-pci", "PCI"),):
        if name in options:
            raise ExitError(f"Argument '{name}': Crackle does not support {what} yet.")


def _configure_logger(options: Options, logger: Logger) -> None:
    logger.instance_id = options.value("id") or logger.instance_id
    level = options.value("level")
    try:
        logger.set(
            None,
            level,
            True if "show-level" in options else None,
            True if "show-log-origin" in options else None,
            options.value("module"),
        )
    except ConfigError as error:
        raise ExitError(
            f"Invalid value for logger level: Failed to parse string to level filter: {error}",
            EXIT_BAD_CONFIGURATION,
        ) from None
    try:
        logger.set(options.value("log-path"), level)
    except ConfigError as error:
        raise ExitError(f"Could not initialize logger: {error}") from None


def _open_metrics(options: Options) -> Sink | None:
    path = options.value("metrics-path")
    if path is None:
        return None
    try:
        return Sink.open(path, f"Could not initialize metrics: {BAD_INPUT}")
    except ConfigError as error:
        raise ExitError(str(error)) from None


def _given_filters(options: Options) -> Filters | None:
    """A policy of the user's."""
    path = options.value("seccomp-filter")
    if path is None:
        return None
    from crackle.seccomp.custom import read_filters

    try:
        return read_filters(path)
    except ConfigError as error:
        raise ExitError(f"Seccomp error: {error}") from None


def _read(path: str, what: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except (OSError, ValueError, MemoryError) as error:
        raise ExitError(f"Unable to open or read from the {what}: {reason_of(error)}") from None


def _listen(path: str) -> socket:
    try:
        return listen(path)
    except ConfigError as error:
        raise ExitError(str(error)) from None


if __name__ == "__main__":
    main()
