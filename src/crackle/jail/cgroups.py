"""The monitor's cgroup, of either version (cgroups(7); Documentation/admin-guide/cgroup-v1/ and cgroup-v2.rst).

Planned before anything is made, from /proc/mounts and the controllers that there are.
"""

from __future__ import annotations

import contextlib
import os

from crackle.errors import ConfigError, os_reason, step
from crackle.jail.undo import Undo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MEMBERS = {1: "tasks", 2: "cgroup.procs"}


class Group:
    """A cgroup below `mount`, a hierarchy's root, and what its files are to say; `files` may be none at all."""

    __slots__ = ("controller", "files", "mount", "path")

    def __init__(self, mount: str, controller: str, path: str) -> None:
        self.mount = mount
        self.controller = controller
        self.path = path
        self.files: list[tuple[str, str]] = []


class Plan:
    """What `join` does: make each group, with its files, and be in all. moves: it is there, and only joined."""

    __slots__ = ("_groups", "_moves", "_version")

    def __init__(self, version: int, groups: Sequence[Group], *, moves: bool = False) -> None:
        self._version = version
        self._groups = groups
        self._moves = moves

    def join(self, undo: Undo) -> None:
        """Raises ConfigError."""
        for group in self._groups:
            if self._moves:
                continue
            _make(group.mount, group.path, undo)
            if self._version == 1:
                _fill(group, undo)
            else:
                _fill_unified(group, undo)
        # Afterwards: one may want another's values before it takes a process.
        for group in self._groups:
            self._enter(group, undo)

    def makes(self) -> list[str]:
        """The directories of the groups that `join` makes where they are not there, and of those around them."""
        return [
            place
            for group in ([] if self._moves else self._groups)
            for place in (*list(_above(group))[1:], f"{group.mount}/{group.path}")
        ]

    def _enter(self, group: Group, undo: Undo) -> None:
        members = _MEMBERS[self._version]
        before = _present(self._version, group.controller)
        if before is not None:
            try:
                back = undo.hold(os.open(f"{group.mount}{before}/{members}", os.O_WRONLY | os.O_CLOEXEC))
            except OSError:
                pass  # seen from another namespace it is not there
            else:
                undo.push(lambda: os.write(back, str(os.getpid()).encode()))
        place = f"{group.mount}/{group.path}"
        if not self._moves:
            _write(f"{place}/{members}", str(os.getpid()))
            return
        try:
            _put(f"{place}/{members}", str(os.getpid()))
        except OSError as error:
            raise ConfigError(
                f"Failed to move process to cgroup ({place}): {os_reason(error)}. "
                f"Hint: to have a cgroup made below {place}, pass any --cgroup parameters."
            ) from None


def check_parent(path: str) -> None:
    """Raises ConfigError for what could lead out of the hierarchy."""
    if _leads_away(path):
        raise ConfigError("Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'")


def plan(version: str, properties: Sequence[str], parent: str, name: str) -> Plan | None:
    """What `properties`, each FILE=VALUE, ask of a cgroup `name` in `parent`; None for nothing. Raises ConfigError."""
    number = version.removeprefix("+")
    if not (number.isascii() and number.isdecimal()) or not int(number) < 256:
        raise ConfigError(f"{version} is an invalid cgroup version specifier")
    found = int(number)
    if not properties:
        return _plan_move(parent) if found == 2 else None
    mounts = _mounts(found)
    groups: dict[str, Group] = {}
    for text in properties:
        file, equals, value = text.partition("=")
        if not equals or not value or "=" in value:
            raise ConfigError(f"Invalid format for cgroups: {text}")
        controller, dot, _ = file.partition(".")
        if _leads_away(file):
            raise ConfigError(f"Cgroup invalid file: {text}")
        if not dot:
            raise ConfigError(f"Cgroup invalid file: {file}")
        mount = _place_of(controller, mounts, found)
        key = controller if found == 1 else ""
        if key not in groups:
            groups[key] = Group(mount, key, "/".join(filter(None, (*parent.split("/"), name))))
        groups[key].files.append((file, value))
    return Plan(found, list(groups.values()))


def _plan_move(parent: str) -> Plan | None:
    """The parent itself, if it is there already: who has made it has set it."""
    mount = _mounts(2)[0][0]
    path = "/".join(filter(None, parent.split("/")))
    return Plan(2, [Group(mount, "", path)], moves=True) if os.path.exists(f"{mount}/{path}") else None


def _leads_away(path: str) -> bool:
    return path.startswith("/") or not {".", ".."}.isdisjoint(path.split("/"))


# -- what there is -----------------------------------------------------------------------------------------------------


def _mounts(version: int) -> list[tuple[str, set[str]]]:
    """Where hierarchies of that version are mounted, and with which options. ConfigError where there are none."""
    with step("Failed to open file /proc/mounts"), open("/proc/mounts", encoding="utf-8") as file:
        lines = file.read().splitlines()
    kind = {1: "cgroup", 2: "cgroup2"}.get(version)
    found = []
    for line in lines:
        fields = line.split(" ")
        if len(fields) >= 4 and fields[2] == kind:
            found.append((_unescaped(fields[1]), set(fields[3].split(","))))
    if not found:
        raise ConfigError("Hierarchy not found: No hierarchy found for this cgroup version.")
    return found


def _unescaped(path: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path


def _place_of(controller: str, mounts: list[tuple[str, set[str]]], version: int) -> str:
    for place, options in mounts:
        if version == 1 and controller in options:
            return place
        if version == 2 and controller in _available(place):
            return place
    raise ConfigError(f"Controller {controller} is unavailable")


def _available(place: str) -> list[str]:
    try:
        return _read(f"{place}/cgroup.controllers").split()
    except OSError:
        return []


def _present(version: int, controller: str) -> str | None:
    """The path of this process's cgroup in a hierarchy."""
    try:
        lines = _read("/proc/self/cgroup").splitlines()
    except OSError:
        return None
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" if version == 2 else controller in controllers.split(","):
            return path.rstrip("/")
    return None


# -- making it ---------------------------------------------------------------------------------------------------------


def _make(mount: str, path: str, undo: Undo) -> None:
    place = mount
    for name in path.split("/"):
        parent, place = place, f"{place}/{name}"
        with step(f"Failed to create directory {place}"):
            try:
                _mkdir(place, mount)
            except FileExistsError:
                continue
            # Afterwards, from within the jail, there is no such path.
            fd = undo.hold(os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        _undo_making(fd, name, undo)


def _mkdir(place: str, mount: str) -> None:
    try:
        os.mkdir(place)
    except FileNotFoundError:
        # The one around it has just been taken away, with the last jail in it.
        above = os.path.dirname(place)
        if above == mount:
            raise
        with contextlib.suppress(FileExistsError):
            _mkdir(above, mount)
        os.mkdir(place)


def _undo_making(parent: int, name: str, undo: Undo) -> None:
    undo.push(lambda: os.rmdir(name, dir_fd=parent))


def _fill(group: Group, undo: Undo) -> None:
    names = group.path.split("/")
    places = [group.mount, *(f"{group.mount}/{'/'.join(names[: i + 1])}" for i in range(len(names)))]
    for file, value in group.files:
        _inherit(places, file, undo)
        _set(f"{places[-1]}/{file}", value, undo)


def _inherit(places: Sequence[str], file: str, undo: Undo) -> None:
    """Have the last of `places` say what its parent says, and that what its own does, if it says nothing.

    A cpuset of version 1 has no processors and nodes at first, and can have only those that its parent has.
    """
    above, place = places[-2:]
    line = _said(f"{above}/{file}")
    if not line and len(places) > 2:
        # Another jailer may have done it at the same time.
        with contextlib.suppress(ConfigError):
            _inherit(places[:-1], file, undo)
        line = _said(f"{above}/{file}")
    if not line:
        raise ConfigError(f"Failed to inherit cgroups configurations from file {file} in path {place}")
    _set(f"{place}/{file}", line, undo)


def _fill_unified(group: Group, undo: Undo) -> None:
    place = f"{group.mount}/{group.path}"
    enabled = set()
    for file, value in group.files:
        controller = file.partition(".")[0]
        if controller not in enabled:
            enabled.add(controller)
            for above in _above(group):
                _enable(f"{above}/cgroup.subtree_control", controller, undo)
        _set(f"{place}/{file}", value, undo)


def _enable(path: str, controller: str, undo: Undo) -> None:
    """Let the groups below have it."""
    if controller in _said(path).split():
        return
    with step(f"Failed to write to {path}"):
        fd = undo.hold(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        os.write(fd, f"+{controller}".encode())
    undo.push(lambda: os.write(fd, f"-{controller}".encode()))


def _above(group: Group) -> Iterator[str]:
    """The groups around it, the outermost first."""
    place = group.mount
    for name in group.path.split("/"):
        yield place
        place = f"{place}/{name}"


# -- files -------------------------------------------------------------------------------------------------------------


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _said(path: str) -> str:
    with step(f"Failed to read file {path} into a string"):
        return _read(path).removesuffix("\n")


def _set(path: str, value: str, undo: Undo) -> None:
    """Write, and have it be as it was if all is taken back."""
    try:
        before = _read(path).removesuffix("\n")
        back = undo.hold(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        pass  # one that can only be written to
    else:
        undo.push(lambda: os.write(back, before.encode()))
    _write(path, value)


def _write(path: str, value: str) -> None:
    with step(f"Failed to write to {path}"):
        _put(path, value)


def _put(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, f"{value}\n".encode())
    finally:
        os.close(fd)
