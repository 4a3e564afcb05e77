"""The microVM as an instance: what it is and what it is told to do (``/``, ``/actions``, ``/vm``, ...)."""

from __future__ import annotations

from typing import Literal

import msgspec

from crackle.schema._base import Resource

# "Stopped" is seen between the guest's end and the process's.
InstanceState = Literal["Not started", "Running", "Paused", "Stopped"]


class InstanceInfo(msgspec.Struct):
    """The answer to ``GET /``. ``vmm_version`` is the Firecracker whose API is spoken, for clients that compare it."""

    id: str
    state: InstanceState
    vmm_version: str
    app_name: str
    crackle_version: str


class Version(msgspec.Struct):
    """The answer to ``GET /version``: the Firecracker whose API is spoken, and what speaks it."""

    firecracker_version: str
    crackle_version: str


class Action(Resource):
    """The body of ``PUT /actions``."""

    action_type: Literal["FlushMetrics", "InstanceStart", "SendCtrlAltDel"]


class VmState(Resource):
    """The body of ``PATCH /vm``."""

    state: Literal["Paused", "Resumed"]


class Fault(msgspec.Struct):
    """The body of every answer that is not a success."""

    fault_message: str
