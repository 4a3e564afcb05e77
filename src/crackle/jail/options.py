"""The command line of ``crackle-jailer``: that of Firecracker's jailer, checked before anything is made."""

from __future__ import annotations

import os
import stat

from crackle.errors import ConfigError, step
from crackle.jail.cgroups import Plan, check_parent, plan
from crackle.runtime.commandline import UsageError, help_lines, pairs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_BASE = "/srv/jailer"

# What `no-file` is where nobody says.
DEFAULT_NO_FILE = 2048

# Name: what its value is called (None for a switch), default, help.
OPTIONS: dict[str, tuple[str | None, str | None, str]] = {
    "exec-file": (
        "path",
        None,
        "The monitor's executable. It is not executed: its name is that of the jails' folder.",
    ),
    "gid": ("gid", None, "Group that the monitor has, a number."),
    "id": ("id", None, "Name of the microVM and its jail: 1 to 64 letters, digits and hyphens."),
    "uid": ("uid", None, "User that the monitor has, a number."),
    "cgroup": ("file=value", None, "Write this to a file of the monitor's cgroup; may be repeated."),
    "cgroup-version": ("1|2", "1", "Version of the cgroups that --cgroup is about."),
    "chroot-base-dir": ("path", DEFAULT_BASE, "Folder of all jails; it has to exist."),
    "daemonize": (None, None, "Have a session of its own, and /dev/null as standard streams."),
    "netns": ("path", None, "File of the network namespace that the monitor joins."),
    "new-pid-ns": (None, None, "Be process 1 of a process namespace of its own."),
    "parent-cgroup": (
        "path",
        None,
        "Cgroup in which the monitor's is made; the executable's name without it.",
    ),
    "resource-limit": (
        "resource=value",
        None,
        "Limit fsize (bytes of a file) or no-file (descriptors, else 2048); may be repeated.",
    ),
    "version": (None, None, "Print the version and exit."),
}
REQUIRED = ("exec-file", "gid", "id", "uid")
_REPEATABLE = ("cgroup", "resource-limit")

_ID_LIMIT = 64


class Wanted:
    """What a jail is to be, checked; `extra` is for the monitor."""

    __slots__ = (
        *(
            "base",
            "cgroups",
            "daemonize",
            "exec_name",
            "extra",
            "file_size",
            "gid",
            "id",
            "netns",
            "new_pid_ns",
        ),
        *("no_file", "uid"),
    )

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - as the option
        exec_file: str,
        uid: str,
        gid: str,
        base: str = DEFAULT_BASE,
        netns: str | None = None,
        daemonize: bool = False,
        new_pid_ns: bool = False,
        cgroup_version: str = "1",
        cgroups: Sequence[str] = (),
        parent_cgroup: str | None = None,
        limits: Sequence[str] = (),
        extra: Sequence[str] = (),
    ) -> None:
        """As the command line has them. Raises ConfigError."""
        _check_id(id)
        self.id = id
        self.exec_name = _executable_name(exec_file)
        self.base = _folder(base)
        self.uid = _user(uid, "uid")
        self.gid = _user(gid, "gid")
        self.netns = netns
        self.daemonize = daemonize
        self.new_pid_ns = new_pid_ns
        parent = self.exec_name if parent_cgroup is None else parent_cgroup
        check_parent(parent)
        self.cgroups: Plan | None = plan(cgroup_version, cgroups, parent, id)
        self.file_size: int | None = None
        self.no_file = DEFAULT_NO_FILE
        for limit in limits:
            self._limit(limit)
        self.extra = list(extra)

    def _limit(self, text: str) -> None:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"Invalid format for resources limits: {text}")
        number = _number(value, 64)
        if number is None:
            raise ConfigError(f"Invalid limit value for resource: {value}: it takes a number below 2^64")
        if name == "fsize":
            self.file_size = number
        elif name == "no-file":
            self.no_file = number
        else:
            raise ConfigError(f"Invalid resource argument: {name}")


def parse(arguments: Sequence[str]) -> Wanted | str:
    """The jail that is asked for, or "help" or "version". Raises ConfigError, and UsageError for what means nothing."""
    given = list(arguments)
    extra: list[str] = []
    if "--" in given:
        at = given.index("--")
        given, extra = given[:at], given[at + 1 :]
    if "--help" in given or "-h" in given:
        return "help"
    if "--version" in given:
        return "version"
    one: dict[str, str] = {}
    many: dict[str, list[str]] = {name: [] for name in _REPEATABLE}
    switches = [name for name, (value, _, _) in OPTIONS.items() if value is None]
    for name, value in pairs(given, OPTIONS, switches, _REPEATABLE):
        if name in many:
            many[name].append(value)
        else:
            one[name] = value
    for name in REQUIRED:
        if name not in one:
            raise UsageError(f"Argument '{name}' required, but not found.")
    return Wanted(
        id=one["id"],
        exec_file=one["exec-file"],
        uid=one["uid"],
        gid=one["gid"],
        base=one.get("chroot-base-dir", DEFAULT_BASE),
        netns=one.get("netns"),
        daemonize="daemonize" in one,
        new_pid_ns="new-pid-ns" in one,
        cgroup_version=one.get("cgroup-version", "1"),
        cgroups=many["cgroup"],
        parent_cgroup=one.get("parent-cgroup"),
        limits=many["resource-limit"],
        extra=extra,
    )


def _check_id(text: str) -> None:
    size = len(text.encode(errors="surrogateescape"))
    if not 1 <= size <= _ID_LIMIT:
        raise ConfigError(
            f"Invalid instance ID: Invalid len ({size});  the length must be between 1 and {_ID_LIMIT}"
        )
    for position, character in enumerate(text):
        if character != "-" and not character.isalnum():
            raise ConfigError(f"Invalid instance ID: Invalid char ({character}) at position {position}")


def _canonical(path: str) -> str:
    with step(f"Failed to canonicalize path {path}"):
        return os.path.realpath(path, strict=True)


def _executable_name(path: str) -> str:
    real = _canonical(path)
    if not os.path.isfile(real):
        raise ConfigError(f"{real} is not a file")
    return os.path.basename(real)


def _folder(path: str) -> str:
    """Where the jails are. Not by a link: whoever may change that would say where root makes devices."""
    real = _canonical(path)
    if stat.S_ISLNK(os.lstat(path.rstrip("/") or "/").st_mode):
        raise ConfigError(f"{path} is a symbolic link: give the folder itself, {real}")
    if not os.path.isdir(real):
        raise ConfigError(f"{real} is not a directory")
    return real


def _user(text: str, what: str) -> int:
    number = _number(text, 32)
    # The last one means to the kernel: as it is.
    if number is None or number == (1 << 32) - 1:
        raise ConfigError(f"Invalid {what}: {text}")
    return number


def _number(text: str, bits: int) -> int | None:
    digits = text.removeprefix("+")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 64:
        return None
    number = int(digits)
    return number if number < 1 << bits else None


def help_text() -> str:
    """What ``--help`` prints."""
    lines = help_lines(OPTIONS)
    lines.insert(len(REQUIRED), "\noptions:")
    return "\n".join(("required:", *lines, "", "Arguments after -- are crackle-vmm's."))
