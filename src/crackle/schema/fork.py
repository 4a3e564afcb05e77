"""The fork of a running microVM (``/vm/fork``), which Firecracker does not have."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from crackle.schema._base import Resource
from crackle.schema.snapshot import DriveOverride, NetworkOverride, VsockOverride

MAX_CLONES = 1000


class Clone(Resource):
    """One of the microVMs that go on from a fork: its name, and what it has instead of its parent's.

    id: by default "clone-" and 16 random digits. api_sock: path of its API socket; by default `<id>.sock` beside its
    parent's. vsock_override: by default the parent's path, a dot and the id. serial_out_path, log_path, metrics_path:
    its console, log and metrics; by default nobody has the first and last, and the log is the parent's if that is a
    file. mmds: its metadata document, by default the parent's.
    """

    id: str | None = None
    api_sock: str | None = None
    network_overrides: list[NetworkOverride] = msgspec.field(default_factory=list)
    vsock_override: VsockOverride | None = None
    drive_overrides: list[DriveOverride] = msgspec.field(default_factory=list)
    serial_out_path: str | None = None
    log_path: str | None = None
    metrics_path: str | None = None
    mmds: Any = msgspec.UNSET


class Fork(Resource):
    """Which microVMs go on from here beside this one."""

    clones: Annotated[list[Clone], msgspec.Meta(min_length=1, max_length=MAX_CLONES)]


class ForkedClone(msgspec.Struct):
    """One that runs: its process, and where its API is."""

    id: str
    pid: int
    api_sock: str


class Forked(msgspec.Struct):
    """All that run now. pause_us: how long this microVM stood still for them, in microseconds."""

    clones: list[ForkedClone]
    pause_us: int
