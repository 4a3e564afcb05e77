"""What of this process is in memory and need not be.

Starting touches much of the interpreter that is never needed again. Its pages stay in the page cache, which all
processes share; that they are mapped here, and counted here, is what `give_back` undoes.
"""

from __future__ import annotations

import contextlib
import os

from crackle.errors import CrackleError
from crackle.runtime import image
from crackle.runtime.mappings import trim_heap, unmap_code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from crackle.runtime.threads import Worker

    class Machine(Protocol):
        """Calls while all its threads stand still."""

        def at_rest(self, call: Callable[[Sequence[Worker]], object]) -> None: ...


# <linux/sched.h>, PF_IO_WORKER and PF_USER_WORKER: threads that the kernel has made for itself.
_OF_KERNEL = 0x10 | 0x4000


def settle(machine: Machine) -> None:
    """Give back all that can be, now that the guest runs; what it needs after all comes again. Takes milliseconds."""
    trim_heap()
    unmap_code()
    # A guest whose threads cannot stand still for a moment is left alone.
    with contextlib.suppress(CrackleError):
        machine.at_rest(_give_back_unchanged)


def _give_back_unchanged(workers: Sequence[Worker]) -> None:
    """What is again as the zygote had it; nobody else may be writing then."""
    if sum(map(_is_ours, os.listdir("/proc/self/task"))) <= 1 + len(workers):
        image.give_back(workers)


def _is_ours(thread: str) -> bool:
    """Whether it runs our code, and is no worker of the kernel's (proc(5), stat 9)."""
    with open(f"/proc/self/task/{thread}/stat", "rb", buffering=0) as stat:
        return not int(stat.read(4096).rpartition(b")")[2].split()[6]) & _OF_KERNEL
