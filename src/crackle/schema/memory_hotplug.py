"""Memory that is added and removed at run time (``/hotplug/memory``)."""

from __future__ import annotations

import msgspec

from crackle.schema._base import U32, Resource


class MemoryHotplug(Resource):
    """Total, block and slot sizes in MiB: a block is what the guest plugs, a slot what the host attaches."""

    total_size_mib: U32
    block_size_mib: U32 = 2
    slot_size_mib: U32 = 128


class MemoryHotplugUpdate(Resource):
    """The size in MiB that the guest should plug."""

    requested_size_mib: U32


class MemoryHotplugStatus(msgspec.Struct):
    """The configuration with the sizes plugged and requested, in MiB."""

    total_size_mib: U32
    block_size_mib: U32
    slot_size_mib: U32
    plugged_size_mib: U32
    requested_size_mib: U32
