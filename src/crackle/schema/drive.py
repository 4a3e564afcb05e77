"""Block devices (``/drives/{drive_id}``)."""

from __future__ import annotations

from typing import Literal

import msgspec

from crackle.schema._base import U64, Resource, check_u64
from crackle.schema.rate_limiter import RateLimiter


class Overlay(Resource):
    """What takes the writes of a drive, whose file is only read then: a sparse file, or memory.

    The file at ``path`` is made if it is not there, over the overlay ``over`` or, without one, over the drive's
    file. It takes ``size_limit`` bytes of the host's disk at most; what the guest writes beyond fails.
    """

    path: str | None = None
    memory: bool = False
    over: str | None = None
    size_limit: U64 | None = None

    def __post_init__(self) -> None:
        check_u64(self, "size_limit")
        if (self.path is None) is not self.memory:
            raise ValueError("An overlay has a `path`, or `memory` that is true, and not both")


class Drive(Resource):
    """A virtio block device on the host file ``path_on_host``, or served by the vhost-user ``socket``.

    The root device is the guest's ``/dev/vda``, or its partition ``partuuid``. ``Writeback`` offers the guest a
    flush command; with ``Unsafe`` there is none. The file is locked, so that no other microVM writes to it, and none
    uses what this one writes to, unless ``lock`` is false. An ``overlay`` takes the writes in its place.
    """

    drive_id: str
    is_root_device: bool
    partuuid: str | None = None
    cache_type: Literal["Unsafe", "Writeback"] = "Unsafe"
    is_read_only: bool | None = None
    path_on_host: str | None = None
    rate_limiter: RateLimiter | None = None
    io_engine: Literal["Async", "Sync"] | None = None
    socket: str | None = None
    lock: bool | msgspec.UnsetType = msgspec.UNSET
    overlay: Overlay | msgspec.UnsetType = msgspec.UNSET


class DriveUpdate(Resource):
    """What ``PATCH`` changes on a drive of a started microVM. An ``overlay`` goes on top of what there is."""

    drive_id: str
    path_on_host: str | None = None
    rate_limiter: RateLimiter | None = None
    overlay: Overlay | None = None
