"""The process that is a clone: forked from its parent's in the middle of a request, it becomes a monitor of its own.

Of the parent's process it keeps guest memory, the state that was saved, and the code. Descriptors, signals, streams
and session are its own. The frames of the parent's stack stay below it for ever: nothing that they refer to is given
up, and so closes no descriptor whose number is somebody else's by now. Therefore a clone runs none of the code that
called, and leaves by os._exit.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import contextlib
import gc
import os
import sys

from crackle.api.listener import listen
from crackle.errors import CrackleError, reason_of
from crackle.monitor.process import VmmProcess
from crackle.runtime.system import close_between, close_from, set_title
from crackle.telemetry.sink import Sink
from crackle.vmm.shell import Shell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import NoReturn

    from crackle.monitor.options import Options
    from crackle.schema.fork import Clone
    from crackle.snapshot.fork import Heritage, Line
    from crackle.telemetry.logger import Logger

# Of the parent's command line: what is about its start.
_STARTING = frozenset(
    ("config-file", "metadata", "start-time-us", "start-time-cpu-us", "parent-cpu-time-us", "no-api")
)


class Cloner:
    """Makes clones of a microVM whose API is at `api_sock`.

    leave: closes what this process has of the parent's monitor. logger: the parent's, which becomes the clone's.
    """

    def __init__(self, options: Options, logger: Logger, api_sock: str, leave: Callable[[], None]) -> None:
        self.api_sock = api_sock
        self._options = type(options)({k: v for k, v in options.items() if k not in _STARTING})
        self._logger = logger
        self._leave = leave

    def become(self, heritage: Heritage, clone: Clone, line: Line) -> NoReturn:
        """Be that clone until it ends."""
        status = 1
        try:
            gc.freeze()
            line.born()
            self._settle(heritage, clone, line)
            status = self._run(heritage, clone, line)
        except BaseException as error:
            reason = str(error) if isinstance(error, CrackleError) else reason_of(error) or repr(error)
            line.fail(reason)
            with contextlib.suppress(Exception):
                self._logger.error(reason)
        finally:
            os._exit(status)

    def _settle(self, heritage: Heritage, clone: Clone, line: Line) -> None:
        """Let go of everything that is not this process's."""
        heritage.memory.inherited()
        os.setsid()
        _default_signals()
        self._leave()
        self._logger.rename(clone.id or "")
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for stream in range(3):
            os.dup2(null, stream)
        files = {region.fd for region in heritage.memory.regions}
        _close_all_but({0, 1, 2, self._logger.file, *files, *heritage.descriptors, *line.descriptors})
        _set_title(f"crackle-vmm --id {clone.id} --api-sock {clone.api_sock}".encode(errors="replace"))
        # The frames below never return.
        sys.setrecursionlimit(sys.getrecursionlimit() + _depth())
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())

    def _run(self, heritage: Heritage, clone: Clone, line: Line) -> int:
        if clone.log_path is not None:
            self._logger.move(clone.log_path)
        metrics = None
        if clone.metrics_path is not None:
            metrics = Sink.open(clone.metrics_path, "Could not initialize metrics")
        path = clone.api_sock or ""
        listener = listen(path)
        try:
            machine = heritage.snapshot.config.machine_config
            assert machine is not None, "whoever has booted has filled it in"
            shell = Shell(machine, memory=heritage.memory)
            options = type(self._options)({**self._options, "id": clone.id or "", "api-sock": path})
            process = VmmProcess(options, self._logger, metrics, listener, None, shell)
            gc.freeze()
            gc.enable()
            return process.run_clone(heritage, clone, line)
        finally:
            if not line.open:
                with contextlib.suppress(OSError):
                    os.unlink(path)


def _default_signals() -> None:
    """No handler of the parent's program stays; what it ignores, is ignored."""
    for number in _signal.valid_signals():
        if callable(_signal.getsignal(number)):
            _signal.signal(number, _signal.SIG_DFL)
    _signal.set_wakeup_fd(-1)


def _close_all_but(kept: Iterable[int]) -> None:
    before = -1
    for fd in sorted(fd for fd in kept if fd >= 0):
        if fd > before + 1:
            close_between(before + 1, fd - 1)
        before = fd
    close_from(before + 1)


def _set_title(line: bytes) -> None:
    """Be listed so, as far as there is room where the parent's arguments are."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        # arg_start and arg_end (proc(5), 48 and 49; the list begins with the third).
        start, end = int(fields[45]), int(fields[46])
        set_title(start, end - start, line, b"crackle-vmm")


def _depth() -> int:
    """Frames on this thread's stack."""
    depth, frame = 0, sys._getframe()
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    return depth
