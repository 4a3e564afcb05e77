"""Token buckets: what passes, what waits, and that the rate is kept."""

from __future__ import annotations

import os
import select
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError
from crackle.ratelimit.limiter import RateLimiter
from crackle.ratelimit.state import BucketState, LimiterState
from crackle.runtime.clock import MachineClock
from crackle.schema.rate_limiter import RateLimiter as Limits
from crackle.schema.rate_limiter import TokenBucket

HOUR_MS = 3_600_000
MOST = (1 << 64) - 1


def limiter(
    bandwidth: tuple[int, ...] | None = None, operations: tuple[int, ...] | None = None
) -> RateLimiter:
    """Buckets as (size, refill_time in ms, one-time burst)."""
    both = [None if given is None else TokenBucket(*given) for given in (bandwidth, operations)]
    return RateLimiter(Limits(*both))


def wait(limited: RateLimiter, seconds: float = 10.0) -> None:
    """Until the timer fires."""
    assert select.select([limited.timer_fd], [], [], seconds)[0], "the timer does not fire"
    limited.fired()


def test_without_a_bucket_or_with_an_empty_one_nothing_is_limited() -> None:
    for free in (RateLimiter(), RateLimiter(Limits()), limiter((0, 0)), limiter((0, 100), (0, 0))):
        assert not free.limited
        assert all(free.try_consume(1 << 63, 1 << 63) for _ in range(100))
        assert free.throttled == 0
        assert free.save() == LimiterState(bandwidth=None, ops=None)


def test_a_full_bucket_gives_what_it_holds_and_no_more() -> None:
    full = limiter((1000, HOUR_MS))
    assert [full.try_consume(300, 1) for _ in range(4)] == [True, True, True, False]
    assert full.blocked
    assert full.throttled == 1


def test_while_it_is_blocked_even_what_would_fit_is_refused() -> None:
    full = limiter((1000, HOUR_MS))
    assert full.try_consume(900, 1)
    assert not full.try_consume(200, 1)
    assert not full.try_consume(1, 1)


def test_both_buckets_give_or_neither() -> None:
    both = limiter((1000, HOUR_MS), (2, HOUR_MS))
    assert both.try_consume(10, 1)
    assert both.try_consume(10, 1)
    assert not both.try_consume(10, 1)
    state = both.save()
    assert state.bandwidth is not None
    assert state.bandwidth.level == 980


def test_the_burst_is_spent_first_and_once() -> None:
    bursting = limiter((1000, HOUR_MS, 5000))
    assert bursting.try_consume(4000, 1)
    assert bursting.try_consume(1500, 1)
    state = bursting.save().bandwidth
    assert state is not None
    assert (state.burst_left, state.level) == (0, 500)


def test_a_refund_undoes_what_was_taken() -> None:
    bursting = limiter((1000, HOUR_MS, 100))
    before = bursting.save().bandwidth
    assert bursting.try_consume(400, 1)
    bursting.give(400, 1)
    after = bursting.save().bandwidth
    assert before is not None
    assert after is not None
    assert (after.level, after.burst_left) == (before.level, before.burst_left)


def test_a_request_larger_than_the_bucket_passes_when_it_is_full_and_leaves_a_debt() -> None:
    small = limiter((1000, HOUR_MS))
    assert small.try_consume(5000, 1)
    state = small.save().bandwidth
    assert state is not None
    assert state.level == -4000
    assert not small.try_consume(1, 1)


def test_the_timer_fires_when_there_are_tokens_again() -> None:
    fast = limiter((100, 20))
    assert fast.try_consume(100, 1)
    assert not fast.try_consume(50, 1)
    begin = time.monotonic()
    wait(fast)
    assert not fast.blocked
    assert fast.events == 1
    assert fast.try_consume(50, 1), f"fired {time.monotonic() - begin} s later, and there are none"


@pytest.mark.parametrize(("size", "refill_ms", "request_size"), [(1000, 10, 7), (10, 10, 1), (300, 3, 1000)])
def test_the_rate_is_never_exceeded_and_nothing_earned_is_lost(
    size: int, refill_ms: int, request_size: int
) -> None:
    limited = limiter((size, refill_ms))
    taken, begin = 0, time.monotonic_ns()
    while time.monotonic_ns() - begin < 200_000_000:
        if limited.try_consume(request_size, 1):
            taken += request_size
        else:
            wait(limited)
    elapsed = time.monotonic_ns() - begin
    state = limited.save().bandwidth
    assert state is not None
    earned = elapsed * size / (refill_ms * 1e6)
    assert taken <= size + earned + request_size
    # All it ever got is what was taken and what is left, less what came while it was full.
    assert taken + state.level <= size + earned


@given(
    size=st.integers(1, MOST),
    refill_ms=st.integers(1, MOST),
    burst=st.integers(0, MOST),
    requests=st.lists(st.integers(0, (1 << 64) - 1) | st.integers(0, 5000), max_size=20),
)
def test_no_numbers_overflow(size: int, refill_ms: int, burst: int, requests: list[int]) -> None:
    limited = limiter((size, refill_ms, burst), (size, refill_ms, burst))
    for tokens in requests:
        if limited.try_consume(tokens, tokens):
            limited.give(0, 0)
        state = limited.save().bandwidth
        assert state is not None
        assert state.level <= size
        assert state.burst_left <= burst
        limited.restore(limited.save())


def test_a_bucket_without_a_refill_time_limits_nothing() -> None:
    free = limiter((5, 0, 7), (5, 0))
    assert not free.limited
    assert all(free.try_consume(1 << 40, 100) for _ in range(100))


@pytest.mark.parametrize(
    ("bucket", "what"), [((1 << 64, 1), "size"), ((5, 1 << 64), "refill_time"), ((5, -1), "refill_time")]
)
def test_numbers_of_more_than_64_bits_are_refused(bucket: tuple[int, int], what: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=what):
        limiter(bucket)


@pytest.mark.parametrize("size", [1, 5, 1 << 40, 1 << 63, MOST])
@pytest.mark.parametrize("refill_ms", [1, 1000, 1 << 41, 1 << 63, MOST])
def test_the_rate_is_kept_over_all_of_64_bits(size: int, refill_ms: int) -> None:
    limited = limiter((size, refill_ms))
    full = limited.save().bandwidth
    assert full is not None
    assert (full.size, full.refill_time) == (size, refill_ms)
    age_ns = time.monotonic_ns() // 2
    for share, passes in ((0.9, True), (1.1, False)):
        # What is refilled while the test runs is little beside what it had half of the machine's time for.
        wanted = int(age_ns * size / (refill_ms * 10**6) * share) + (not passes)
        if not 0 < wanted <= min(size, 1 << 62):
            continue
        fresh = RateLimiter()
        state = BucketState(
            size=size, refill_time=refill_ms, one_time_burst=0, burst_left=0, level=0, age_ns=age_ns
        )
        fresh.restore(LimiterState(bandwidth=state, ops=None))
        assert fresh.try_consume(wanted, 0) is passes


def test_a_saved_limiter_goes_on_where_it_was() -> None:
    first = limiter((1000, HOUR_MS, 70), (10, HOUR_MS))
    assert first.try_consume(570, 3)
    second = RateLimiter()
    state = first.save()
    second.restore(state)
    again = second.save()
    assert state.bandwidth is not None
    assert again.bandwidth is not None
    assert again.bandwidth.level == state.bandwidth.level == 500
    assert again.bandwidth.age_ns >= state.bandwidth.age_ns
    assert [second.try_consume(100, 1) for _ in range(6)] == [True] * 5 + [False]


def test_a_state_that_cannot_be_is_refused() -> None:
    wrong = BucketState(size=10, refill_time=1, one_time_burst=0, burst_left=0, level=11, age_ns=0)
    with pytest.raises(ConfigError, match="holds 11 tokens"):
        RateLimiter().restore(LimiterState(bandwidth=wrong, ops=None))


def test_closing_gives_the_timer_back() -> None:
    limited = limiter((1, 1))
    fd = limited.timer_fd
    limited.close()
    limited.close()
    assert limited.timer_fd == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_no_bucket_fills_while_the_machine_is_paused() -> None:
    clock = MachineClock()
    limiter = RateLimiter(Limits(ops=TokenBucket(size=10, refill_time=100)))
    limiter.use(clock)
    for _ in range(10):
        assert limiter.try_consume(1, 1)
    clock.pause()
    begin = time.monotonic()
    while time.monotonic() - begin < 0.25:  # as long as it takes to fill it twice
        assert not limiter.try_consume(1, 10)
        limiter.fired()
    clock.resume()
    assert not limiter.try_consume(1, 10)


def test_a_limiter_of_a_machine_that_was_paused_fills_from_its_beginning() -> None:
    clock = MachineClock()
    clock.pause()
    begin = time.monotonic()
    while time.monotonic() - begin < 1:
        pass
    clock.resume()
    limiter = RateLimiter(Limits(ops=TokenBucket(size=10, refill_time=1)))
    limiter.use(clock)
    assert limiter.try_consume(1, 10)
    begin = time.monotonic()
    while not limiter.try_consume(1, 10):
        limiter.fired()
        assert time.monotonic() - begin < 0.9
