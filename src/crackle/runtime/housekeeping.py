"""What of this process is in memory and need not be.

Starting touches much of the interpreter that is never needed again. Its pages stay in the page cache, which all
processes share; that they are mapped here, and counted here, is what `give_back` undoes.
"""

from __future__ import annotations

from crackle.errors import KvmError
from crackle.runtime import image
from crackle.runtime.census import living
from crackle.runtime.mappings import trim_heap, unmap_code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from crackle.runtime.threads import Worker

    class Machine(Protocol):
        """Calls while all its threads stand still."""

        def at_rest(self, call: Callable[[Sequence[Worker]], object]) -> None: ...


# Microseconds for which a guest stands still, at most, and a little more.
_MOMENT_US = 1000


def settle() -> None:
    """Give back what need not be looked at, now that the guest runs; what is needed after all comes again."""
    trim_heap()
    unmap_code()


def give_back_unchanged(machine: Machine) -> bool:
    """Give back what is again as the zygote had it, the machine standing still for a moment; whether there is more.

    StateError when it has stopped, KvmError when this is no moment for it.
    """
    if not image.taken():
        return False
    machine.at_rest(_give_back)
    return image.unfinished()


def _give_back(workers: Sequence[Worker]) -> None:
    """Nobody else may be writing then."""
    if living() > sum(worker.ident != 0 for worker in workers):
        raise KvmError("another thread is there, which may write to what is given back")
    image.give_back(workers, _MOMENT_US)
