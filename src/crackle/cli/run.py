"""`crackle run`: a guest whose console is this terminal.

The guest runs in a child process, and this one keeps the terminal: however the child ends, killed included, it is put
back as it was, and one line says why. On a terminal the keys go through a pipe, so that Ctrl-] is heard whether the
guest reads or not: once asks the guest to shut down, twice pulls the plug. Without one the guest reads standard input
itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING

from crackle.errors import CrackleError, StateError
from crackle.runtime.loop import WRITABLE, Loop
from crackle.runtime.stream import OWN, borrow, put, take
from crackle.runtime.terminal import Terminal
from crackle.telemetry.sink import Sink

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from crackle.vmm.microvm import MicroVM

    Make = Callable[[tuple[int, int]], MicroVM]
    Attending = Callable[[MicroVM, Loop], AbstractContextManager[None]]

ESCAPE = b"\x1d"  # Ctrl-]
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
_ASK = signal.SIGUSR1

# Bytes of typed input kept for a guest that does not read; more is dropped, so that Ctrl-] is always heard.
_TYPED_AHEAD = 1 << 20
_CHUNK = 4096

# Seconds a guest has to heed the power button before it gets Ctrl-Alt-Del, for kernels without ACPI.
_HEED_S = 10.0


def run(make: Make, attending: Attending) -> int:
    """Make a microVM with the console's (input, output) descriptors in a child process, and run it to its end.

    attending: a context for the time in which the child's loop attends to the started microVM.
    Returns the exit status: 0 when the guest shut down or reset, 1 when it failed or could not be started, 143 (as for
    SIGTERM) when a signal or Ctrl-] twice ended it, 137 when the child was killed.
    """
    keys = os.pipe2(os.O_CLOEXEC) if os.isatty(0) else None
    report = os.pipe2(os.O_CLOEXEC)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(report[0])
            status = _Guest(make, attending, keys, report[1]).run()
        finally:
            os._exit(status)
    os.close(report[1])
    if keys is not None:
        os.close(keys[0])
    attendant = _Attendant(child, None if keys is None else keys[1], report[0])
    try:
        return attendant.run()
    finally:
        attendant.close()


# -- the child: the guest ------------------------------------------------------------------------------------------


class _Ended(BaseException):
    """A signal ends this process before the guest runs."""


class _Guest:
    """The microVM in the child process, and what its parent tells it by signals. report: the parent reads it."""

    def __init__(self, make: Make, attending: Attending, keys: tuple[int, int] | None, report: int) -> None:
        self._make = make
        self._attending = attending
        self._report = report
        self._asked = False
        self._ended_by: int | None = None
        self._loop: Loop | None = None
        # Should the parent be killed, the guest must not stay behind.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        self._console_in = 0
        if keys is not None:
            os.close(keys[1])
            self._console_in = keys[0]
        for number in _ENDING:
            signal.signal(number, self._end_early)
        signal.signal(_ASK, self._ask_early)

    def run(self) -> int:
        """To the guest's end; the exit status. What is to be said about it goes to the parent."""
        message = ""
        try:
            with self._make((self._console_in, 1)) as vm:
                self._attend(vm)
                if self._ended_by is None:
                    message = vm.wait().message
        except CrackleError as error:
            return self._tell(str(error), 1)
        except _Ended:
            pass
        if self._ended_by is not None:
            return self._tell(f"ended by {signal.Signals(self._ended_by).name}", 128 + signal.SIGTERM)
        return self._tell(message, 0)

    def _attend(self, vm: MicroVM) -> None:
        """Until the guest or a signal ends it."""
        # It keeps the signals for good, so that none cuts the end short.
        loop = self._loop = Loop()

        def end(number: int) -> None:
            self._ended_by = number
            loop.stop()

        def press(button: Callable[[], None]) -> None:
            with contextlib.suppress(StateError):  # it has ended
                button()

        def ask(_number: int) -> None:
            if vm.state == "Paused":
                press(vm.resume)
            press(vm.press_power_button)
            loop.call_later(_HEED_S, lambda: press(vm.send_ctrl_alt_del))

        loop.watch(vm.fileno(), lambda _events: loop.stop())
        for number in _ENDING:
            loop.on_signal(number, end)
        loop.on_signal(_ASK, ask)
        if self._asked:
            ask(_ASK)
        with self._attending(vm, loop):
            loop.run()

    def _end_early(self, number: int, _frame: object) -> None:
        self._ended_by = number
        raise _Ended

    def _ask_early(self, _number: int, _frame: object) -> None:
        self._asked = True

    def _tell(self, message: str, status: int) -> int:
        os.write(self._report, message.encode(errors="backslashreplace")[:_CHUNK])
        return status


# -- the parent: the terminal --------------------------------------------------------------------------------------


class _Attendant:
    """Keeps the terminal while the child runs. keys: where what is typed goes, or None; report: what the child says."""

    def __init__(self, child: int, keys: int | None, report: int) -> None:
        self._child = child
        self._keys = keys
        self._report = report
        self._typed = bytearray()
        self._lost = 0
        self._escapes = 0
        self._loop = Loop()
        self._terminal = Terminal(0)
        self._ended = os.pidfd_open(child)
        self._messages = Sink(2)
        self._input, self._how = (-1, OWN) if keys is None else borrow(0, os.O_RDONLY)
        self._before = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGTTIN)}

    def run(self) -> int:
        """Attend to the child until it ends; its exit status as a shell would give it."""
        self._loop.watch(self._ended, lambda _events: self._loop.stop())
        for number in _ENDING:
            if self._before[number] != signal.SIG_IGN:
                self._loop.on_signal(number, self._signal)
        if self._keys is not None:
            os.set_blocking(self._keys, False)
            # A terminal that others have is left to them; reading it would stop this process, and the guest.
            signal.signal(signal.SIGTTIN, signal.SIG_IGN)
            self._say("Ctrl-] asks the guest to shut down; twice pulls the plug")
            self._terminal.follow(
                self._loop,
                stopping=lambda: self._signal(signal.SIGSTOP),
                continued=lambda: self._signal(signal.SIGCONT),
                raw=self._listen,
            )
        self._loop.run()
        self._terminal.restore()
        _, status = os.waitpid(self._child, 0)
        return self._conclude(os.waitstatus_to_exitcode(status))

    def _conclude(self, code: int) -> int:
        os.set_blocking(self._report, False)
        try:
            message = os.read(self._report, _CHUNK).decode()
        except BlockingIOError:
            message = ""
        if self._lost:
            self._say(f"{self._lost} bytes that were typed are lost: the guest did not read them")
        if code < 0:
            message = f"the process that ran the guest was killed ({signal.Signals(-code).name})"
        elif self._escapes > 1 and code == 128 + signal.SIGTERM:
            message = "the plug was pulled (Ctrl-])"
        # A program that runs this, without a terminal, reads the status; what went wrong is said in any case.
        if code or self._keys is not None or os.isatty(2):
            self._say(message or f"the guest ended with status {code}")
        return code if code >= 0 else 128 - code

    def _say(self, message: str) -> None:
        # The guest's last line may have no end yet.
        start = "\r\n" if self._keys is not None and self._escapes else ""
        self._messages.write(f"{start}crackle: {message}\n".encode(errors="backslashreplace"))

    def _signal(self, number: int) -> None:
        os.kill(self._child, number)

    # What is typed

    def _listen(self) -> None:
        """Take keys from now on, until the terminal is others'."""
        self._loop.forget(self._input)
        self._loop.watch(self._input, self._take_keys)

    def _take_keys(self, _events: int) -> None:
        try:
            data = take(self._input, self._how, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            # EIO: others' when it was read, whoever has it by now.
            self._loop.forget(self._input)
            self._terminal.take_soon()
            return
        if not data:
            self._loop.forget(self._input)
            if not self._terminal.is_ours():
                self._terminal.take()
            return
        for _ in range(data.count(ESCAPE)):
            self._escape()
        self._pass_on(data.replace(ESCAPE, b""))

    def _escape(self) -> None:
        self._escapes += 1
        if self._escapes == 1:
            self._signal(_ASK)
            self._say("the guest is asked to shut down; Ctrl-] again pulls the plug")
        else:
            # One that does not even hear of the second ends at the third.
            self._signal(signal.SIGTERM if self._escapes == 2 else signal.SIGKILL)

    def _pass_on(self, data: bytes) -> None:
        assert self._keys is not None
        room = _TYPED_AHEAD - len(self._typed)
        self._lost += max(0, len(data) - room)
        waiting = bool(self._typed)
        self._typed += data[:room]
        if not waiting and self._typed and not self._hand_over():
            self._loop.watch(self._keys, self._hand_over_more, WRITABLE)

    def _hand_over(self) -> bool:
        """Whether all that was typed is in the guest's hands."""
        assert self._keys is not None
        try:
            while self._typed:
                taken = put(self._keys, OWN, bytes(self._typed[:_CHUNK]))
                if not taken:
                    return False
                del self._typed[:taken]
        except OSError:
            self._typed.clear()  # the guest is gone
        return True

    def _hand_over_more(self, _events: int) -> None:
        assert self._keys is not None
        if self._hand_over():
            self._loop.forget(self._keys)

    def close(self) -> None:
        """Give the descriptors and the signals back."""
        self._loop.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._messages.close()
        for fd in (self._ended, self._report, self._input, -1 if self._keys is None else self._keys):
            if fd >= 0:
                os.close(fd)
