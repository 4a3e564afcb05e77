"""What a process inherits from the one that starts it, for a child of the zygote: the launcher's child in all but name.

Arguments, environment, signal mask and descriptors come in the launcher's message (`src/crackle/launch/launch.c` has
its other half); the rest is read from the launcher's /proc, where the kernel vouches for it. What differs from what the
child has already is changed. What cannot be is a `RefusedError`, and the launcher executes the monitor itself.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import _socket
import os
import struct
import time

from crackle.runtime.launcher import ELSEWHERE, MOVABLE, OTHER_CGROUPS, Home, Launcher, RefusedError
from crackle.runtime.system import (
    close_from,
    copy_scheduling,
    join_namespace,
    set_no_new_privs,
    set_title,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Protocol

    class Ahead(Protocol):
        """What a child has made before it has a launcher."""

        @property
        def fds(self) -> Collection[int]:
            """Its descriptors, from 4 on."""

        def close(self) -> None: ...


# An answer: kind, reason, status of wait(2).
_ANSWER = struct.Struct("=c119si")
STARTS, REFUSES, WILL, ENDED = b"S", b"R", b"W", b"E"

# Milliseconds that a launcher has for its message.
_PATIENCE_MS = 1000


def answer(connection: _socket.socket, kind: bytes, reason: str = "", status: int = 0) -> None:
    """Tell the launcher. One that has gone, or reads nothing, is not waited for: OSError."""
    message = _ANSWER.pack(kind, reason.encode(errors="replace")[:118], status)
    connection.send(message, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)


def status_of(message: bytes) -> int:
    """The status of wait(2) that an answer has; as of an end that nobody has seen where it is none."""
    return int(_ANSWER.unpack(message)[2]) if len(message) == _ANSWER.size else 0


def alone(connection: int, kept: Collection[int] = ()) -> int:
    """Close all but the standard streams, `kept` (from 4 on) and `connection`, which has another number from now on."""
    number = 3
    if connection != number:
        os.dup2(connection, number, inheritable=False)
    close_from(number + 1, kept)
    return number


def adopt(
    connection: int, process: int, home: Home, ahead: Ahead | None
) -> tuple[int, list[str], Ahead | None]:
    """Become what the launcher `process` asks for on `connection`, and tell it so; the connection, the command line.

    ahead: what there is for it already, the last of the result; given back if the launcher has a use for its numbers.
    To be called in a forked child, with signals blocked. Afterwards they are as the launcher had them, and nothing is
    open but what it handed over and, above that, the connection: the lifeline, at whose other end's end the kernel
    kills this process. Raises RefusedError.
    """
    try:
        launcher = Launcher(connection, process, _PATIENCE_MS)
        differs = launcher.compare(home)
        # A virtual machine has a thread of the kernel's in this process on some, and who has two cannot move.
        if ahead is not None and (
            launcher.asks_for(ahead.fds) or (differs & ELSEWHERE and len(os.listdir("/proc/self/task")) > 1)
        ):
            ahead.close()
            ahead = None
        if differs & OTHER_CGROUPS:
            _join_cgroups(f"/proc/{process}")
        launcher.follow_processors()
        copy_scheduling(process)
        if differs & ELSEWHERE:
            _move(f"/proc/{process}", home)
        else:
            launcher.follow_directory()
        lifeline = launcher.place(() if ahead is None else ahead.fds)
        launcher.follow_limits()
        if launcher.gains_no_privileges:
            set_no_new_privs()
        for number, ignored in launcher.unlike_ignored():
            if _signal.getsignal(number) is not None:  # one that the core handles stays with it
                _signal.signal(number, _signal.SIG_IGN if ignored else _signal.SIG_DFL)
        if launcher.use_environment(home):
            time.tzset()
        arguments, line = launcher.arguments()
        set_title(*home.title, line, os.fsencode(arguments[0])[:15])
        launcher.begin(STARTS[0])
        launcher.take_signals()
    except (OSError, ValueError) as error:
        raise RefusedError(f"{type(error).__name__}: {error}") from error
    return lifeline, arguments, ahead


def _read(path: str) -> bytes:
    """A file of /proc; nothing where it may not be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""
    finally:
        os.close(fd)


# -- where it lives ----------------------------------------------------------------------------------------------------


def _join_cgroups(theirs: str) -> None:
    """Be in the launcher's cgroups before anything of weight is charged to others (cgroups(7), both versions)."""
    before, after = _read("/proc/self/cgroup"), _read(f"{theirs}/cgroup")
    if before == after:
        return
    own = set(before.splitlines())
    for line in after.splitlines():
        if line in own:
            continue
        _, hierarchy, path = line.split(b":", 2)
        fd = os.open(_cgroup_directory(hierarchy, path) + b"/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)


def _cgroup_directory(hierarchy: bytes, path: bytes) -> bytes:
    for line in _read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(b" - ")
        root, place = left.split()[3:5]
        kind, _, options = right.split(b" ", 2)
        mounted = (
            kind == b"cgroup2"
            if not hierarchy
            else (kind == b"cgroup" and set(hierarchy.split(b",")) <= set(options.split(b",")))
        )
        if mounted and (root == b"/" or path == root or path.startswith(root + b"/")):
            return place + (path if root == b"/" else path[len(root) :])
    raise RefusedError("its cgroup is not mounted here")


def _namespace(theirs: str, name: str) -> int:
    try:
        return os.stat(f"{theirs}/ns/{name}").st_ino
    except FileNotFoundError:
        return 0


def _move(theirs: str, home: Home) -> None:
    """To the launcher's namespaces, root and directory."""
    flags = os.O_PATH | os.O_CLOEXEC
    directory = os.open(f"{theirs}/cwd", flags)
    others = [name for name in MOVABLE if _namespace(theirs, name) != home.namespaces[name]]
    root = os.open(f"{theirs}/root", flags)
    # All are opened before the mount namespace, and with it /proc, is another.
    for fd in [os.open(f"{theirs}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in others]:
        join_namespace(fd)
    if not os.path.samestat(os.fstat(root), os.stat("/")):
        os.fchdir(root)
        os.chroot(".")
    os.fchdir(directory)
