"""The registry of virtio devices: how each kind is made of its resource, and how a PATCH changes it in a running guest.

The kinds have the names of Firecracker's metrics sections. A device's module is imported when the first is made.
"""

from __future__ import annotations

import os

import msgspec

from crackle.schema.drive import Drive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from crackle.memory import GuestMemory
    from crackle.schema import DriveUpdate, NetworkInterface, NetworkInterfaceUpdate
    from crackle.schema import Vsock as VsockResource
    from crackle.virtio.block import Block
    from crackle.virtio.device import VirtioDevice
    from crackle.virtio.net import Net
    from crackle.virtio.vhost_user import VhostUser
    from crackle.virtio.vhost_user_block import VhostUserBlock
    from crackle.virtio.vsock import Vsock


def make_block(memory: GuestMemory, drive: Drive) -> Block:
    """ConfigError when the drive's file cannot be used."""
    from crackle.virtio.block import Block

    assert drive.path_on_host is not None
    return Block(
        memory,
        drive.path_on_host,
        read_only=bool(drive.is_read_only),
        writeback=drive.cache_type == "Writeback",
        engine=drive.io_engine or "Sync",
        limiter=drive.rate_limiter,
    )


def update_block(block: Block, update: DriveUpdate) -> None:
    """Put another file behind it, limit it otherwise; ConfigError changes nothing."""
    if update.path_on_host is not None:
        block.update(update.path_on_host)
    if update.rate_limiter is not None:
        block.update_limiter(0, update.rate_limiter)


def make_net(memory: GuestMemory, interface: NetworkInterface) -> Net:
    """On the TAP that was opened when the interface was configured. ConfigError when there is none."""
    from crackle.virtio.net import Net
    from crackle.virtio.tap import open_tap

    tap = interface.__dict__.get("tap")
    fd = open_tap(interface.host_dev_name) if tap is None else tap.take()
    try:
        return Net(
            memory,
            fd,
            mac=None if interface.guest_mac is None else bytes.fromhex(interface.guest_mac.replace(":", "")),
            mtu=interface.mtu,
            rx_limiter=interface.rx_rate_limiter,
            tx_limiter=interface.tx_rate_limiter,
            drop_spoofed=interface.drop_spoofed_mac is True,
        )
    except BaseException:
        os.close(fd)
        raise


def update_net(net: Net, update: NetworkInterfaceUpdate) -> None:
    """Change its limits; ConfigError changes nothing."""
    for index, limits in enumerate((update.rx_rate_limiter, update.tx_rate_limiter)):
        if limits is not None:
            net.update_limiter(index, limits)


class ConnectedDrive(Drive, dict=True):
    """A vhost-user drive, and the connection that was made when it was configured: there are back ends that take one
    only. The connection is no field, so that no document shows it; it ends with the last who holds it.
    """

    @property
    def backend(self) -> VhostUser:
        """As `connect_drive` made it."""
        connection: VhostUser = vars(self)["backend"]
        return connection


def connect_drive(drive: Drive) -> ConnectedDrive:
    """`drive` with a connection to its back end; ConfigError when that is no use."""
    from crackle.virtio.vhost_user_block import connect

    assert drive.socket is not None
    connected = ConnectedDrive(**msgspec.structs.asdict(drive))
    vars(connected)["backend"] = connect(drive.socket, writeback=drive.cache_type == "Writeback")
    return connected


def make_vhost_user_block(memory: GuestMemory, drive: Drive) -> VhostUserBlock:
    """ConfigError when the back end is no use (any more)."""
    from crackle.virtio.vhost_user_block import VhostUserBlock

    if not isinstance(drive, ConnectedDrive) or drive.backend.fileno() < 0:
        # A start that failed has closed what it was given.
        drive = connect_drive(drive)
    return VhostUserBlock(memory, drive.backend)


def update_vhost_user_block(block: VhostUserBlock, _update: DriveUpdate) -> None:
    """Read its configuration again; ConfigError keeps the old."""
    block.update()


def kind_of_drive(drive: Drive) -> str:
    """Which kind of device a drive is."""
    return "block" if drive.socket is None else "vhost_user_block"


def is_read_only(disk: Any) -> bool:
    """Whether nobody may write to a disk, which for a vhost-user drive only its back end knows."""
    return bool(disk.read_only)


def make_vsock(memory: GuestMemory, vsock: VsockResource) -> Vsock:
    """ConfigError when the Unix socket cannot be made."""
    from crackle.virtio.vsock import Vsock

    return Vsock(memory, vsock.guest_cid, vsock.uds_path)


class Kind(msgspec.Struct, frozen=True):
    """make(memory, resource) -> device; update(device, resource), or None for what cannot be changed."""

    make: Callable[[GuestMemory, Any], VirtioDevice]
    update: Callable[[Any, Any], None] | None = None


KINDS = {
    "block": Kind(make_block, update_block),
    "net": Kind(make_net, update_net),
    "vhost_user_block": Kind(make_vhost_user_block, update_vhost_user_block),
    "vsock": Kind(make_vsock),
}
