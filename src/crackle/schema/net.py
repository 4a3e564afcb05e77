"""Network interfaces (``/network-interfaces/{iface_id}``)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from crackle.schema._base import U16, Resource
from crackle.schema.rate_limiter import RateLimiter

MAC_PATTERN = "^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$"
MacAddress = Annotated[str, msgspec.Meta(pattern=MAC_PATTERN)]


class NetworkInterface(Resource):
    """A virtio network device on the tap device ``host_dev_name``.

    ``drop_spoofed_mac``: frames that the guest sends from another address than ``guest_mac`` are dropped; they
    are counted in any case.
    """

    iface_id: str
    host_dev_name: str
    guest_mac: MacAddress | None = None
    mtu: U16 | None = None
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None
    drop_spoofed_mac: bool | msgspec.UnsetType = msgspec.UNSET


class NetworkInterfaceUpdate(Resource):
    """What ``PATCH`` changes on an interface of a started microVM."""

    iface_id: str
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None
