"""What a configuration is checked for before it is accepted: one method a command, changing all or nothing.

What is opened to see whether it can be had stays open for the builder, so that what was checked is what is used.
"""

from __future__ import annotations

import errno
import os

import msgspec

from crackle.errors import ConfigError, context
from crackle.schema.machine import updated
from crackle.vmm.devices import KINDS, PUTS, kind_of_drive, open_net, open_vhost_user_block
from crackle.vmm.files import MAPPING, BootFile, open_disk, open_overlaid, settle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from crackle.schema import (
        Balloon,
        BootSource,
        CpuConfig,
        Drive,
        DriveUpdate,
        EntropyDevice,
        MachineConfig,
        MachineConfigUpdate,
        MmdsConfig,
        NetworkInterface,
        NetworkInterfaceUpdate,
        Overlay,
        Pmem,
        PmemUpdate,
        RateLimiter,
        Serial,
        VmConfig,
    )
    from crackle.virtio.block.backing import Backing
    from crackle.vmm.commands import Command
    from crackle.vmm.devices import Held, Kind

_NO_INITRD = "The initrd file cannot be opened due to invalid path or invalid permissions. "

_VERIFY = " Please verify the request arguments."
_NO_DEVICE = f"Failed perform action on device: Device not found{_VERIFY}"

SECTOR_SIZE = 512  # virtio 1.2, 5.2.4: what the size of a disk is counted in

DEFAULT_MMDS_ADDRESS = "169.254.169.254"


# Kinds of devices for which a Backing is held.
_WITH_FILES = ("block", "pmem")


class Configuration:
    """Everything configured so far, `config`, and what stays open from then on, `held`, by kind and identifier.

    warn: is told what is accepted and may surprise. lock_drives: whether files of drives that do not say are locked.
    """

    def __init__(self, config: VmConfig, warn: Callable[[str], None], *, lock_drives: bool = True) -> None:
        self.config = config
        self._warn = warn
        self.held: dict[tuple[str, str], Held] = {}
        self._lock_drives = lock_drives

    def take(self, command: Command) -> bool:
        """Carry out a command that configures; whether this is one. ConfigError changes nothing."""
        configure = getattr(self, command.name, None)
        if configure is not None:
            configure(command.resource)
        elif command.name in PUTS:
            self.put(KINDS[PUTS[command.name]], command.resource)
        else:
            return False
        return True

    def started(self) -> None:
        """Let go of what only the start needed."""
        for identifier in ("kernel", "initrd"):
            self._hold("boot", identifier, None)

    def close(self) -> None:
        """Let go of everything that is held. Idempotent."""
        for kind, identifier in list(self.held):
            self._hold(kind, identifier, None)

    def disown(self) -> None:
        """In a forked child: close the copies of what is held. Its locks are the parent's. Idempotent."""
        for held in self.held.values():
            held.close()
        self.held.clear()

    def _hold(self, kind: str, identifier: str, held: Held | None) -> None:
        """Keep `held` from now on, if there is something to keep, and let go of what it takes the place of."""
        before: Any = self.held.pop((kind, identifier), None)
        if before is not None:
            if kind in _WITH_FILES:
                for part in before.parts:
                    part.unlock()
            before.close()
        if held is not None:
            self.held[kind, identifier] = held

    def put_machine(self, update: MachineConfig | MachineConfigUpdate) -> None:
        assert self.config.machine_config is not None
        with context("Machine config error"):
            wanted = updated(self.config.machine_config, update)
            _check_tracking(wanted.track_dirty_pages, self.config.shares_memory)
            balloon = self.config.balloon
            if balloon is not None and wanted.mem_size_mib < balloon.amount_mib:
                raise ConfigError(
                    "The memory size (MiB) is smaller than the previously set balloon device target size. "
                    f"They are {wanted.mem_size_mib} and {balloon.amount_mib}."
                )
            self.config.machine_config = wanted
            if update.cpu_template not in (None, msgspec.UNSET):
                self.config.cpu_config = None

    patch_machine = put_machine

    def put_cpu_config(self, template: CpuConfig) -> None:
        """It takes the place of a static template, and that of it: the last one is used."""
        machine = self.config.machine_config
        assert machine is not None
        self.config.machine_config = msgspec.structs.replace(machine, cpu_template=msgspec.UNSET)
        self.config.cpu_config = template

    def put_boot_source(self, source: BootSource) -> None:
        with context("Boot source error"):
            kernel, initrd = BootFile(source.kernel_image_path, "The kernel file cannot be opened: "), None
            try:
                if source.initrd_path is not None:
                    initrd = BootFile(source.initrd_path, _NO_INITRD)
                if source.boot_args is not None:
                    _check_boot_args(source.boot_args)
            except BaseException:
                kernel.close()
                if initrd is not None:
                    initrd.close()
                raise
        self._hold("boot", "kernel", kernel)
        self._hold("boot", "initrd", initrd)
        self.config.boot_source = source

    def put_drive(self, drive: Drive) -> None:
        drives = self.config.drives
        with context("Drive config error"):
            at = next((i for i, other in enumerate(drives) if other.drive_id == drive.drive_id), None)
            if drive.is_root_device and drives and drives[0].is_root_device and at != 0:
                raise ConfigError(
                    f"A root block device already exists! It is {drives[0].drive_id!r}; "
                    f"{drive.drive_id!r} cannot be another."
                )
            if drive.is_root_device and any(pmem.root_device for pmem in self.config.pmem):
                raise ConfigError(
                    "Attempt to add block as a root device while the root device defined as a pmem device."
                )
            with context("Unable to create the virtio block device"):
                if drive.socket is None:
                    complete = _complete_file_drive(drive, self._limits(drive.rate_limiter))
                    self._hold("block", drive.drive_id, self._open_disk(complete))
                    complete.overlay = _made(complete.overlay)
                    self._hold("vhost_user_block", drive.drive_id, None)
                else:
                    complete = self._connect_drive(drive)
                    self._hold("block", drive.drive_id, None)
                settle(self._disks())
        if at is not None:
            del drives[at]
        # The root device comes first: the guest's /dev/vda is the first device.
        drives.insert(0 if drive.is_root_device else len(drives) if at is None else at, complete)

    def put_network(self, interface: NetworkInterface) -> None:
        """The TAP stays open from now on: nobody else gets it, and one that had to be made stays to be set up."""
        from crackle.virtio.net.device import MTU_RANGE

        interfaces = self.config.network_interfaces
        at = next((i for i, other in enumerate(interfaces) if other.iface_id == interface.iface_id), None)
        others = [other for other in interfaces if other.iface_id != interface.iface_id]
        with context("Network config error"):
            mac = None if interface.guest_mac is None else interface.guest_mac.lower()
            if mac is not None and mac in [other.guest_mac for other in others]:
                raise ConfigError(f"The MAC address is already in use: {mac}")
            with context("Could not create the network device"):
                if interface.mtu is not None and not MTU_RANGE[0] <= interface.mtu <= MTU_RANGE[1]:
                    raise ConfigError(f"MTU {interface.mtu} is out of range [{MTU_RANGE[0]}, {MTU_RANGE[1]}]")
                if interface.drop_spoofed_mac is True and mac is None:
                    raise ConfigError("drop_spoofed_mac needs a guest_mac to compare with")
                rx_limiter = self._limits(interface.rx_rate_limiter)
                tx_limiter = self._limits(interface.tx_rate_limiter)
                for other in others:
                    if other.host_dev_name == interface.host_dev_name:
                        raise ConfigError(
                            "Open tap device failed: Error while creating ifreq structure: Device or resource busy "
                            f"(os error {errno.EBUSY}). Invalid TUN/TAP Backend provided by {interface.host_dev_name}. "
                            "Check our documentation on setting up the network devices. In short: "
                            f"it is in use by the interface {other.iface_id!r} of this microVM."
                        )
                name = interface.host_dev_name
                if at is None or interfaces[at].host_dev_name != name:
                    tap = open_net(interface)
                    self._hold("net", interface.iface_id, tap)
                    # The kernel chooses one for who has none to give.
                    name = tap.name
        complete: NetworkInterface = msgspec.structs.replace(
            interface,
            host_dev_name=name,
            guest_mac=mac,
            rx_rate_limiter=rx_limiter,
            tx_rate_limiter=tx_limiter,
        )
        if at is None:
            interfaces.append(complete)
        else:
            interfaces[at] = complete

    def put_pmem(self, pmem: Pmem) -> None:
        """Its file stays open from now on, and is locked as a drive's is."""
        section = self.config.pmem
        at = next((i for i, other in enumerate(section) if other.id == pmem.id), len(section))
        with context("Pmem config error"):
            if pmem.root_device:
                if any(drive.is_root_device for drive in self.config.drives):
                    raise ConfigError(
                        "Attempt to add pmem as a root device while the root device defined as a block device."
                    )
                if any(other.root_device and other.id != pmem.id for other in section):
                    raise ConfigError(f"A root pmem device already exist; {pmem.id!r} cannot be another.")
            with context("Unable to create the virtio-pmem device"):
                complete: Pmem = msgspec.structs.replace(pmem, rate_limiter=self._limits(pmem.rate_limiter))
                self._hold("pmem", pmem.id, self._open_pmem(pmem))
                settle(self._disks())
        section[at : at + 1] = [complete]

    def _open_pmem(self, pmem: Pmem) -> Backing:
        held: Any = self.held.get(("pmem", pmem.id))
        leaving = [] if held is None else held.parts
        locking = self._lock_drives
        backing = open_disk(pmem.path_on_host, pmem.read_only, locking, self._disks(), leaving, MAPPING)
        if not backing.size:
            backing.close()
            settle(self._disks())
            raise ConfigError("Error backing file size is 0")
        return backing

    def put(self, kind: Kind, resource: Any) -> None:
        """A device of a kind that needs no more than its registry says: in the place of the one before it."""
        how = kind.resource
        assert how is not None, "whoever is configured has a resource"
        with context(how.words):
            complete = resource if kind.check is None else kind.check(resource, self._warn)
        if how.id_field is None:
            setattr(self.config, how.section, complete)
            return
        section, name = getattr(self.config, how.section), getattr(complete, how.id_field)
        at = next(
            (i for i, other in enumerate(section) if getattr(other, how.id_field) == name), len(section)
        )
        section[at : at + 1] = [complete]

    def put_balloon(self, balloon: Balloon) -> None:
        with context("Balloon config error"):
            assert self.config.machine_config is not None
            if balloon.amount_mib > self.config.machine_config.mem_size_mib:
                raise ConfigError(
                    f"Amount of pages requested is too large. It is {balloon.amount_mib} MiB, and the microVM has "
                    f"{self.config.machine_config.mem_size_mib}."
                )
        self.config.balloon = balloon

    def put_entropy(self, entropy: EntropyDevice) -> None:
        with context("Entropy device error"):
            limiter = self._limits(entropy.rate_limiter)
        self.config.entropy = msgspec.structs.replace(entropy, rate_limiter=limiter)

    def put_serial(self, serial: Serial) -> None:
        self.config.serial = serial

    def put_mmds_config(self, mmds: MmdsConfig) -> None:
        with context("MMMDS config error"):  # as clients know it
            if mmds.ipv4_address is not None and not _is_link_local(mmds.ipv4_address):
                raise ConfigError(
                    f"The MMDS IPv4 address is not link local. It is {mmds.ipv4_address}; one from 169.254.1.0 to "
                    "169.254.254.255 can be used."
                )
            if not mmds.network_interfaces:
                raise ConfigError(
                    "The list of network interface IDs that allow forwarding MMDS requests is empty."
                )
            known = [interface.iface_id for interface in self.config.network_interfaces]
            unknown = [name for name in mmds.network_interfaces if name not in known]
            if unknown:
                raise ConfigError(
                    "The list of network interface IDs provided contains at least one ID that does not correspond to "
                    f"any existing network interface. It is {unknown[0]!r}."
                )
        self.config.mmds_config = msgspec.structs.replace(
            mmds,
            network_interfaces=[name for name in known if name in mmds.network_interfaces],
            ipv4_address=mmds.ipv4_address or DEFAULT_MMDS_ADDRESS,
        )

    def _connect_drive(self, drive: Drive) -> Drive:
        for name in ("path_on_host", "is_read_only", "rate_limiter", "io_engine", "lock", "overlay"):
            if getattr(drive, name) not in (None, msgspec.UNSET):
                raise ConfigError(
                    f"Invalid block config. A drive with a socket has no {name}: the back end decides."
                )
        assert self.config.machine_config is not None
        _check_tracking(self.config.machine_config.track_dirty_pages, True)
        # A back end that serves one at a time would keep the new connection waiting.
        self._hold("vhost_user_block", drive.drive_id, None)
        with context("Vhost user backend error"):
            self._hold("vhost_user_block", drive.drive_id, open_vhost_user_block(drive))
        return drive

    def _check_limiter(self, limiter: RateLimiter | None) -> None:
        """ConfigError when a bucket's numbers mean nothing; one that limits nothing is told of in the log."""
        if limiter is None:
            return
        from crackle.ratelimit.limiter import RateLimiter as Buckets

        Buckets(limiter).close()
        for name, bucket in (("bandwidth", limiter.bandwidth), ("ops", limiter.ops)):
            if bucket is not None and bucket.size and not bucket.refill_time:
                self._warn(
                    f"The {name} bucket of {bucket.size} tokens has a refill_time of 0 ms: it limits nothing."
                )

    def _limits(self, limiter: RateLimiter | None) -> RateLimiter | None:
        """What of it limits anything, None for nothing; ConfigError as `_check_limiter`."""
        self._check_limiter(limiter)
        if limiter is None:
            return None
        bandwidth, ops = _bucket_after(None, limiter.bandwidth), _bucket_after(None, limiter.ops)
        if bandwidth is None and ops is None:
            return None
        return msgspec.structs.replace(limiter, bandwidth=bandwidth, ops=ops)

    def _disks(self) -> list[Any]:
        """What is open for drives with a file, overlays too, and for persistent memory."""
        disks: list[Any] = [held for (kind, _), held in self.held.items() if kind in _WITH_FILES]
        return [part for held in disks for part in held.parts]

    def _open_disk(self, drive: Drive, *, durable: bool = True) -> Any:
        """The file of a drive, with its overlays, or what is to take its place.

        durable: an overlay that is made is on the disk at once, where the guest may flush.
        """
        path, read_only = drive.path_on_host, bool(drive.is_read_only)
        assert path is not None, "a drive with a file has a path"
        held: Any = self.held.get(("block", drive.drive_id))
        leaving = [] if held is None else held.parts
        locking = bool(self._lock_drives if drive.lock is msgspec.UNSET else drive.lock)
        if drive.overlay is msgspec.UNSET:
            backing = open_disk(path, read_only, locking, self._disks(), leaving)
        else:
            durable = durable and drive.cache_type == "Writeback"
            backing = open_overlaid(drive, self._disks(), leaving, locking=locking, durable=durable)
        if not backing.lockable:
            self._warn(f"{path} is neither a file nor a block device: the guest sees an empty disk.")
        elif backing.size % SECTOR_SIZE or not backing.size:
            self._warn(
                f"{path} has {backing.size} bytes: the guest sees a disk of {backing.size // SECTOR_SIZE} whole "
                f"sectors of {SECTOR_SIZE} bytes."
            )
        return backing

    # -- changes to what runs ----------------------------------------------------------------------------------

    def check_new_drive(self, drive: Drive) -> None:
        """ConfigError when a guest that runs cannot get this drive, whatever its file is."""
        if any(other.drive_id == drive.drive_id for other in self.config.drives):
            raise ConfigError(
                f"The drive {drive.drive_id!r} is there already. Give the new one another drive_id, or PATCH this one."
            )
        if drive.is_root_device:
            raise ConfigError(
                f"The guest has started: {drive.drive_id!r} cannot be its root device. Leave is_root_device out."
            )
        if drive.socket is not None and not self.config.shares_memory:
            raise ConfigError(
                "A vhost-user drive needs guest memory that is shared, and this guest began without. Give it one "
                "vhost-user drive before it starts, and others can come later."
            )

    def check_new_interface(self, interface: NetworkInterface) -> None:
        """The same, of a network interface."""
        if any(other.iface_id == interface.iface_id for other in self.config.network_interfaces):
            raise ConfigError(
                f"The network interface {interface.iface_id!r} is there already. Give the new one another iface_id."
            )

    def check_new_pmem(self, pmem: Pmem) -> None:
        """The same, of persistent memory."""
        if any(other.id == pmem.id for other in self.config.pmem):
            raise ConfigError(
                f"The pmem device {pmem.id!r} is there already. Give the new one another id, or PATCH this one."
            )
        if pmem.root_device:
            raise ConfigError(
                f"The guest has started: {pmem.id!r} cannot be its root device. Leave root_device out."
            )

    def drive_to_remove(self, drive_id: str) -> Drive:
        """ConfigError when there is none, or the guest cannot be without."""
        drive: Drive = _named(self.config.drives, "drive_id", drive_id, "drive")
        if drive.is_root_device:
            raise ConfigError(
                f"The drive {drive_id!r} is the root device, which a guest keeps as long as it runs."
            )
        return drive

    def interface_to_remove(self, iface_id: str) -> NetworkInterface:
        """The same, of a network interface."""
        cards = self.config.network_interfaces
        interface: NetworkInterface = _named(cards, "iface_id", iface_id, "network interface")
        mmds = self.config.mmds_config
        if mmds is not None and iface_id in mmds.network_interfaces:
            raise ConfigError(
                f"The metadata service answers on {iface_id!r}, which a guest keeps as long as it runs."
            )
        return interface

    def pmem_to_remove(self, identifier: str) -> Pmem:
        """The same, of persistent memory."""
        pmem: Pmem = _named(self.config.pmem, "id", identifier, "pmem device")
        if pmem.root_device:
            raise ConfigError(
                f"The pmem device {identifier!r} is the root device, which a guest keeps as long as it runs."
            )
        return pmem

    def forget(self, kind: str, identifier: str) -> None:
        """The guest has that device no more."""
        how = KINDS[kind].resource or KINDS["block"].resource
        assert how is not None
        assert how.id_field is not None, "what comes and goes has a name"
        section = getattr(self.config, how.section)
        section[:] = [each for each in section if getattr(each, how.id_field) != identifier]
        self._hold(kind, identifier, None)
        settle(self._disks())

    def drive_to_change(self, update: DriveUpdate) -> Drive:
        """The drive that `update` is about; ConfigError when it cannot be changed so."""
        drive: Drive = _named(self.config.drives, "drive_id", update.drive_id, "drive")
        changes = (update.path_on_host, update.rate_limiter, update.overlay) != (None, None, None)
        if changes is (drive.socket is not None):
            what = "A vhost-user drive's back end decides" if changes else "There is nothing to change"
            raise ConfigError(f"Block: Running method expected different backend.{_VERIFY} {what}.")
        if update.path_on_host is not None and (update.overlay or drive.overlay):
            raise ConfigError(f"Block: A drive with an overlay keeps the file that lies below.{_VERIFY}")
        self._check_limiter(update.rate_limiter)
        return drive

    def update_drive(
        self, drive: Drive, update: DriveUpdate, change: Callable[..., None], *, durable: bool = True
    ) -> None:
        """Have `change` done with the file that `update` names, if it does; note it when that is well.

        durable: as for `_open_disk`.
        """
        backing: Any = None
        wanted = drive
        if update.path_on_host is not None:
            wanted = msgspec.structs.replace(drive, path_on_host=update.path_on_host)
        elif update.overlay is not None:
            update = msgspec.structs.replace(update, overlay=_on_top(drive, update.overlay))
            wanted = msgspec.structs.replace(drive, overlay=update.overlay)
        if wanted is not drive:
            with context("Block", _VERIFY):
                backing = self._open_disk(wanted, durable=durable)
        try:
            change(kind_of_drive(drive), drive.drive_id, update, backing)
            if backing is not None:
                self._hold("block", drive.drive_id, backing)
        except BaseException:
            if backing is not None:
                backing.close()
                if update.overlay is not None and update.overlay.path is not None:
                    # It was made for this.
                    os.unlink(update.overlay.path)
            raise
        finally:
            settle(self._disks())
        merge(drive, update)
        drive.overlay = _made(drive.overlay)

    def pmem_to_change(self, update: PmemUpdate) -> Pmem:
        """The device that `update` is about; ConfigError when it cannot be changed so."""
        pmem = next((each for each in self.config.pmem if each.id == update.id), None)
        if pmem is None:
            raise ConfigError(_NO_DEVICE)
        self._check_limiter(update.rate_limiter)
        return pmem

    def interface_to_change(self, update: NetworkInterfaceUpdate) -> NetworkInterface:
        """The interface that `update` is about; ConfigError when it cannot be changed so."""
        cards = self.config.network_interfaces
        interface: NetworkInterface = _named(cards, "iface_id", update.iface_id, "network interface")
        self._check_limiter(update.rx_rate_limiter)
        self._check_limiter(update.tx_rate_limiter)
        return interface


def _named(section: Sequence[Any], field: str, name: str, what: str) -> Any:
    """The device of that name in a section of the configuration. ConfigError when there is none."""
    for resource in section:
        if getattr(resource, field) == name:
            return resource
    raise ConfigError(f"{_NO_DEVICE} There is no {what} {name!r}.")


def merge(resource: Any, update: Any) -> None:
    """Note in `resource` what `update` has changed: every field that it gives, and every bucket of a limiter."""
    for name in update.__struct_fields__:
        value = getattr(update, name)
        if value is None:
            continue
        if name.endswith("rate_limiter"):
            before = getattr(resource, name) or type(value)()
            value = msgspec.structs.replace(
                before,
                bandwidth=_bucket_after(before.bandwidth, value.bandwidth),
                ops=_bucket_after(before.ops, value.ops),
            )
        setattr(resource, name, value)


def _bucket_after(before: Any, given: Any) -> Any:
    if given is None:
        return before
    return given if given.limits else None


# -- what several check --------------------------------------------------------------------------------------------


def _check_tracking(wanted: bool, shared: bool) -> None:
    """ConfigError where pages are to be noted of which another process writes some."""
    if wanted and shared:
        raise ConfigError(
            "track_dirty_pages is of no use with a vhost-user drive: nobody notes which pages its back end writes. "
            "Leave one of them out."
        )


def _on_top(drive: Drive, overlay: Overlay) -> Overlay:
    """A new overlay, over what the drive has. ConfigError where there cannot be one."""
    before = drive.overlay
    if drive.is_read_only:
        raise ConfigError(f"Block: A drive that is read-only has no use for a new overlay.{_VERIFY}")
    if overlay.path is not None and os.path.lexists(overlay.path):
        raise ConfigError(f"Block: The new overlay {overlay.path} is there already.{_VERIFY}")
    if before is not msgspec.UNSET and before.path is None:
        raise ConfigError(f"Block: The drive's overlay is in memory, over which there can be none.{_VERIFY}")
    return msgspec.structs.replace(overlay, over=None if before is msgspec.UNSET else before.path)


def _made(overlay: Overlay | msgspec.UnsetType) -> Overlay | msgspec.UnsetType:
    """As it is from now on: a file says itself what it lies over."""
    if overlay is msgspec.UNSET or overlay.path is None:
        return overlay
    return msgspec.structs.replace(overlay, over=None)


def _complete_file_drive(drive: Drive, limiter: RateLimiter | None) -> Drive:
    if drive.path_on_host is None:
        raise ConfigError("Invalid block config. path_on_host is missing.")
    engine = drive.io_engine or "Sync"
    if engine == "Async":
        from crackle.virtio.block.uring import check_host

        check_host()
    complete: Drive = msgspec.structs.replace(
        drive,
        is_read_only=bool(drive.is_read_only),
        io_engine=engine,
        rate_limiter=limiter,
    )
    return complete


def _is_link_local(address: str) -> bool:
    """Whether it is one that RFC 3927, 2.1 lets be used."""
    first, second, third, _ = address.split(".")
    return (first, second) == ("169", "254") and third not in ("0", "255")


def _check_boot_args(text: str) -> None:
    """What Firecracker refuses at once; the rest is the builder's."""
    from crackle.arch import platform

    size = len(text.strip().encode(errors="surrogatepass"))
    if size >= platform.CMDLINE_MAX_SIZE:
        raise ConfigError(
            f"The kernel command line is invalid: Invalid cmdline capacity provided. It has {size} bytes, "
            f"{platform.CMDLINE_MAX_SIZE - 1} is the most."
        )
