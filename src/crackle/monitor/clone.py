"""The process that is a clone: forked from its parent's in the middle of a request, it becomes a monitor of its own.

Of the parent's process it keeps guest memory, the state that was saved, and the code. Descriptors, signals, streams
and session are its own. The frames of the parent's stack stay below it for ever: nothing that they refer to is given
up, and so closes no descriptor whose number is somebody else's by now. Therefore a clone runs none of the code that
called, and leaves by os._exit.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import _socket
import contextlib
import gc
import os
import sys

import msgspec

from crackle.api.listener import listen
from crackle.errors import CrackleError, reason_of
from crackle.monitor.process import VmmProcess
from crackle.runtime.mappings import forget_open
from crackle.runtime.stream import leave_standard_streams
from crackle.runtime.system import close_from, set_title, title_place
from crackle.telemetry.logger import OFF, Logger
from crackle.telemetry.sink import BAD_INPUT, Sink
from crackle.vmm.shell import Shell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import NoReturn

    from crackle.monitor.options import Options
    from crackle.schema.fork import Clone
    from crackle.snapshot.fork import Heritage, Line
    from crackle.vmm.wire import Birth, Lent

# Of the parent's command line: what is about its start.
_STARTING = frozenset(
    ("config-file", "metadata", "start-time-us", "start-time-cpu-us", "parent-cpu-time-us", "no-api")
)


class Cloner:
    """What a forked process does to be a clone; how it is spoken to is the subclass's.

    leave: closes what this process has of the parent's monitor. logger: the parent's, which becomes the clone's.
    """

    # Of the parent: where the API's sockets of clones are by default.
    api_sock = ""

    def __init__(self, logger: Logger, leave: Callable[[], None]) -> None:
        self._logger = logger
        self._leave = leave

    def become(self, heritage: Heritage, index: int, clone: Clone, line: Line) -> NoReturn:
        """Be that clone until it ends."""
        status = 1
        try:
            gc.freeze()
            line.born()
            self._settle(heritage, index, clone, line)
            machine = heritage.snapshot.config.machine_config
            assert machine is not None, "whoever has booted has filled it in"
            shell = Shell(machine, memory=heritage.memory)
            with contextlib.ExitStack() as undo:
                undo.callback(_remove_overlays, clone, line)
                status = self._run(heritage, clone, line, shell)
        except BaseException as error:
            reason = str(error) if isinstance(error, CrackleError) else reason_of(error) or repr(error)
            line.fail(reason)
            with contextlib.suppress(Exception):
                self._logger.error(reason)
        finally:
            os._exit(status)

    def _settle(self, heritage: Heritage, index: int, clone: Clone, line: Line) -> None:
        """Let go of everything that is not this process's."""
        heritage.memory.inherited()
        os.setsid()
        _default_signals()
        self._leave()
        self._logger.rename(clone.id or "")
        leave_standard_streams()
        forget_open()
        files = {region.fd for region in heritage.memory.regions}
        kept = {0, 1, 2, self._logger.file, *files, *self._own(index), *line.descriptors}
        close_from(0, [fd for fd in kept if fd >= 0])
        _set_title(f"crackle-vmm --id {clone.id}{self._said(clone)}".encode(errors="replace"))
        # The frames below never return.
        sys.setrecursionlimit(sys.getrecursionlimit() + _depth())
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())

    def _said(self, _clone: Clone) -> str:
        """More of its command line."""
        return ""

    def _own(self, index: int) -> Iterable[int]:
        """What that clone, and no other, has open already."""
        raise NotImplementedError

    def _run(self, heritage: Heritage, clone: Clone, line: Line, shell: Shell) -> int:
        """The exit status, in the end."""
        raise NotImplementedError


class MonitorCloner(Cloner):
    """Clones of a microVM of `crackle-vmm`'s, whose options these are."""

    def __init__(self, options: Options, logger: Logger, leave: Callable[[], None]) -> None:
        super().__init__(logger, leave)
        self.api_sock = options.value("api-sock") or ""
        self._options = type(options)({k: v for k, v in options.items() if k not in _STARTING})

    def _said(self, clone: Clone) -> str:
        return f" --api-sock {clone.api_sock}"

    def _own(self, _index: int) -> Iterable[int]:
        return ()

    def _run(self, heritage: Heritage, clone: Clone, line: Line, shell: Shell) -> int:
        if clone.log_path is not None:
            self._logger.move(clone.log_path)
        metrics = None
        if clone.metrics_path is not None:
            metrics = Sink.open(clone.metrics_path, f"Could not initialize metrics: {BAD_INPUT}")
        path = clone.api_sock or ""
        listener = listen(path)
        try:
            options = type(self._options)({**self._options, "id": clone.id or "", "api-sock": path})
            process = VmmProcess(options, self._logger, metrics, listener, None, shell)
            gc.freeze()
            gc.enable()
            return process.run_clone(heritage, clone, line)
        finally:
            if not line.open:
                with contextlib.suppress(OSError):
                    os.unlink(path)


class ServedCloner(Cloner):
    """Clones of a microVM of a program's, which gives their orders over a channel each.

    birth: of the microVM that forks, but for its name and console. lent: for each clone its ends of commands and
    events, and the descriptors of its console, -1 for none.
    """

    def __init__(self, birth: Birth, lent: Sequence[Lent], leave: Callable[[], None]) -> None:
        super().__init__(Logger(level=OFF), leave)
        self._birth = birth
        self._lent = lent
        self._index = 0

    def _own(self, index: int) -> Iterable[int]:
        self._index = index
        return self._lent[index]

    def _run(self, heritage: Heritage, clone: Clone, line: Line, shell: Shell) -> int:
        from crackle.monitor.served import ServedProcess

        if self._birth.core_scheduling:
            from crackle.runtime.cores import share_no_core

            share_no_core()
        commands, events, *console = self._lent[self._index]
        birth = msgspec.structs.replace(self._birth, instance_id=clone.id or "")
        process = ServedProcess(
            birth,
            _socket.socket(fileno=commands),
            _socket.socket(fileno=events),
            (console[0], console[1]),
            shell=shell,
        )
        gc.freeze()
        gc.enable()
        process.run_clone(heritage, clone, line)
        return 0


def leave_clones_to_the_kernel() -> None:
    """In process 1 of a namespace, whose children clones are when the template has ended: nobody waits for them."""
    if os.getpid() == 1:
        _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)


def _remove_overlays(clone: Clone, line: Line) -> None:
    """Those that were made for a clone that is not to be: none of them was there before."""
    if not line.open:
        for drive in clone.drive_overrides:
            if drive.overlay is not None and drive.overlay.path is not None:
                with contextlib.suppress(OSError):
                    os.unlink(drive.overlay.path)


def _default_signals() -> None:
    """No handler of the parent's program stays; what it ignores, is ignored."""
    for number in _signal.valid_signals():
        if callable(_signal.getsignal(number)):
            _signal.signal(number, _signal.SIG_DFL)
    _signal.set_wakeup_fd(-1)


def _set_title(line: bytes) -> None:
    """Be listed so, as far as there is room where the parent's arguments are."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        set_title(*title_place(environment=False), line, b"crackle-vmm")


def _depth() -> int:
    """Frames on this thread's stack."""
    depth, frame = 0, sys._getframe()
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    return depth
