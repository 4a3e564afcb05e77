"""What a rate limiter saves in a snapshot."""

from __future__ import annotations

import msgspec


class BucketState(msgspec.Struct, frozen=True, kw_only=True):
    """A token bucket: its configuration, and what is in it.

    refill_time: milliseconds. burst_left: tokens of the one-time burst. level: tokens, below zero after a request
    larger than the bucket. age_ns: nanoseconds since it was last refilled.
    """

    size: int
    refill_time: int
    one_time_burst: int
    burst_left: int
    level: int
    age_ns: int


class LimiterState(msgspec.Struct, frozen=True, kw_only=True):
    """The two buckets of a limiter; None where there is no limit."""

    bandwidth: BucketState | None
    ops: BucketState | None
