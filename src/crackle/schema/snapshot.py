"""Snapshots (``/snapshot/create``, ``/snapshot/load``)."""

from __future__ import annotations

from typing import Literal

import msgspec

from crackle.schema._base import U32, Resource
from crackle.schema.drive import Overlay
from crackle.schema.net import MacAddress

# How guest memory is backed: as it was, or otherwise.
SnapshotHugePages = Literal["Snapshot", "None", "Transparent", "2M"]


class SnapshotCreate(Resource):
    """Host paths that take the state of the microVM and its memory.

    keep_overlays: and copies of its drives' overlays, ``<snapshot_path>.<drive_id>.<id>``; of those in memory in any
    case.
    """

    snapshot_path: str
    mem_file_path: str
    snapshot_type: Literal["Diff", "Full"] = "Full"
    keep_overlays: bool = False


class MemoryBackend(Resource):
    """The file that holds guest memory, or the socket of the process that serves its page faults."""

    backend_path: str
    backend_type: Literal["File", "Uffd"]


class NetworkOverride(msgspec.Struct):
    """Another tap device for an interface of the snapshot, and another MAC address for a guest that looks again."""

    iface_id: str
    host_dev_name: str
    guest_mac: MacAddress | None = None


class VsockOverride(msgspec.Struct):
    """Another Unix socket for the vsock device of the snapshot, and another CID, at which the guest looks again."""

    uds_path: str
    guest_cid: U32 | None = None


class DriveOverride(msgspec.Struct):
    """Another host file for a drive of the snapshot; or another overlay, over the one it had if that is to be made."""

    drive_id: str
    path_on_host: str | None = None
    overlay: Overlay | None = None


class PmemOverride(msgspec.Struct):
    """Another host file for a pmem device of the snapshot."""

    id: str
    path_on_host: str


class SnapshotLoad(Resource):
    """What to restore and how; exactly one of ``mem_backend`` and (deprecated) ``mem_file_path`` is given."""

    snapshot_path: str
    mem_file_path: str | None = None
    mem_backend: MemoryBackend | None = None
    enable_diff_snapshots: bool = False
    track_dirty_pages: bool = False
    resume_vm: bool = False
    network_overrides: list[NetworkOverride] = msgspec.field(default_factory=list)
    vsock_override: VsockOverride | None = None
    drive_overrides: list[DriveOverride] = msgspec.field(default_factory=list)
    pmem_overrides: list[PmemOverride] = msgspec.field(default_factory=list)
    clock_realtime: bool = False
    huge_pages: SnapshotHugePages = "Snapshot"
