"""The vsock device (``/vsock``)."""

from __future__ import annotations

import msgspec

from crackle.schema._base import U32, Resource


class Vsock(Resource):
    """Guest context identifier and the Unix socket that is its door on the host."""

    guest_cid: U32
    uds_path: str
    vsock_id: str | msgspec.UnsetType | None = msgspec.UNSET
