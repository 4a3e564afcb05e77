"""The zygote of this program, which has the processes of microVMs that have one: started when the first is wanted.

Its other end is `crackle.monitor.nursery`. It is this process's child, and ends with it. What it starts has what this
program had when it was started itself: environment, limits, cgroups. Where the program is another user by now, or in
another namespace of networks or mounts, there is another zygote.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Protocol

import msgspec

from crackle.errors import CrackleError, os_reason
from crackle.runtime.channel import pair, rights
from crackle.runtime.ownership import enrol
from crackle.vmm.wire import Forget, Keep

if TYPE_CHECKING:
    import _socket
    from collections.abc import Sequence

    from crackle.vmm.wire import Wish

    class Source(Protocol):
        """A snapshot that processes are to load."""

        key: int

        def descriptors(self) -> Sequence[int]:
            """Of a file that holds the state file's content, and of the memory file."""


_SEQPACKET = 5  # SOCK_SEQPACKET, of <sys/socket.h>
_MASTER = 3


class Processes:
    """A zygote, and the socket over which it is asked. Any thread may ask."""

    def __init__(self) -> None:
        self._pid = 0
        self.place = _place()
        ours, theirs = pair(_SEQPACKET)
        self._master: _socket.socket | None = ours
        self._lock = threading.Lock()
        self._kept: set[int] = set()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-X", "utf8", "-m", "crackle.monitor.nursery", str(_MASTER)]
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), _MASTER),
        ]
        try:
            self._pid = os.posix_spawn(
                sys.executable, command, environment, file_actions=actions, setsigmask=[]
            )
        except (OSError, TypeError) as error:
            ours.close()
            reason = (
                os_reason(error) if isinstance(error, OSError) else "this interpreter's path is not known"
            )
            raise CrackleError(f"cannot start a process for microVMs: {reason}: {sys.executable}") from None
        finally:
            theirs.close()
        enrol(self)

    def ask(self, wish: Wish, fds: Sequence[int], source: Source | None = None) -> bool:
        """Send a wish with copies of `fds`, and before it the snapshot that it is about; False when nobody is there."""
        with self._lock:
            try:
                if source is not None and source.key not in self._kept:
                    self._send(Keep(source.key), source.descriptors())
                    self._kept.add(source.key)
                self._send(wish, fds)
            except (BrokenPipeError, ConnectionResetError):
                return False
            return True

    def forget(self, key: int) -> None:
        """That snapshot is not wanted any more."""
        with self._lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if key in self._kept:
                self._kept.remove(key)
                self._send(Forget(key), ())

    def _send(self, wish: Wish, fds: Sequence[int]) -> None:
        if self._master is None:
            raise BrokenPipeError
        self._master.sendmsg([msgspec.msgpack.encode(wish)], rights(fds))

    def end(self) -> None:
        """Let it end; its children end with those who have them. Idempotent."""
        with self._lock:
            master, self._master = self._master, None
        if master is not None:
            master.close()
            # Somebody else may have waited for any child.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)

    def disown(self) -> None:
        """In a forked child it is the parent's, whose threads may have had the lock."""
        self._lock = threading.Lock()
        if self._master is not None:
            self._master.close()
            self._master = None

    def runs(self, _thread: int) -> bool:
        """It has no threads here."""
        return False


def _place() -> tuple[int, ...]:
    """What makes this thread another to the system, as far as microVMs see that."""
    user = os.geteuid()
    try:
        return user, *(os.stat(f"/proc/thread-self/ns/{name}").st_ino for name in ("net", "mnt"))
    except OSError:
        return (user,)


_current: Processes | None = None
_starting = threading.Lock()


def ask(wish: Wish, fds: Sequence[int], source: Source | None = None) -> None:
    """Ask this program's zygote, which is started if it is not there. CrackleError when it cannot be."""
    global _current
    with _starting:
        if _current is not None:
            if _current.place == _place() and _current.ask(wish, fds, source):
                return
            _current.end()
        _current = Processes()
        if not _current.ask(wish, fds, source):
            raise CrackleError("the process from which microVMs are had has ended as soon as it was started")


def start() -> None:
    """Have this program's zygote, before something that is to end before it. CrackleError when it cannot be had."""
    global _current
    with _starting:
        if _current is None or _current.place != _place():
            if _current is not None:
                _current.end()
            _current = Processes()


def forget(key: int) -> None:
    """The snapshot with this key is not wanted any more."""
    with _starting:
        if _current is not None:
            _current.forget(key)
