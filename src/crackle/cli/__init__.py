"""The commands: `crackle`, `crackle-vmm` and `crackle-jailer`. Each parses, calls and prints.

Imported first of all by either, so Ctrl-C is made to end the process here: while the rest is imported there is nothing
to clean up, and a traceback says nothing to anybody.
"""

import _signal  # type: ignore[import-not-found]  # the signal module drags in enum
import sys


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process at once, unless it was started to ignore that (nohup(1), a shell's ``&``)."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def interrupt_by_exception() -> None:
    """The reverse, for a command that has something to clean up."""
    if _signal.getsignal(_signal.SIGINT) == _signal.SIG_DFL:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)


_MODULES = ("crackle.cli.jailer", "crackle.cli.main", "crackle.cli.vmm", "crackle.cli.zygote")


def _is_command() -> bool:
    """Whether this process is one of the commands, and no program that imports them."""
    name = sys.argv[0].rpartition("/")[2] if sys.argv else ""
    if name == "-m":  # until the module runs that `python -m` names
        return any(word.endswith(_MODULES) for word in sys.orig_argv)
    return name in ("crackle", "crackle-jailer", "crackle-vmm")


if _is_command():
    end_on_interrupt()
