"""Network interfaces (``/network-interfaces/{iface_id}``)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from crackle.schema._base import U16, Resource
from crackle.schema.rate_limiter import RateLimiter

MacAddress = Annotated[str, msgspec.Meta(pattern="^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$")]


class NetworkInterface(Resource):
    """A virtio network device on the tap device ``host_dev_name``."""

    iface_id: str
    host_dev_name: str
    guest_mac: MacAddress | None = None
    mtu: U16 | None = None
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None


class NetworkInterfaceUpdate(Resource):
    """What ``PATCH`` changes on an interface of a started microVM."""

    iface_id: str
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None
