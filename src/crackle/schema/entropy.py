"""The entropy device (``/entropy``)."""

from __future__ import annotations

from crackle.schema._base import Resource
from crackle.schema.rate_limiter import RateLimiter


class EntropyDevice(Resource):
    """A virtio random number generator."""

    rate_limiter: RateLimiter | None = None
