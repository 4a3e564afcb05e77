"""The zygote: a warm process without threads, which forks a ready child for each launcher that connects.

It owns a listening socket (unix(7), SOCK_SEQPACKET) and, for each child, a descriptor of the process and one of the
connection, over which the launcher is told how the child has ended. What the launcher sends is read by the child, so
nothing that a launcher does, or does not, keeps the others waiting. Children outlive the zygote.

When a file of the code that it has loaded changes, it refuses until a second has gone by without another change, and
then executes itself anew, with its children and its socket.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import _socket
import contextlib
import errno
import gc
import os
import stat
import struct
import sys

from crackle.errors import ConfigError, os_reason
from crackle.runtime import image
from crackle.runtime.channel import rights
from crackle.runtime.child import fork_child
from crackle.runtime.inherit import ENDED, REFUSES, WILL, adopt, alone, answer
from crackle.runtime.launcher import Home, RefusedError
from crackle.runtime.loop import Loop
from crackle.runtime.mappings import map_ahead, share_heap
from crackle.runtime.pages import written_pages
from crackle.runtime.system import own_pages, watch_directories

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    from crackle.runtime.inherit import Ahead
    from crackle.runtime.loop import Timer

# Launchers that wait to be accepted.
_BACKLOG = 1024

# Seconds without a change after which the code is taken to be complete again.
_SETTLED_S = 1.0

# Seconds after which it is looked at what a child has written to: before it gives back what it need not have.
_LEARN_S = 0.7

# Seconds after a launcher has come until there is another spare.
_REFILL_S = 0.05

# What a launcher may stand for instead of crackle-vmm.
JAILER = "crackle-jailer"

_STOPPING = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP)

# <sys/socket.h>, struct ucred.
_CREDENTIALS = struct.Struct("=3i")
# <sys/inotify.h>, struct inotify_event, before its name.
_EVENT = struct.Struct("=iIII")


def socket_path() -> str:
    """Where this user's zygote listens; as `zygote_path` in src/crackle/launch/launch.c."""
    given = os.environ.get("CRACKLE_ZYGOTE")
    if given is not None:
        return given
    user = os.geteuid()
    directory = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{user}"
    return f"{directory if user else '/run'}/crackle/zygote"


def listen(path: str) -> _socket.socket:
    """A socket that listens at `path`, for this user only. What a dead zygote left there is replaced; ConfigError."""
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    first = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
        if _is_taken(path):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        mask = os.umask(0o177)
        try:
            listener.bind(first)
        finally:
            os.umask(mask)
        listener.listen(_BACKLOG)
        # It appears when it can be connected to.
        os.rename(first, path)
    except (OSError, ValueError) as error:
        listener.close()
        with contextlib.suppress(OSError, ValueError):
            os.unlink(first)
        raise ConfigError(f"Cannot listen for launchers at {path!r}: {os_reason(error)}") from None
    return listener


def _is_taken(path: str) -> bool:
    """By anything but the socket of a zygote that is no more."""
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        probe.connect(path)
    except FileNotFoundError:
        return False
    except ConnectionRefusedError:
        return not stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return True
    finally:
        probe.close()
    return True


class Zygote:
    """Serves launchers on `listener`, whose file is `path`; without one it is somebody else's, who keeps it.

    run: what a child does with its arguments, and with what `prepare` has made for it if it was a spare; its result is
    the exit status. jail: the same for a launcher that stands for crackle-jailer; its second argument is a descriptor
    that has to stay open for as long as the process is the launcher's. again: the command with which it executes
    itself anew, with the listener under its number and ``--children FD:PID,...`` added, which says who its children are
    and where their launchers are told; that is `children`. spares: how many children are forked ahead of need.
    """

    def __init__(
        self,
        listener: _socket.socket,
        run: Callable[[list[str], Any], int],
        *,
        prepare: Callable[[], Ahead | None] = lambda: None,
        jail: Callable[[list[str], int], int] = lambda _arguments, _connection: 1,
        path: str | None = None,
        again: Sequence[str] = (),
        children: str = "",
        spares: int = 0,
    ) -> None:
        self._listener = listener
        self._run = run
        self._prepare = prepare
        self._jail = jail
        self._path = path
        self._again = again
        self._loop = Loop(_complain)
        self._launchers: dict[int, _socket.socket] = {}
        self._ends: dict[int, int] = {}
        self._changes = -1
        self._settling: Timer | None = None
        self._wanted = spares
        self._spares: list[tuple[int, _socket.socket]] = []
        self._written = b""
        listener.setblocking(False)
        self._loop.watch(listener.fileno(), self._accept)
        for number in _STOPPING:
            self._loop.on_signal(number, lambda _number: self._loop.stop())
        for pair in filter(None, children.split(",")):
            fd, pid = map(int, pair.split(":"))
            os.set_inheritable(fd, False)
            self._attend(pid, _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd))

    def serve(self) -> None:
        """Until a signal ends it. To be called when everything is imported, by a process without other threads."""
        if len(os.listdir("/proc/self/task")) > 1:
            raise ConfigError(
                "A process with threads cannot be a zygote: a child has only the one that forks."
            )
        self._home = Home()
        if self._again:
            self._changes = watch_directories(_loaded_from())
            self._loop.watch(self._changes, self._changed)
        share_heap()
        gc.collect()
        image.take()
        self._refill()
        self._loop.run()
        self._end_spares()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    # -- launchers -----------------------------------------------------------------------------------------------------

    def _accept(self, _events: int) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
            # Gone again, or no descriptor is left: the launcher goes on without.
            return
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
        peer = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS.size)
        launcher, user, _ = _CREDENTIALS.unpack(peer)
        if user != os.geteuid() or self._settling is not None:
            connection.close()
            return
        pid = self._hand_over(connection, launcher) or self._fork(self._be_child, connection, launcher)
        if pid is None:
            connection.close()
            return
        self._attend(pid, connection)
        if self._wanted and not self._written:
            self._loop.call_later(_LEARN_S, lambda: self._learn(pid))

    def _fork(self, call: Callable[..., NoReturn], *given: object) -> int | None:
        """A child that does that; None where there can be none."""
        try:
            return fork_child(call, *given)
        except OSError as error:
            _complain(f"cannot fork: {os_reason(error)}")
            return None

    # -- spares: children forked before there is a launcher ----------------------------------------------------------

    def _refill(self) -> None:
        while len(self._spares) < self._wanted and self._settling is None:
            ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
            pid = self._fork(self._be_spare, theirs)
            theirs.close()
            if pid is None:
                ours.close()
                return
            self._spares.append((pid, ours))

    def _hand_over(self, connection: _socket.socket, launcher: int) -> int | None:
        """Give a launcher to a spare: its process, or None where there is none."""
        pid = None
        while pid is None and self._spares:
            pid, spare = self._spares.pop(0)
            try:
                spare.sendmsg(
                    [struct.pack("=i", launcher)],
                    rights([connection.fileno()]),
                    _socket.MSG_NOSIGNAL,
                )
            except OSError:
                os.waitpid(pid, 0)  # somebody has killed it
                pid = None
            spare.close()
        if self._wanted:
            # Not now: the processors are the launcher's microVM's.
            self._loop.call_later(_REFILL_S, self._refill)
        return pid

    def _end_spares(self) -> None:
        for pid, spare in self._spares:
            spare.close()
            # It has nothing yet, and may have been stopped.
            os.kill(pid, _signal.SIGKILL)
            os.waitpid(pid, 0)
        self._spares.clear()

    def _be_spare(self, zygote: _socket.socket) -> NoReturn:
        """Be ready, and wait for a launcher; the zygote's end is this one's, too."""
        try:
            self._loop.close()
            zygote = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, alone(zygote.detach()))
            own_pages(self._written)
            map_ahead()
            ahead = self._prepare()
            message, control, _, _ = zygote.recvmsg(4, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
            if len(message) != 4:
                os._exit(0)
            (launcher,) = struct.unpack("=i", message)
            (fd,) = struct.unpack("=i", control[0][2])
            zygote.detach()
            connection = alone(fd, () if ahead is None else ahead.fds)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            os._exit(1)
        self._serve_launcher(connection, launcher, ahead)

    def _learn(self, pid: int) -> None:
        """What one child writes to, the next will, too."""
        if not self._written and pid in self._ends:
            self._written = written_pages(pid)

    def _attend(self, pid: int, connection: _socket.socket) -> None:
        """Tell the launcher when the child has ended."""
        self._launchers[pid] = connection
        end = os.pidfd_open(pid)
        self._ends[pid] = end
        self._loop.watch(end, lambda _events: self._ended(pid))

    def _ended(self, pid: int) -> None:
        end = self._ends.pop(pid)
        self._loop.forget(end)
        os.close(end)
        _, status = os.waitpid(pid, 0)
        connection = self._launchers.pop(pid)
        with contextlib.suppress(OSError):
            answer(connection, ENDED, status=status)
        connection.close()

    # -- the child -----------------------------------------------------------------------------------------------------

    def _be_child(self, connection: _socket.socket, launcher: int) -> NoReturn:
        # The loop's descriptors are copies, its handlers of signals the zygote's.
        self._loop.close()
        self._serve_launcher(alone(connection.detach()), launcher, None)

    def _serve_launcher(self, connection: int, launcher: int, ahead: Ahead | None) -> NoReturn:
        status = 1
        try:
            connection, (name, *arguments), ahead = adopt(connection, launcher, self._home, ahead)
            own = os.getpid()
            if name == JAILER:
                if ahead is not None:
                    ahead.close()
                status = self._jail(arguments, connection)
                if os.getpid() != own:
                    os._exit(status)  # a daemon, of which no launcher waits to hear
            else:
                status = self._run(arguments, ahead)
            _tell(connection, WILL, status=(status & 0xFF) << 8)
        except RefusedError as reason:
            _tell(connection, REFUSES, str(reason))
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(status)

    # -- changes of the code -------------------------------------------------------------------------------------------

    def _changed(self, _events: int) -> None:
        """inotify(7): a name that ends in .py or .so is code."""
        events = os.read(self._changes, 65536)
        while events:
            size = _EVENT.unpack_from(events)[3]
            name = events[_EVENT.size : _EVENT.size + size].rstrip(b"\0")
            events = events[_EVENT.size + size :]
            if name.endswith((b".py", b".so")):
                self._settle(os.fsdecode(name))

    def _settle(self, name: str) -> None:
        self._end_spares()
        if self._settling is None:
            _complain(f"{name} has changed: starting anew")
        else:
            self._loop.cancel(self._settling)
        self._settling = self._loop.call_later(_SETTLED_S, self._execute_again)

    def _execute_again(self) -> None:
        children = []
        for pid, connection in self._launchers.items():
            os.set_inheritable(connection.fileno(), True)
            children.append(f"{connection.fileno()}:{pid}")
        os.set_inheritable(self._listener.fileno(), True)
        self._end_spares()
        self._loop.close()
        os.execv(self._again[0], [*self._again, "--children", ",".join(children)])


def _loaded_from() -> set[str]:
    """The directories of all modules that there are."""
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return {directory for file in files if file and os.path.isdir(directory := os.path.dirname(file))}


def _tell(connection: int, kind: bytes, reason: str = "", status: int = 0) -> None:
    with contextlib.suppress(OSError):
        answer(_socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, connection), kind, reason, status)


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"crackle zygote: {message}\n".encode(errors="backslashreplace"))
