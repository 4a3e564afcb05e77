"""What virtio devices save in a snapshot."""

from __future__ import annotations

import msgspec

from crackle.ratelimit.state import LimiterState


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


class BlockState(msgspec.Struct, frozen=True, kw_only=True, tag="block"):
    """What a disk adds to its DeviceState."""

    limiter: LimiterState


class CustomState(msgspec.Struct, frozen=True, kw_only=True, tag="custom"):
    """What a device written in Python gave to be kept."""

    data: bytes


class VhostUserBlockState(msgspec.Struct, frozen=True, kw_only=True, tag="vhost_user_block"):
    """What a disk served by another process adds: the configuration space that the driver knows."""

    config: bytes


class NetState(msgspec.Struct, frozen=True, kw_only=True, tag="net"):
    """What a network interface adds to its DeviceState: what its configuration space says, and its limiters."""

    mac: bytes | None
    mtu: int | None
    rx_limiter: LimiterState
    tx_limiter: LimiterState


class VsockState(msgspec.Struct, frozen=True, kw_only=True, tag="vsock"):
    """What a vsock device adds to its DeviceState. Connections end with the snapshot.

    uds_path: of the Unix socket, unless whoever restores names another. last_port: the last that a host program got.
    """

    cid: int
    uds_path: str
    last_port: int


# One for each device that has something of its own to save; `type` in the file tells which it is.
OwnState = BlockState | CustomState | VhostUserBlockState | NetState | VsockState


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver has negotiated with a device, and its queues: the same behind every transport."""

    driver_features: int
    status: int
    config_generation: int
    queues: tuple[QueueState, ...]
    own: OwnState | None = None


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
