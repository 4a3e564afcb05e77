"""What all virtio devices save in a snapshot: what a device adds is in its own module."""

from __future__ import annotations

from typing import Any

import msgspec


class QueueState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a virtqueue lies in guest memory (guest physical addresses) and how far the device has come in it.

    in_flight: heads of the chains that the device has taken and not returned, which a restored one is to have again.
    """

    size: int
    ready: bool
    desc: int
    avail: int
    used: int
    next_avail: int
    next_used: int
    in_flight: tuple[int, ...] = ()


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver has negotiated with a device, and its queues: the same behind every transport.

    own: what the device adds, a Struct of its own module (`VirtioDevice.own_state`). Out of a file it comes as a dict,
    and the device makes its Struct of it.
    """

    driver_features: int
    status: int
    config_generation: int
    queues: tuple[QueueState, ...]
    own: Any = None


class MmioState(msgspec.Struct, frozen=True, kw_only=True, tag="mmio"):
    """A device behind virtio-mmio registers: where the guest has found it, and what the registers hold.

    address: guest physical. gsi: of its interrupt line.
    """

    address: int
    gsi: int
    interrupt_status: int
    device_features_select: int
    driver_features_select: int
    queue_select: int
    device: DeviceState
