"""The registry of virtio devices: how each kind is made of its resource, and how a PATCH changes it in a running guest.

The kinds have the names of Firecracker's metrics sections. A device's module is imported when the first is made.
"""

from __future__ import annotations

import os

import msgspec

from crackle import schema
from crackle.errors import ConfigError
from crackle.vmm.files import MAPPING, open_disk, open_overlaid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from crackle.memory import GuestMemory
    from crackle.schema import Balloon as BalloonResource
    from crackle.schema import (
        BalloonHintingStatus,
        BalloonStats,
        Drive,
        DriveUpdate,
        EntropyDevice,
        NetworkInterface,
        NetworkInterfaceUpdate,
        PmemUpdate,
        VmConfig,
    )
    from crackle.schema import Pmem as PmemResource
    from crackle.schema import Vsock as VsockResource
    from crackle.virtio.balloon.device import Balloon
    from crackle.virtio.block.backing import Backing
    from crackle.virtio.block.device import Block
    from crackle.virtio.device import VirtioDevice
    from crackle.virtio.net.device import Net
    from crackle.virtio.net.tap import Tap
    from crackle.virtio.pmem.device import Pmem
    from crackle.virtio.rng.device import Rng
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
    mine = backing is None and drive.overlay is not msgspec.UNSET
    if mine:
        backing = open_overlaid(drive, [])
    try:
        return Block(
            memory,
            drive.path_on_host,
            read_only=bool(drive.is_read_only),
            writeback=drive.cache_type == "Writeback",
            engine=drive.io_engine or "Sync",
            limiter=drive.rate_limiter,
            backing=backing,
        )
    finally:
        if mine and backing is not None:
            backing.close()


def update_block(block: Block, update: DriveUpdate, backing: Backing | None = None) -> None:
    """Put another file behind it, limit it otherwise; ConfigError changes nothing."""
    path = update.path_on_host or (None if update.overlay is None else block.path)
    if path is not None:
        block.update(path, backing)
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


def check_vsock(vsock: VsockResource, warn: Callable[[str], None]) -> VsockResource:
    """What is kept of it; ConfigError when there cannot be such a device."""
    from crackle.virtio.vsock.device import check, is_reserved

    check(vsock.guest_cid, vsock.uds_path)
    if is_reserved(vsock.guest_cid):
        warn(f"The vsock CID {vsock.guest_cid} is reserved: guests may refuse it. From 3 on they take any.")
    if not vsock.uds_path:
        warn("The vsock device has no uds_path: no host program can connect to it.")
    # The device has one name only; clients of old versions still give it one.
    complete: VsockResource = msgspec.structs.replace(vsock, vsock_id=msgspec.UNSET)
    return complete


def make_entropy(memory: GuestMemory, entropy: EntropyDevice) -> Rng:
    """ConfigError when its limits cannot be."""
    from crackle.virtio.rng.device import Rng

    return Rng(memory, limiter=entropy.rate_limiter)


def make_balloon(memory: GuestMemory, balloon: BalloonResource) -> Balloon:
    """ConfigError when it would be larger than guest memory."""
    from crackle.virtio.balloon.device import Balloon

    return Balloon(
        memory,
        balloon.amount_mib,
        deflate_on_oom=balloon.deflate_on_oom,
        stats_interval_s=balloon.stats_polling_interval_s,
        hinting=balloon.free_page_hinting,
        reporting=balloon.free_page_reporting,
    )


def resize_balloon(balloon: Balloon, update: Any) -> None:
    """Another target; ConfigError changes nothing."""
    balloon.resize(update.amount_mib)


def poll_balloon(balloon: Balloon, update: Any) -> None:
    """Another interval between statistics; ConfigError changes nothing."""
    balloon.poll_statistics(update.stats_polling_interval_s)


def balloon_statistics(balloon: Balloon, _nothing: None) -> BalloonStats:
    """The last that the driver has told."""
    return balloon.statistics()


def start_hinting(balloon: Balloon, start: Any) -> None:
    """Ask for the free pages there are."""
    balloon.start_hinting(start.acknowledge_on_stop)


def stop_hinting(balloon: Balloon, _nothing: object) -> None:
    """Let the driver have them again."""
    balloon.stop_hinting()


def hinting_status(balloon: Balloon, _nothing: None) -> BalloonHintingStatus:
    """How far that is."""
    return balloon.hinting_status()


class Ask(msgspec.Struct, frozen=True):
    """What can be asked of a device while the guest runs, as a command of its own.

    call(device, resource) -> the command's result. words: in front of what is wrong with it. notes: what the resource
    gives is part of the configuration from then on.
    """

    call: Callable[[Any, Any], Any]
    words: str
    notes: bool = False


def make_pmem(memory: GuestMemory, pmem: PmemResource, backing: Backing | None = None) -> Pmem:
    """ConfigError when the file, which is opened unless it is open already, cannot be mapped."""
    from crackle.virtio.pmem.device import Pmem

    found = (
        open_disk(pmem.path_on_host, pmem.read_only, False, [], problem=MAPPING)
        if backing is None
        else backing
    )
    try:
        return Pmem(memory, found.fd, found.size, read_only=pmem.read_only, limiter=pmem.rate_limiter)
    finally:
        if backing is None:
            found.close()


def update_pmem(pmem: Pmem, update: PmemUpdate) -> None:
    """Limit its flushes otherwise; ConfigError changes nothing."""
    if update.rate_limiter is not None:
        pmem.update_limiter(0, update.rate_limiter)


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """How a device is configured: its requests, its section of the configuration file, its commands.

    name: of the commands ``put_<name>``, ``patch_<name>`` and ``delete_<name>``. body, update: the schemas of PUT and
    PATCH; update is None for what has no PATCH. section: the field of VmConfig, a list where there is an id_field.
    path: of the requests. counter: the stem of their metrics. deprecated: a field that makes a request a deprecated
    one. removable: a PUT while the guest runs gives it another one, and a DELETE takes one away. words: in front of
    what is wrong with it. missing: what is not supported yet, while nothing makes the device.
    """

    name: str
    body: type[msgspec.Struct]
    section: str
    path: str
    update: type[msgspec.Struct] | None = None
    id_field: str | None = None
    counter: str | None = None
    deprecated: tuple[str, ...] = ()
    removable: bool = False
    words: str = ""
    missing: str | None = None

    def of(self, config: Any) -> list[Any]:
        """All of them in a VmConfig, in their order."""
        section = getattr(config, self.section)
        if self.id_field is not None:
            return list(section)
        return [] if section is None else [section]

    def find(self, config: Any, identifier: str | None) -> Any:
        """The one with this identifier, or the only one; ConfigError when there is none."""
        for resource in self.of(config):
            if self.id_field is None or getattr(resource, self.id_field) == identifier:
                return resource
        raise ConfigError(f"There is no {self.name} {identifier!r}. Please verify the request arguments.")


class Kind(msgspec.Struct, frozen=True):
    """One kind of device, in one row: all that the rest of the program knows of it.

    make(memory, resource) -> device; None while there is no such device yet. update(device, resource), None for what
    cannot be changed. open(resource), where there is something to hold from the configuration on, so that nobody else
    gets it: make has it as a third argument. Where the configuration holds something else for it, make and update may
    have that as a third argument. check(resource, warn) -> what is kept of it, where `Configuration` has no method for
    it. choose(resource): the name of the kind, where a resource may be one of several. asks: what else can be asked of
    it, by the names of the commands.
    """

    make: Callable[..., VirtioDevice] | None = None
    update: Callable[[Any, Any], None] | None = None
    open: Callable[[Any], Held] | None = None
    resource: Resource | None = None
    check: Callable[[Any, Callable[[str], None]], Any] | None = None
    choose: Callable[[Any], str] | None = None
    asks: Mapping[str, Ask] = msgspec.field(default_factory=dict)


_BALLOON = "Balloon update error"

# In the order in which the guest gets them.
KINDS = {
    "block": Kind(
        make_block,
        update_block,
        choose=kind_of_drive,
        resource=Resource(
            name="drive",
            body=schema.Drive,
            update=schema.DriveUpdate,
            section="drives",
            path="drives",
            id_field="drive_id",
            counter="drive",
            removable=True,
        ),
    ),
    "vhost_user_block": Kind(make_vhost_user_block, update_vhost_user_block, open_vhost_user_block),
    "net": Kind(
        make_net,
        update_net,
        open_net,
        resource=Resource(
            name="network",
            body=schema.NetworkInterface,
            update=schema.NetworkInterfaceUpdate,
            section="network_interfaces",
            path="network-interfaces",
            id_field="iface_id",
            counter="network",
            removable=True,
        ),
    ),
    "vsock": Kind(
        make_vsock,
        check=check_vsock,
        resource=Resource(
            name="vsock",
            body=schema.Vsock,
            section="vsock",
            path="vsock",
            counter="vsock",
            deprecated=("vsock_id",),
            words="Vsock config error: Cannot create backend for vsock device",
        ),
    ),
    "balloon": Kind(
        make_balloon,
        resource=Resource(
            name="balloon",
            body=schema.Balloon,
            update=schema.BalloonUpdate,
            section="balloon",
            path="balloon",
        ),
        asks={
            "patch_balloon": Ask(resize_balloon, _BALLOON, notes=True),
            "patch_balloon_statistics": Ask(poll_balloon, _BALLOON, notes=True),
            "get_balloon_statistics": Ask(balloon_statistics, "Internal VMM error"),
            "start_balloon_hinting": Ask(start_hinting, _BALLOON),
            "stop_balloon_hinting": Ask(stop_hinting, _BALLOON),
            "get_balloon_hinting": Ask(hinting_status, _BALLOON),
        },
    ),
    "entropy": Kind(
        make_entropy,
        resource=Resource(
            name="entropy",
            body=schema.EntropyDevice,
            section="entropy",
            path="entropy",
        ),
    ),
    "pmem": Kind(
        make_pmem,
        update_pmem,
        resource=Resource(
            name="pmem",
            body=schema.Pmem,
            update=schema.PmemUpdate,
            section="pmem",
            path="pmem",
            id_field="id",
            counter="pmem",
            removable=True,
        ),
    ),
    "memory_hotplug": Kind(
        resource=Resource(
            name="memory_hotplug",
            body=schema.MemoryHotplug,
            update=schema.MemoryHotplugUpdate,
            section="memory_hotplug",
            path="hotplug/memory",
            counter="hotplug_memory",
            missing="memory hotplug",
        )
    ),
}

RESOURCES = tuple(kind.resource for kind in KINDS.values() if kind.resource is not None)

# Kinds of which there is one device at most: its metrics have the kind's name.
SINGLE = frozenset(
    name for name, kind in KINDS.items() if kind.resource is not None and kind.resource.id_field is None
)

# Which kind a command is about, by the command's name.
PUTS = {f"put_{kind.resource.name}": name for name, kind in KINDS.items() if kind.resource and kind.make}
PATCHES = {
    f"patch_{kind.resource.name}": name for name, kind in KINDS.items() if kind.resource and kind.update
}


# Kind and how, by the command's name.
ASKS = {command: (name, ask) for name, kind in KINDS.items() for command, ask in kind.asks.items()}


def configured(config: VmConfig) -> Iterator[tuple[str, str, Any]]:
    """Kind, identifier and resource of every device that `config` asks for, in the order that the guest sees."""
    for name, kind in KINDS.items():
        if kind.resource is None or kind.make is None:
            continue
        for resource in kind.resource.of(config):
            identifier = name if kind.resource.id_field is None else getattr(resource, kind.resource.id_field)
            yield name if kind.choose is None else kind.choose(resource), identifier, resource


def make(memory: GuestMemory, kind: str, resource: Any, held: Held | None = None) -> VirtioDevice:
    """The device for `resource`, on what has been held for it, if that is so. ConfigError when it cannot be had."""
    how = KINDS[kind]
    if held is None and how.open is not None:
        held = how.open(resource)
    assert how.make is not None, "a kind without a device has no resource that is accepted"
    return how.make(memory, resource) if held is None else how.make(memory, resource, held)
