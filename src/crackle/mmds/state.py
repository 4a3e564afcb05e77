"""What the metadata service saves in a snapshot: how it is set up, and neither the document nor any session."""

from __future__ import annotations

import msgspec


class MmdsState(msgspec.Struct, frozen=True, kw_only=True):
    """As the schema's MmdsConfig, the address filled in."""

    version: str
    ipv4_address: str
    network_interfaces: tuple[str, ...]
    imds_compat: bool
