"""Token buckets, the limits on bytes and operations a second that devices share."""

from __future__ import annotations

import msgspec

from crackle.schema._base import U64, Resource


class TokenBucket(msgspec.Struct):
    """Up to ``size`` tokens, refilled completely every ``refill_time`` ms, after ``one_time_burst`` extra."""

    size: U64
    refill_time: U64
    one_time_burst: U64 | None = None


class RateLimiter(Resource):
    """One bucket for bytes, one for operations; an absent bucket does not limit."""

    bandwidth: TokenBucket | None = None
    ops: TokenBucket | None = None
