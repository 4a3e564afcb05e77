"""`crackle run`: a guest whose console is this terminal.

The guest runs in a child process, and this one keeps the terminal: however the child ends, killed included, it is put
back as it was. On a terminal the keys go through a pipe, so that Ctrl-] can be caught; without one the guest reads
standard input itself.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from typing import TYPE_CHECKING

from crackle.errors import CrackleError
from crackle.runtime.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable

ESCAPE = b"\x1d"  # Ctrl-]
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


def run(boot: Callable[[tuple[int, int]], None]) -> int:
    """Call `boot` with the console's (input, output) descriptors in a child process; returns the exit status.

    `boot` runs the guest to its end and raises CrackleError when that was not a good one.
    """
    keys = os.pipe2(os.O_CLOEXEC) if os.isatty(0) else None
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = _child(boot, keys)
        finally:
            os._exit(status)
    if keys is not None:
        os.close(keys[0])
    terminal = Terminal(0)
    terminal.set_raw()
    before = {number: signal.signal(number, lambda signum, _: _signal(child, signum)) for number in _ENDING}
    try:
        return _attend(child, None if keys is None else keys[1])
    finally:
        terminal.restore()
        for number, handler in before.items():
            signal.signal(number, handler)
        if keys is not None:
            os.close(keys[1])


def _child(boot: Callable[[tuple[int, int]], None], keys: tuple[int, int] | None) -> int:
    # Should the parent be killed, the guest must not stay behind.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    console_in = 0
    if keys is not None:
        os.close(keys[1])
        console_in = keys[0]
    for number in _ENDING:
        signal.signal(number, _end)
    try:
        boot((console_in, 1))
    except CrackleError as error:
        print(f"crackle: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM
    return 0


def _end(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _signal(child: int, number: int) -> None:
    os.kill(child, number)


def _attend(child: int, keys: int | None) -> int:
    """Pass keys on until the child ends; returns its exit status as a shell would give it."""
    ended = os.pidfd_open(child)
    # A signal that arrives just before the poll ends it too.
    woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(woken, select.POLLIN)
        if keys is not None:
            poll.register(0, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if ended in ready:
                break
            if woken in ready:
                os.read(woken, 64)
            if keys is not None and 0 in ready and not _pass_keys(child, keys):
                poll.unregister(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code
    finally:
        signal.set_wakeup_fd(before)
        for fd in (ended, woken, wake):
            os.close(fd)


def _pass_keys(child: int, keys: int) -> bool:
    """Whether there may be more."""
    try:
        data = os.read(0, 256)
        if ESCAPE in data:
            os.kill(child, signal.SIGTERM)
            return False
        return bool(data) and os.write(keys, data) > 0
    except OSError:
        return False
