"""The event loop of the main thread: descriptors, timers and signals, over ``epoll(7)``.

It waits without a timeout while no timer is set, so an idle process uses no CPU time. What goes wrong in a callback is
told and does not end the loop, unless the callback is essential: a descriptor watched as such, and signals.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    Handler = Callable[[int], None]

# The interpreter ignores these itself, whatever its parent wanted.
_IGNORED_ITSELF = (_signal.SIGPIPE, _signal.SIGXFSZ)

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT


def _nobody(_events: int) -> None:
    """Serves a descriptor that was forgotten when it was ready already."""


_NOBODY = (_nobody, None)


class Timer:
    """A call that is due at ``when``, in seconds of the monotonic clock, and every ``period`` seconds from then on."""

    __slots__ = ("call", "period", "when")

    def __init__(self, when: float, call: Callable[[], None], period: float | None = None) -> None:
        self.when = when
        self.call = call
        self.period = period


class Loop:
    """Runs handlers one at a time, in the thread that calls :meth:`run`.

    ``report`` is told, in a sentence, of each callback that has failed; without it all of them are essential.
    Owns its epoll descriptor and signal pipe.
    """

    def __init__(self, report: Callable[[str], None] | None = None) -> None:
        self._report = report
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._handlers: dict[int, tuple[Handler, Callable[[], None] | None]] = {}
        self._timers: list[Timer] = []
        self._signals: dict[int, tuple[Callable[[int], None], Any]] = {}
        self._signal_pipe: tuple[int, int] | None = None
        self._sent_pipe: tuple[int, int] | None = None
        self._running = False

    def attempt(self, call: Callable[..., object], *arguments: object) -> bool:
        """Do what can be done without: a failure is reported, and False."""
        try:
            call(*arguments)
        except Exception as error:
            if self._report is None:
                raise
            name = getattr(call, "__qualname__", repr(call))
            self._report(f"{name} failed, and is done without: {type(error).__name__}: {error}")
            return False
        return True

    def watch(
        self,
        fd: int,
        handler: Handler,
        events: int = READABLE,
        *,
        on_failure: Callable[[], None] | None = None,
        essential: bool = False,
    ) -> None:
        """Call ``handler`` with the events that are ready whenever some of ``events`` are.

        Or the peer hung up. A handler that fails would at once be called again: ``on_failure`` says what is done
        instead, to forget the descriptor if it says nothing. One that is ``essential`` ends the loop with its error.
        """
        self._epoll.register(fd, events)
        self._handlers[fd] = handler, None if essential else on_failure or (lambda: self.forget(fd))

    def change(self, fd: int, events: int) -> None:
        """Wait for ``events`` on a watched descriptor from now on."""
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Stop watching; to be called before the descriptor is closed. Unknown descriptors are ignored."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call once, ``seconds`` from now, unless cancelled."""
        timer = Timer(time.monotonic() + seconds, call)
        self._timers.append(timer)
        return timer

    def call_every(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Call every ``seconds`` from now on, unless cancelled; also after it has failed."""
        timer = Timer(time.monotonic() + seconds, call, seconds)
        self._timers.append(timer)
        return timer

    def cancel(self, timer: Timer) -> None:
        """Forget a timer; one that has fired is ignored."""
        if timer in self._timers:
            self._timers.remove(timer)

    def on_signal(self, number: int, handler: Callable[[int], None]) -> None:
        """Call ``handler`` from the loop when the process gets the signal. Main thread only.

        A signal that the process was started to ignore (nohup(1), a shell's ``&``) stays ignored.
        """
        before = _signal.getsignal(number)
        if before == _signal.SIG_IGN and number not in (*_IGNORED_ITSELF, *self._signals):
            return
        if self._signal_pipe is None:
            self._signal_pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            _signal.set_wakeup_fd(self._signal_pipe[1], warn_on_full_buffer=False)
            self.watch(self._signal_pipe[0], self._deliver_signals, essential=True)
        self._signals[number] = handler, self._signals[number][1] if number in self._signals else before
        # The wake-up descriptor gets a byte only for signals that have a Python handler.
        _signal.signal(number, lambda _number, _frame: None)

    def on_sent(self, numbers: Iterable[int], handler: Callable[[int, int], None]) -> None:
        """Call ``handler`` with number and code (sigaction(2)) when somebody sends the process one of these signals.

        For those that a fault raises, too: a fault ends the process as ever. Of all loops, one can have this. What the
        process was started to ignore stays ignored.
        """
        from crackle.runtime.signals import hear

        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._sent_pipe = reading, writing
        heard = [
            number
            for number in numbers
            if number in _IGNORED_ITSELF or _signal.getsignal(number) != _signal.SIG_IGN
        ]
        hear(writing, heard)

        def deliver(_events: int) -> None:
            # Two ints each; a pipe takes and gives them whole.
            said = memoryview(os.read(reading, 512)).cast("i").tolist()
            for number, code in zip(said[::2], said[1::2], strict=True):
                handler(number, code)

        self.watch(reading, deliver, essential=True)

    def _deliver_signals(self, _events: int) -> None:
        assert self._signal_pipe is not None
        try:
            numbers = os.read(self._signal_pipe[0], 512)
        except BlockingIOError:
            return
        for number in numbers:
            if number in self._signals:
                self._signals[number][0](number)

    def run(self) -> None:
        """Serve until :meth:`stop` is called."""
        self._running = True
        poll, handlers = self._epoll.poll, self._handlers
        while self._running:
            for fd, events in poll(self._next_timeout()):
                handler, on_failure = handlers.get(fd, _NOBODY)
                if on_failure is None:
                    handler(events)
                elif not self.attempt(handler, events):
                    self.attempt(on_failure)
            if self._timers:
                self._fire_timers()

    def stop(self) -> None:
        """Return from :meth:`run` once the present round of handlers is done."""
        self._running = False

    def _next_timeout(self) -> float | None:
        if not self._timers:
            return None
        return max(0.0, min(timer.when for timer in self._timers) - time.monotonic())

    def _fire_timers(self) -> None:
        now = time.monotonic()
        for timer in [timer for timer in self._timers if timer.when <= now]:
            if timer not in self._timers:
                continue  # another has cancelled it
            if timer.period is None:
                self._timers.remove(timer)
            else:
                timer.when = now + timer.period
            self.attempt(timer.call)

    def close(self) -> None:
        """Give signals the handlers back that they had and close the descriptors; idempotent."""
        for number, (_, before) in self._signals.items():
            _signal.signal(number, _signal.SIG_DFL if before is None else before)
        self._signals.clear()
        if self._signal_pipe is not None:
            _signal.set_wakeup_fd(-1)
            for fd in self._signal_pipe:
                os.close(fd)
            self._signal_pipe = None
        if self._sent_pipe is not None:
            from crackle.runtime.signals import hear_no_more

            hear_no_more()
            for fd in self._sent_pipe:
                os.close(fd)
            self._sent_pipe = None
        self._handlers.clear()
        self._epoll.close()
