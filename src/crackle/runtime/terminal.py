"""The terminal on which the guest's console appears: raw while the guest has it, as it was afterwards."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Terminal:
    """Borrows ``fd``; does nothing if it is not a terminal or another process group has the terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] | None = None

    def set_raw(self) -> None:
        """Hand every key to the guest: no echo, no lines, no signals; output is processed as before."""
        if self._before is not None or not self._is_ours():
            return
        import termios

        self._before = termios.tcgetattr(self._fd)
        mode = termios.tcgetattr(self._fd)
        mode[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
        termios.tcsetattr(self._fd, termios.TCSANOW, mode)

    def restore(self) -> None:
        """Put the terminal back as :meth:`set_raw` found it; idempotent."""
        before, self._before = self._before, None
        if before is None or not self._is_ours():
            return
        import termios

        termios.tcsetattr(self._fd, termios.TCSANOW, before)

    def _is_ours(self) -> bool:
        if not os.isatty(self._fd):
            return False
        # A background process that sets the terminal it belongs to is stopped by SIGTTOU.
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return True
