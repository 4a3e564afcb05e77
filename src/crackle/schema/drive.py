"""Block devices (``/drives/{drive_id}``)."""

from __future__ import annotations

from typing import Literal

import msgspec

from crackle.schema._base import Resource
from crackle.schema.rate_limiter import RateLimiter


class Drive(Resource):
    """A virtio block device on the host file ``path_on_host``, or served by the vhost-user ``socket``.

    The root device is the guest's ``/dev/vda``, or its partition ``partuuid``. ``Writeback`` offers the
    guest a flush command; with ``Unsafe`` there is none. The file is locked, so that no other microVM writes
    to it, and none uses what this one writes to, unless ``lock`` is false.
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


class DriveUpdate(Resource):
    """What ``PATCH`` changes on a drive of a started microVM."""

    drive_id: str
    path_on_host: str | None = None
    rate_limiter: RateLimiter | None = None
