"""A forked child that does one thing and leaves without what its parent has set up for its own end (fork(2))."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

_ALL = _signal.valid_signals()


def fork_child(child: Callable[..., NoReturn], *given: object, fork: Callable[[], int] = os.fork) -> int:
    """The process that does `child`, all signals blocked: none arrives there before it wants that. OSError."""
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, _ALL)
    try:
        pid = fork()
        if not pid:
            try:
                child(*given)
            finally:
                os._exit(1)
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
    return pid
