"""The registry of virtio devices: how each kind is made of its resource, and how a PATCH changes it in a running guest.

The kinds have the names of Firecracker's metrics sections. A device's module is imported when the first is made.
"""

from __future__ import annotations

import os

import msgspec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from crackle.memory import GuestMemory
    from crackle.schema import Drive, DriveUpdate, NetworkInterface, NetworkInterfaceUpdate
    from crackle.schema import Vsock as VsockResource
    from crackle.virtio.block.backing import Backing
    from crackle.virtio.block.device import Block
    from crackle.virtio.device import VirtioDevice
    from crackle.virtio.net.device import Net
    from crackle.virtio.net.tap import Tap
    from crackle.virtio.vhost_user.block import VhostUserBlock
    from crackle.virtio.vhost_user.protocol import VhostUser
    from crackle.virtio.vsock.device import Vsock
    from crackle.vmm.files import BootFile

    # What is open before there is a device; `close` may be called again.
    Held = Tap | VhostUser | Backing | BootFile


def make_block(memory: GuestMemory, drive: Drive, backing: Backing | None = None) -> Block:
    """ConfigError when the drive's file, which is opened unless it is open already, cannot be used."""
    from crackle.virtio.block.device import Block

    assert drive.path_on_host is not None
    return Block(
        memory,
        drive.path_on_host,
        read_only=bool(drive.is_read_only),
        writeback=drive.cache_type == "Writeback",
        engine=drive.io_engine or "Sync",
        limiter=drive.rate_limiter,
        backing=backing,
    )


def update_block(block: Block, update: DriveUpdate, backing: Backing | None = None) -> None:
    """Put another file behind it, limit it otherwise; ConfigError changes nothing."""
    if update.path_on_host is not None:
        block.update(update.path_on_host, backing)
    if update.rate_limiter is not None:
        block.update_limiter(0, update.rate_limiter)


def open_net(interface: NetworkInterface) -> Tap:
    """ConfigError when the TAP cannot be had."""
    from crackle.virtio.net.tap import Tap

    return Tap(interface.host_dev_name)


def make_net(memory: GuestMemory, interface: NetworkInterface, tap: Tap) -> Net:
    """Takes the descriptor of `tap`. ConfigError when it has none, and gets none any more."""
    from crackle.virtio.net.device import Net

    fd = tap.take()
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


def open_vhost_user_block(drive: Drive) -> VhostUser:
    """A connection to the drive's back end; ConfigError when that is no use."""
    from crackle.virtio.vhost_user.block import connect

    assert drive.socket is not None
    backend: VhostUser = connect(drive.socket, writeback=drive.cache_type == "Writeback")
    return backend


def make_vhost_user_block(memory: GuestMemory, drive: Drive, backend: VhostUser) -> VhostUserBlock:
    """ConfigError when the back end is no use (any more)."""
    from crackle.virtio.vhost_user.block import VhostUserBlock

    # A start that failed has closed what it was given.
    return VhostUserBlock(memory, backend if backend.fileno() >= 0 else open_vhost_user_block(drive))


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
    from crackle.virtio.vsock.device import Vsock

    return Vsock(memory, vsock.guest_cid, vsock.uds_path)


class Kind(msgspec.Struct, frozen=True):
    """How one kind of device comes to be.

    make(memory, resource) -> device. update(device, resource), None for what cannot be changed. open(resource), where
    there is something to hold from the configuration on, so that nobody else gets it: make has it as a third argument.
    Where the configuration holds something else for it, make and update may have that as a third argument.
    """

    make: Callable[..., VirtioDevice]
    update: Callable[[Any, Any], None] | None = None
    open: Callable[[Any], Held] | None = None


KINDS = {
    "block": Kind(make_block, update_block),
    "net": Kind(make_net, update_net, open_net),
    "vhost_user_block": Kind(make_vhost_user_block, update_vhost_user_block, open_vhost_user_block),
    "vsock": Kind(make_vsock),
}


def make(memory: GuestMemory, kind: str, resource: Any, held: Held | None = None) -> VirtioDevice:
    """The device for `resource`, on what has been held for it, if that is so. ConfigError when it cannot be had."""
    how = KINDS[kind]
    if held is None and how.open is not None:
        held = how.open(resource)
    return how.make(memory, resource) if held is None else how.make(memory, resource, held)
