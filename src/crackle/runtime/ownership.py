"""Whose a running machine is: the process's that made it, until that ends.

One weak registry of what has threads and descriptors of its own. At the process's ordinary end, when no non-daemon
thread is left, each is ended while Python still runs; later its threads could not be waited for any more. In a forked
child, which has copies of the descriptors but none of the threads, each is disowned: the copies are closed and nothing
else is touched.
"""

from __future__ import annotations

import atexit
import os
import sys
from _thread import get_ident
from _weakref import ref

from crackle.errors import KvmError
from crackle.runtime.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Owner(Protocol):
        """Something with threads, descriptors or files, which are this process's alone."""

        def end(self) -> None:
            """Stop the threads and give everything back. Idempotent."""

        def disown(self) -> None:
            """In a forked child: close the copies; wait for nothing, take no lock, write to nothing."""

        def runs(self, thread: int) -> bool:
            """Whether that is one of its threads, which cannot wait for their own end."""


_owners: dict[int, ref[Owner]] = {}
# What could not be ended where it was dropped, for want of a thread.
_left: list[Callable[[], None]] = []


def enrol(owner: Owner) -> None:
    """See to `owner` at the end of the process, and after a fork, for as long as there is somebody who refers to it."""
    key = id(owner)

    def forget(gone: ref[Owner]) -> None:
        if _owners.get(key) is gone:
            del _owners[key]

    _owners[key] = ref(owner, forget)


def end_dropped(owner: Owner) -> None:
    """End what nobody refers to any more: here, or on a thread of its own where this is a machine's.

    The collector runs on any thread, and so does whoever drops the last reference. When it asks, an owner that it found
    in a cycle is in the registry no more.
    """
    thread = get_ident()
    if not owner.runs(thread) and not any(other.runs(thread) for other in _alive()):
        owner.end()
        return
    try:
        Thread("reaper", owner.end)
    except KvmError:
        _left.append(owner.end)


def _alive() -> list[Owner]:
    """The youngest first: what is made of others goes before them."""
    return [owner for held in reversed(list(_owners.values())) if (owner := held()) is not None]


def _at_exit() -> None:
    for end in [*(owner.end for owner in _alive()), *_left]:
        try:
            end()
        except Exception as error:
            # The others' turn comes in any case.
            sys.excepthook(type(error), error, error.__traceback__)


def _in_child() -> None:
    for owner in _alive():
        owner.disown()
    _owners.clear()
    _left.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_in_child)
