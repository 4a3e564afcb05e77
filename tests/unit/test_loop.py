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
