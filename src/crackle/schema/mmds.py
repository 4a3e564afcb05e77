"""The metadata service's configuration (``/mmds/config``)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from crackle.schema._base import Resource

Ipv4Address = Annotated[
    str, msgspec.Meta(pattern=r"^((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)$")
]


class MmdsConfig(Resource):
    """Which interfaces answer metadata requests, at which link-local address, in which version."""

    network_interfaces: list[str]
    version: Literal["V1", "V2"] = "V1"
    ipv4_address: Ipv4Address | None = None
    imds_compat: bool = False
