"""The event loop of the main thread: descriptors, timers and signals, over ``epoll(7)``.

It waits without a timeout while no timer is set, so an idle process uses no CPU time.
"""

from __future__ import annotations

import os
import select
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Handler = Callable[[int], None]

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT


class Timer:
    """A call that is due at ``when``, in seconds of the monotonic clock."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self.call = call


class Loop:
    """Runs handlers one at a time, in the thread that calls :meth:`run`.

    Owns its epoll descriptor and signal pipe.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._handlers: dict[int, Handler] = {}
        self._timers: list[Timer] = []
        self._signals: dict[int, Callable[[int], None]] = {}
        self._signal_pipe: tuple[int, int] | None = None
        self._running = False

    def watch(self, fd: int, handler: Handler, events: int = READABLE) -> None:
        """Call ``handler`` with the events that are ready whenever some of ``events`` are.

        Or the peer hung up.
        """
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

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

    def cancel(self, timer: Timer) -> None:
        """Forget a timer; one that has fired is ignored."""
        if timer in self._timers:
            self._timers.remove(timer)

    def on_signal(self, number: int, handler: Callable[[int], None]) -> None:
        """Call ``handler`` from the loop when the process gets the signal. Main thread only."""
        if self._signal_pipe is None:
            self._signal_pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(self._signal_pipe[1], warn_on_full_buffer=False)
            self.watch(self._signal_pipe[0], self._deliver_signals)
        self._signals[number] = handler
        # The wake-up descriptor gets a byte only for signals that have a Python handler.
        signal.signal(number, lambda _number, _frame: None)

    def _deliver_signals(self, _events: int) -> None:
        assert self._signal_pipe is not None
        for number in os.read(self._signal_pipe[0], 512):
            if number in self._signals:
                self._signals[number](number)

    def run(self) -> None:
        """Serve until :meth:`stop` is called."""
        self._running = True
        poll, handlers = self._epoll.poll, self._handlers
        while self._running:
            for fd, events in poll(self._next_timeout()):
                handler = handlers.get(fd)
                if handler is not None:
                    handler(events)
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
            self._timers.remove(timer)
            timer.call()

    def close(self) -> None:
        """Give signals their default actions back and close the descriptors; idempotent."""
        for number in self._signals:
            signal.signal(number, signal.SIG_DFL)
        self._signals.clear()
        if self._signal_pipe is not None:
            signal.set_wakeup_fd(-1)
            for fd in self._signal_pipe:
                os.close(fd)
            self._signal_pipe = None
        self._handlers.clear()
        self._epoll.close()
