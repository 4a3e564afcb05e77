"""Token buckets, the limits on bytes and operations a second that devices share."""

from __future__ import annotations

import msgspec

from crackle.schema._base import U64, Resource, check_u64


class TokenBucket(msgspec.Struct):
    """Up to ``size`` tokens, refilled completely every ``refill_time`` ms, after ``one_time_burst`` extra.

    A bucket of no tokens, or with no time to refill in, limits nothing.
    """

    size: U64
    refill_time: U64
    one_time_burst: U64 | None = None

    def __post_init__(self) -> None:
        check_u64(self, "size", "refill_time", "one_time_burst")

    @property
    def limits(self) -> bool:
        """Whether it does."""
        return bool(self.size and self.refill_time)


class RateLimiter(Resource):
    """One bucket for bytes, one for operations; an absent bucket does not limit."""

    bandwidth: TokenBucket | None = None
    ops: TokenBucket | None = None
