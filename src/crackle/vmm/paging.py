"""`PageHandler`: a page-fault handler of this program's, in a process of its own. Public as `crackle.PageHandler`.

In a process of its own, because a thread of this one that waits for a page may hold the interpreter's lock, which a
handler here would need first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile

from crackle.errors import CrackleError, StateError, os_reason
from crackle.runtime.ownership import enrol
from crackle.runtime.threads import Thread
from crackle.snapshot.handler import listen, opened
from crackle.vmm.arguments import pair_of
from crackle.vmm.closing import Closing

_LISTENER = 3


class PageHandler(Closing):
    """What `crackle snapshot serve` is, for this program: `MicroVM.restore(path, handler=PageHandler(path))`.

    path: the snapshot's directory; or its state file, and `memory` its memory file, which must stay as it is. Any
    number of microVMs may have it, `Snapshot.clone`'s too. record: note anew what the first of them wants, as for the
    command. A context manager; after `close` there are no new ones, and those that there are have their memory as
    before. It ends with this program. ConfigError when there is no such file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        memory: str | os.PathLike[str] | None = None,
        *,
        record: bool = False,
    ) -> None:
        _, memory_path = pair_of(path, memory)
        os.close(opened(memory_path))
        self._lifeline = -1
        self._directory = tempfile.mkdtemp(prefix="crackle-")
        self.path = os.path.join(self._directory, "socket")
        """The socket at which it listens."""
        theirs = -1
        try:
            listener = listen(self.path)
            try:
                # For the users of jails, in which it is seen without its folder, that is nobody else's.
                os.chmod(self.path, 0o666)
                theirs, self._lifeline = os.pipe2(os.O_CLOEXEC)
                words = [str(_LISTENER), os.path.abspath(memory_path), "record" if record else ""]
                self.pid = _spawn(words, theirs, listener.fileno())
            finally:
                listener.close()
                if theirs >= 0:
                    os.close(theirs)
        except BaseException:
            self._give_back()
            raise
        enrol(self)

    def __fspath__(self) -> str:
        """The socket's path, for `handler=`; StateError once it is closed."""
        if self._lifeline < 0:
            raise StateError("this page-fault handler has been closed")
        return self.path

    def close(self) -> None:
        """Serve nobody else; whoever is served goes on to be. Idempotent."""
        if self._lifeline < 0:
            return
        self._give_back()
        # It ends when the last of its microVMs does.
        Thread("reaper", lambda: _reap(self.pid))

    end = close

    def _give_back(self) -> None:
        self.disown()
        for remove, path in ((os.unlink, self.path), (os.rmdir, self._directory)):
            with contextlib.suppress(OSError):
                remove(path)

    def disown(self) -> None:
        """In a forked child, for `crackle.runtime.ownership`: it is the parent's."""
        fd, self._lifeline = self._lifeline, -1
        if fd >= 0:
            os.close(fd)

    def runs(self, _thread: int) -> bool:
        """It has no threads here."""
        return False

    def __repr__(self) -> str:
        return f"<PageHandler at {self.path}, process {self.pid}>"


def _spawn(words: list[str], lifeline: int, listener: int) -> int:
    command = [sys.executable, "-X", "utf8", "-m", "crackle.snapshot.handler", *words]
    actions = [
        (os.POSIX_SPAWN_DUP2, lifeline, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, listener, _LISTENER),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        # Ctrl-C is this program's: its microVMs need their memory for as long as they are there.
        return os.posix_spawn(
            sys.executable, command, environment, file_actions=actions, setsigmask=[signal.SIGINT]
        )
    except OSError as error:
        raise CrackleError(
            f"cannot start a page-fault handler: {os_reason(error)}: {sys.executable}"
        ) from None


def _reap(pid: int) -> None:
    # Somebody else may have waited for any child.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
