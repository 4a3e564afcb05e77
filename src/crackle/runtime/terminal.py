"""The terminal on which the guest's console appears: raw while the guest has it, as it was afterwards.

And whenever another process group has it instead (job control; termios(3), credentials(7)).
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from crackle.runtime.loop import Loop

# Seconds after which a terminal that another process group has is looked at again: nobody tells when it is ours.
_LOOK_AGAIN_S = 0.25


def _nothing() -> None:
    pass


class Terminal:
    """Borrows ``fd``; does nothing if it is not a terminal or another process group has the terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] | None = None
        self._loop: Loop | None = None
        self._awaited = False
        self._stopping = self._continued = self._raw = _nothing

    def set_raw(self) -> bool:
        """Hand every key to the guest: no echo, no lines, no signals; output is processed as before.

        Returns whether that is so. May be repeated, should others have changed it: what :meth:`restore` puts back is
        what was found first.
        """
        if not self.is_ours():
            return False
        import termios

        if self._before is None:
            self._before = termios.tcgetattr(self._fd)
        mode = [*self._before[:6], list(self._before[6])]
        mode[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
        # What was typed already is the guest's: nothing is flushed.
        termios.tcsetattr(self._fd, termios.TCSANOW, mode)
        return True

    def restore(self) -> None:
        """Put the terminal back as :meth:`set_raw` found it; idempotent."""
        before, self._before = self._before, None
        if before is None or not self.is_ours():
            return
        import termios

        termios.tcsetattr(self._fd, termios.TCSANOW, before)

    def is_ours(self) -> bool:
        """Whether it is a terminal that this process may read and set now."""
        if not os.isatty(self._fd):
            return False
        # A background process that sets the terminal it belongs to is stopped by SIGTTOU.
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return True

    # -- job control ---------------------------------------------------------------------------------------------

    def follow(
        self,
        loop: Loop,
        *,
        stopping: Callable[[], None] = _nothing,
        continued: Callable[[], None] = _nothing,
        raw: Callable[[], None] = _nothing,
    ) -> None:
        """Be raw whenever the terminal is ours, from now on: put back before this process stops, raw again afterwards.

        Called from the loop: `stopping` before the process stops, `continued` after it has, and `raw` each time that
        the terminal has become raw.
        """
        if not os.isatty(self._fd):
            return
        self._loop, self._raw, self._stopping, self._continued = loop, raw, stopping, continued
        # What this process was told to ignore by its parent, which has no job control, it goes on ignoring.
        if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
            loop.on_signal(signal.SIGTSTP, self._stop)
        loop.on_signal(signal.SIGCONT, self._continue)
        self.take()

    def take(self) -> None:
        """Be raw now or, while another process group has the terminal, as soon as it is ours. After `follow`."""
        if self._loop is None:
            return
        if self.set_raw():
            self._raw()
        else:
            self.take_soon()

    def take_soon(self) -> None:
        """As `take`, in a moment; of a terminal that is gone nothing comes."""
        if self._loop is not None and not self._awaited and os.isatty(self._fd):
            self._awaited = True
            self._loop.call_later(_LOOK_AGAIN_S, self._look_again)

    def _look_again(self) -> None:
        self._awaited = False
        self.take()

    def _stop(self, number: int) -> None:
        assert self._loop is not None
        self.restore()
        self._stopping()
        # The handler's place is the default action's for as long as it takes to stop.
        handler = signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, handler)
        self._continue(signal.SIGCONT)

    def _continue(self, _number: int) -> None:
        self._continued()
        self.take()
