"""What the metadata service saves in a snapshot: how it is set up, and neither the document nor any session."""

from __future__ import annotations

from typing import Literal

import msgspec

from crackle.schema.mmds import MmdsConfig


class MmdsState(msgspec.Struct, frozen=True, kw_only=True):
    """As the schema's MmdsConfig, the address filled in."""

    version: Literal["V1", "V2"]
    ipv4_address: str
    network_interfaces: tuple[str, ...]
    imds_compat: bool

    def config(self) -> MmdsConfig:
        """The configuration of the service of a restored microVM."""
        return MmdsConfig(list(self.network_interfaces), self.version, self.ipv4_address, self.imds_compat)
