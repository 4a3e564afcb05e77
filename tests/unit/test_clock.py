"""A machine's clock, which stands still while the machine does."""

from __future__ import annotations

import time

from crackle.runtime.clock import MachineClock


def test_it_shows_the_monotonic_clock_until_the_first_pause() -> None:
    clock = MachineClock()
    before = time.monotonic_ns()
    now = clock.now_ns
    assert before <= now <= time.monotonic_ns()


def test_it_stands_still_while_paused_and_goes_on_from_there() -> None:
    clock = MachineClock()
    lost = 0
    for _ in range(3):
        clock.pause()
        clock.pause()
        begin, shown = time.monotonic_ns(), clock.now_ns
        assert clock.paused
        while time.monotonic_ns() - begin < 1_000_000:
            assert clock.now_ns == shown
        least = time.monotonic_ns() - begin
        clock.resume()
        clock.resume()
        assert not clock.paused
        lost += least
        assert shown <= clock.now_ns <= time.monotonic_ns() - lost
