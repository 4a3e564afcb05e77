"""Persistent memory devices (``/pmem/{id}``)."""

from __future__ import annotations

from crackle.schema._base import Resource
from crackle.schema.rate_limiter import RateLimiter


class Pmem(Resource):
    """A virtio pmem device that maps the host file ``path_on_host`` into the guest."""

    id: str
    path_on_host: str
    root_device: bool = False
    read_only: bool = False
    rate_limiter: RateLimiter | None = None


class PmemUpdate(Resource):
    """What ``PATCH`` changes on a pmem device of a started microVM."""

    id: str
    rate_limiter: RateLimiter | None = None
