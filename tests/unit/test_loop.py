"""The event loop: descriptors, timers, signals."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from crackle.runtime.loop import READABLE, WRITABLE, Loop

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for fd in ends:
        os.close(fd)


def test_a_handler_is_called_when_its_descriptor_is_ready(loop: Loop, pipe: tuple[int, int]) -> None:
    got: list[bytes] = []

    def read(events: int) -> None:
        assert events & READABLE
        got.append(os.read(pipe[0], 10))
        loop.stop()

    loop.watch(pipe[0], read)
    os.write(pipe[1], b"x")
    loop.run()
    assert got == [b"x"]


def test_another_event_can_be_waited_for(loop: Loop, pipe: tuple[int, int]) -> None:
    loop.watch(pipe[1], lambda _events: loop.stop(), 0)
    loop.change(pipe[1], WRITABLE)
    loop.run()


def test_a_forgotten_descriptor_is_not_served_even_if_it_was_ready(loop: Loop) -> None:
    first, second = os.pipe2(os.O_NONBLOCK), os.pipe2(os.O_NONBLOCK)
    called: list[int] = []

    def serve(mine: int, other: int) -> None:
        called.append(mine)
        loop.forget(other)
        loop.forget(other)
        loop.stop()

    loop.watch(first[0], lambda _: serve(first[0], second[0]))
    loop.watch(second[0], lambda _: serve(second[0], first[0]))
    for _, writer in (first, second):
        os.write(writer, b"x")
    loop.run()
    assert len(called) == 1
    for fd in (*first, *second):
        os.close(fd)


def test_timers_fire_in_their_order_and_once(loop: Loop) -> None:
    fired: list[str] = []
    loop.call_later(0.03, lambda: fired.append("late"))
    loop.call_later(0.04, loop.stop)
    loop.call_later(0.0, lambda: fired.append("soon"))
    cancelled = loop.call_later(0.01, lambda: fired.append("never"))
    loop.cancel(cancelled)
    loop.cancel(cancelled)
    begin = time.monotonic()
    loop.run()
    assert fired == ["soon", "late"]
    assert time.monotonic() - begin >= 0.03


def test_a_timer_may_set_the_next(loop: Loop) -> None:
    fired: list[int] = []

    def tick() -> None:
        fired.append(len(fired))
        if len(fired) == 3:
            loop.stop()
        else:
            loop.call_later(0, tick)

    loop.call_later(0, tick)
    loop.run()
    assert fired == [0, 1, 2]


def test_a_signal_is_delivered_in_the_loop(loop: Loop) -> None:
    got: list[int] = []

    def note(number: int) -> None:
        got.append(number)
        if len(got) == 2:
            loop.stop()

    loop.on_signal(signal.SIGUSR1, note)
    loop.on_signal(signal.SIGUSR2, note)
    os.kill(os.getpid(), signal.SIGUSR1)
    loop.call_later(0, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    loop.run()
    assert got == [signal.SIGUSR1, signal.SIGUSR2]


def test_a_closed_loop_leaves_signals_as_they_were() -> None:
    loop = Loop()
    loop.on_signal(signal.SIGUSR1, lambda _number: None)
    loop.close()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


def test_an_idle_loop_uses_no_time(loop: Loop) -> None:
    loop.call_later(0.2, loop.stop)
    begin = time.process_time()
    loop.run()
    assert time.process_time() - begin < 0.1


# What fails


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def lenient(reports: list[str]) -> Iterator[Loop]:
    loop = Loop(reports.append)
    yield loop
    loop.close()


def fail(*_arguments: object) -> None:
    raise OSError(24, "Too many open files")


def test_a_timer_that_fails_is_told_and_ends_nothing(lenient: Loop, reports: list[str]) -> None:
    lenient.call_later(0, fail)
    lenient.call_later(0, lenient.stop)
    lenient.run()
    assert reports == ["fail failed, and is done without: OSError: [Errno 24] Too many open files"]


def test_a_periodic_timer_comes_back_after_a_failure(lenient: Loop, reports: list[str]) -> None:
    calls: list[int] = []

    def tick() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            lenient.stop()
        else:
            raise ValueError("not now")

    lenient.call_every(0.001, tick)
    lenient.run()
    assert calls == [0, 1, 2]
    assert len(reports) == 2


def test_a_timer_may_cancel_another_that_is_due(loop: Loop) -> None:
    second = loop.call_later(0, fail)
    loop._timers.insert(0, loop.call_later(0, lambda: loop.cancel(second)))
    loop.call_later(0, loop.stop)
    loop.run()


def test_a_handler_that_fails_is_not_called_for_ever(
    lenient: Loop, reports: list[str], pipe: tuple[int, int]
) -> None:
    os.write(pipe[1], b"x")
    lenient.watch(pipe[0], fail)
    lenient.call_later(0.05, lenient.stop)
    lenient.run()
    assert len(reports) == 1


def test_what_is_done_when_a_handler_fails_can_be_said(lenient: Loop, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    lenient.watch(pipe[0], fail, on_failure=lenient.stop)
    lenient.run()


def test_an_essential_handler_ends_the_loop_with_its_error(lenient: Loop, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    lenient.watch(pipe[0], fail, essential=True)
    with pytest.raises(OSError, match="Too many open files"):
        lenient.run()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_parent_ignored_stays_ignored(lenient: Loop, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        lenient.on_signal(number, lambda _number: lenient.stop())
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_signals_get_their_handlers_back(lenient: Loop) -> None:
    def handler(*_arguments: object) -> None:
        pass

    before = signal.signal(signal.SIGHUP, handler)
    try:
        lenient.on_signal(signal.SIGHUP, print)
        lenient.on_signal(signal.SIGHUP, print)
        lenient.close()
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)
