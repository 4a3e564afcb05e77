"""The command line of ``crackle-vmm``: Firecracker's options."""

from __future__ import annotations

from crackle.runtime.commandline import UsageError, help_lines, pairs
from crackle.telemetry.logger import DEFAULT_INSTANCE_ID, instance_id_problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_API_SOCK = "/run/firecracker.socket"

# Name: what its value is called (None for a switch), default, help.
OPTIONS: dict[str, tuple[str | None, str | None, str]] = {
    "api-sock": ("path", DEFAULT_API_SOCK, "Unix socket on which the API is served; it must not exist yet."),
    "boot-timer": (None, None, "Give the guest a boot timer device and log how long it took to boot."),
    "config-file": ("path", None, "Configure and start the microVM as this JSON file says."),
    "core-scheduling": (None, None, "Share no core with other processes where cores have several threads."),
    "describe-snapshot": ("path", None, "Print the format version of a snapshot."),
    "enable-pci": (None, None, "Attach devices by PCI. Not supported yet."),
    "exit-on-failed-load": (None, None, "End, with status 1, when a snapshot cannot be loaded."),
    "http-api-max-payload-size": ("bytes", "51200", "Largest body of an API request."),
    "id": ("id", DEFAULT_INSTANCE_ID, "Name of the microVM: 1 to 64 letters, digits and hyphens."),
    "level": ("level", None, "Least severe level that is logged: Off, Error, Warning, Info, Debug, Trace."),
    "log-path": ("path", None, "File or named pipe that takes the log; standard output without it."),
    "metadata": ("path", None, "JSON file with the metadata that the guest finds at first."),
    "metrics-path": ("path", None, "File or named pipe that takes the metrics."),
    "mmds-size-limit": (
        "bytes",
        None,
        "Largest metadata document; as --http-api-max-payload-size without it.",
    ),
    "module": ("prefix", None, "Log only what modules with this prefix say, as in crackle.vmm."),
    "no-api": (None, None, "Serve no API; needs --config-file."),
    "no-drive-locks": (
        None,
        None,
        "Let other microVMs write to this one's disks, unless a drive says otherwise.",
    ),
    "no-seccomp": (None, None, "Let the process make any system call. Not for production."),
    "own-metrics": (None, None, "Write the metrics that Firecracker does not have, too."),
    "parent-cpu-time-us": ("us", None, "CPU time the parent spent, for the start-up metric."),
    "seccomp-filter": ("path", None, "JSON file with a seccomp policy, which replaces the default one."),
    "show-level": (None, None, "Show the level in log lines."),
    "show-log-origin": (None, None, "Show file and line in log lines."),
    "snapshot-version": (None, None, "Print the format version of the snapshots that are written."),
    "start-time-cpu-us": ("us", None, "CPU time at the start of the process, for the start-up metric."),
    "start-time-us": ("us", None, "Monotonic time at the start of the process, for the start-up metric."),
    "version": (None, None, "Print the version and exit."),
}

_NUMBERS = (
    "http-api-max-payload-size",
    "mmds-size-limit",
    "parent-cpu-time-us",
    "start-time-cpu-us",
    "start-time-us",
)


class Options(dict[str, str]):
    """The options given, by name; a switch that is given has the value ``""``."""

    def value(self, name: str) -> str | None:
        """What was given, else the default, else None."""
        return self.get(name, OPTIONS[name][1])

    def number(self, name: str) -> int | None:
        """The same as a number, which :func:`parse` has checked."""
        text = self.value(name)
        return None if text is None else int(text)


def parse(arguments: Sequence[str]) -> Options:
    """The options in ``arguments``, those after ``--`` ignored; raises UsageError.

    ``--help`` (or ``-h``) and ``--version`` go before everything else, whatever else is there.
    """
    given = list(arguments)
    if "--" in given:
        del given[given.index("--") :]
    if "--help" in given or "-h" in given:
        return Options(help="")
    if "--version" in given:
        return Options(version="")
    switches = [name for name, (value, _, _) in OPTIONS.items() if value is None]
    options = Options(pairs(given, OPTIONS, switches))
    _check(options)
    return options


def _check(options: Options) -> None:
    if "no-api" in options and "config-file" not in options:
        raise UsageError("Argument 'config-file' required, but not found.")
    if "no-seccomp" in options and "seccomp-filter" in options:
        raise UsageError("Argument 'seccomp-filter' cannot be used together with argument 'no-seccomp'.")
    for name in _NUMBERS:
        value = options.value(name)
        if value is not None and not (value.isascii() and value.isdecimal()):
            raise UsageError(f"The argument '{name}' takes a number, not '{value}'.")
    problem = instance_id_problem(options.value("id") or "")
    if problem is not None:
        raise UsageError(problem)


def help_text() -> str:
    """What ``--help`` prints."""
    return "\n".join(("options:", *help_lines(OPTIONS)))
