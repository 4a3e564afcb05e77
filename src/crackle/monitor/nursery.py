"""`python -m crackle.monitor.nursery FD`: the zygote of a program that uses the library, whose child it is.

What `crackle.vmm.processes` asks for comes over one socket, descriptors with it, and it ends when that does. Each birth
is a forked child that is one microVM (`crackle.monitor.served`), whose end is told on its socket for events. Snapshots
are read here, once, for all the children that load them.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import _socket
import contextlib
import fcntl
import gc
import os
import resource
import sys

import msgspec

from crackle.api.listener import listen
from crackle.errors import CrackleError
from crackle.jail.namespaces import new_processes
from crackle.jail.remains import Remains
from crackle.jail.room import enter
from crackle.monitor.served import ServedProcess
from crackle.runtime.channel import Channel, descriptors
from crackle.runtime.child import fork_child
from crackle.runtime.cores import share_no_core
from crackle.runtime.filters import set_last_words, use_filters
from crackle.runtime.system import close_from, set_title
from crackle.runtime.zygote import Zygote
from crackle.seccomp import default_filters
from crackle.snapshot import statefile
from crackle.snapshot.load import Template
from crackle.vmm.commands import NOT_STARTED
from crackle.vmm.preload import preload_all, preload_api
from crackle.vmm.wire import NOTHING, Answer, Birth, Forget, Keep, Wish, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

_MESSAGE_MAX = 65536
_FDS_MAX = 8
_FIRST = 3
_STDERR = 2

_wishes = msgspec.msgpack.Decoder(Wish)


class Nursery(Zygote):
    """A zygote whose one launcher is the program at the other end of `master`."""

    def __init__(self, master: _socket.socket) -> None:
        super().__init__(master, lambda _arguments, _ahead: 1)
        self._templates: dict[int, Template] = {}
        self._remains = Remains()

    def _accept(self, _events: int) -> None:
        space = _socket.CMSG_SPACE(_FDS_MAX * 4)
        message, control, _, _ = self._listener.recvmsg(_MESSAGE_MAX, space, _socket.MSG_CMSG_CLOEXEC)
        if not message:
            self._loop.stop()
            return
        fds = descriptors(control)
        try:
            wish = _wishes.decode(message)
            if isinstance(wish, Keep):
                with open(fds[0], "rb", closefd=False) as state:
                    snapshot = statefile.decode(state.read())
                self._templates[wish.key] = Template(snapshot, fds.pop())
            elif isinstance(wish, Forget):
                template = self._templates.pop(wish.key, None)
                if template is not None:
                    template.close()
            else:
                self._bear(wish, fds)
        finally:
            # The child has its own.
            for fd in fds:
                os.close(fd)

    def _bear(self, birth: Birth, fds: list[int]) -> None:
        own = [] if birth.jail is None else self._remains.expect(birth.jail, birth.instance_id)
        if birth.jail is not None and birth.jail.new_pid_ns:
            try:
                with new_processes():
                    pid = self._fork(self._be_served, birth, fds)
            except CrackleError as error:
                _refuse(_socket.socket(fileno=fds.pop(0)), error)
                return
        else:
            pid = self._fork(self._be_served, birth, fds)
        if pid is not None:
            self._remains.note(pid, own)
            # The events' socket is how its program learns of its end.
            self._attend(pid, _socket.socket(fileno=fds.pop(1)))

    def _ended(self, pid: int) -> None:
        super()._ended(pid)
        self._remains.clear(self._loop, pid)

    def serve(self) -> None:
        """Until the program ends, or has had enough. What jails leave is taken away afterwards, by another process."""
        super().serve()
        if self._remains:
            with contextlib.suppress(OSError):
                fork_child(self._be_last)

    def _be_last(self) -> NoReturn:
        # The program is to see the ends of its sockets.
        close_from(0)
        self._remains.clear_all()
        os._exit(0)

    def _be_served(self, birth: Birth, fds: list[int]) -> NoReturn:
        status = 1
        try:
            gc.disable()
            self._loop.close()
            template = None if birth.snapshot is None else self._templates[birth.snapshot]
            fds = _keep_only([*fds, *([] if template is None else [template.memory_fd])])
            if template is not None:
                template.memory_fd = fds.pop()
            commands, events = (_socket.socket(fileno=fd) for fd in fds[:2])
            ends = iter(fds[2:])
            console_in, console_out = (next(ends) if there else -1 for there in birth.console)
            with contextlib.suppress(OSError):
                os.chdir(birth.directory)
            name = os.fsencode(birth.instance_id)
            set_title(*self._home.title, b"crackle-vmm --id " + name, b"crackle-vmm")
            try:
                listener = _move_in(birth)
            except CrackleError as error:
                _refuse(commands, error)
                os._exit(status)
            use_filters(default_filters())
            set_last_words(_STDERR)
            console = console_in, console_out
            process = ServedProcess(birth, commands, events, console, template, listener=listener)
            _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
            process.run()
            status = 0
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(status)


def _keep_only(fds: Sequence[int]) -> list[int]:
    """Close everything but the standard streams and these, which have other numbers from now on."""
    after = _FIRST + len(fds)
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, after) for fd in fds]
    kept = [os.dup2(fd, _FIRST + place, inheritable=False) for place, fd in enumerate(moved)]
    close_from(after)
    return kept


def _move_in(birth: Birth) -> _socket.socket | None:
    """Be where the microVM is to be; the socket of its API, if it has one. ConfigError, with nothing left behind."""
    with contextlib.ExitStack() as undo:
        listener = None
        if birth.api_sock is not None:
            # From within a jail there is nothing to import it from, and another root.
            preload_api()
            listener = listen(birth.api_sock)
            folder, name = os.path.split(birth.api_sock)
            fd = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.unlink, name, dir_fd=fd)
        if birth.core_scheduling:
            share_no_core()
        if birth.jail is not None:
            enter(birth.jail, birth.instance_id, birth.directory)
        undo.pop_all()
    if listener is not None:
        os.close(fd)
    return listener


def _refuse(commands: _socket.socket, error: CrackleError) -> None:
    with contextlib.suppress(OSError):
        Channel(commands).send(encode(Answer(NOT_STARTED, NOTHING, type(error).__name__, str(error))))


def main(fd: int) -> None:
    """Serve until the program ends, or has had enough."""
    # Descriptors that were meant for others.
    close_from(fd + 1)
    os.set_inheritable(fd, False)
    # Two for each child.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # What a terminal sends to all of the program's processes is the program's business.
    os.setsid()
    nursery = Nursery(_socket.socket(fileno=fd))
    preload_all()
    default_filters()
    nursery.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]))
