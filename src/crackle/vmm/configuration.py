"""What a configuration is checked for before it is accepted: one method a command, changing all or nothing.

Files are opened here only to see that they can be; the builder opens them again. What only one can have is held.
"""

from __future__ import annotations

import errno
import os

import msgspec

from crackle.errors import ConfigError, CrackleError, os_reason
from crackle.schema.machine import updated
from crackle.vmm.devices import open_net, open_vhost_user_block

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from crackle.schema import (
        BootSource,
        Drive,
        DriveUpdate,
        MachineConfig,
        MachineConfigUpdate,
        MmdsConfig,
        NetworkInterface,
        NetworkInterfaceUpdate,
        RateLimiter,
        Serial,
        VmConfig,
        Vsock,
    )
    from crackle.vmm.devices import Held

DEFAULT_MMDS_ADDRESS = "169.254.169.254"

# The kernel command line's room, its final NUL included (Documentation/arch/x86/boot.rst, cmdline_size).
CMDLINE_MAX_SIZE = 2048


class context:  # noqa: N801 - reads as a statement
    """Puts words in front of the message of a Crackle error that passes through."""

    __slots__ = ("_words",)

    def __init__(self, words: str) -> None:
        self._words = words

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, CrackleError):
            error.args = (f"{self._words}: {error}",)


class Configuration:
    """Everything configured so far, `config`, and what stays open from then on, `held`, by kind and identifier."""

    def __init__(self, config: VmConfig) -> None:
        self.config = config
        self.held: dict[tuple[str, str], Held] = {}

    def close(self) -> None:
        """Let go of everything that is held. Idempotent."""
        for held in self.held.values():
            held.close()
        self.held.clear()

    def _let_go(self, kind: str, identifier: str) -> None:
        held = self.held.pop((kind, identifier), None)
        if held is not None:
            held.close()

    def put_machine(self, update: MachineConfig | MachineConfigUpdate) -> None:
        assert self.config.machine_config is not None
        with context("Machine config error"):
            self.config.machine_config = updated(self.config.machine_config, update)

    patch_machine = put_machine

    def put_boot_source(self, source: BootSource) -> None:
        with context("Boot source error"):
            _check_opens(source.kernel_image_path, "The kernel file cannot be opened")
            if source.initrd_path is not None:
                _check_opens(source.initrd_path, "The initrd file cannot be opened")
            if source.boot_args is not None:
                _check_boot_args(source.boot_args)
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
            with context("Unable to create the virtio block device"):
                if drive.socket is None:
                    complete = _complete_file_drive(drive)
                    self._let_go("vhost_user_block", drive.drive_id)
                else:
                    complete = self._connect_drive(drive)
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
                rx_limiter, tx_limiter = limits(interface.rx_rate_limiter), limits(interface.tx_rate_limiter)
                for other in others:
                    if other.host_dev_name == interface.host_dev_name:
                        raise ConfigError(
                            "Open tap device failed: Error while creating ifreq structure: Device or resource busy "
                            f"(os error {errno.EBUSY}). Invalid TUN/TAP Backend provided by {interface.host_dev_name}: "
                            f"it is in use by the interface {other.iface_id!r} of this microVM."
                        )
                if at is None or interfaces[at].host_dev_name != interface.host_dev_name:
                    tap = open_net(interface)
                    self._let_go("net", interface.iface_id)
                    self.held["net", interface.iface_id] = tap
        complete: NetworkInterface = msgspec.structs.replace(
            interface,
            guest_mac=mac,
            rx_rate_limiter=rx_limiter,
            tx_rate_limiter=tx_limiter,
        )
        if at is None:
            interfaces.append(complete)
        else:
            interfaces[at] = complete

    def put_vsock(self, vsock: Vsock) -> None:
        with context("Vsock config error: Cannot create backend for vsock device"):
            from crackle.virtio.vsock.mux import Multiplexer

            Multiplexer(vsock.guest_cid, vsock.uds_path).close()
        # The device has one name only; clients of old versions still give it one.
        self.config.vsock = msgspec.structs.replace(vsock, vsock_id=msgspec.UNSET)

    def put_serial(self, serial: Serial) -> None:
        self.config.serial = serial

    def put_mmds_config(self, mmds: MmdsConfig) -> None:
        with context("MMDS config error"):
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
        for name in ("path_on_host", "is_read_only", "rate_limiter", "io_engine"):
            if getattr(drive, name) is not None:
                raise ConfigError(
                    f"Invalid block config. A drive with a socket has no {name}: the back end decides."
                )
        # A back end that serves one at a time would keep the new connection waiting.
        self._let_go("vhost_user_block", drive.drive_id)
        with context("Vhost user backend error"):
            self.held["vhost_user_block", drive.drive_id] = open_vhost_user_block(drive)
        return drive

    # -- changes to what runs ----------------------------------------------------------------------------------

    def drive_to_change(self, update: DriveUpdate) -> Drive:
        """The drive that `update` is about; ConfigError when it cannot be changed so."""
        drive = next((d for d in self.config.drives if d.drive_id == update.drive_id), None)
        if drive is None:
            raise ConfigError(f"There is no drive {update.drive_id!r}. Please verify the request arguments.")
        changes = update.path_on_host is not None or update.rate_limiter is not None
        if changes is (drive.socket is not None):
            what = "a vhost-user drive's back end decides" if changes else "there is nothing to change"
            raise ConfigError(
                f"Running method expected different backend: {what}. Please verify the request arguments."
            )
        check_limiter(update.rate_limiter)
        if update.path_on_host is not None:
            with context("Block"):
                _check_backing_file(update.path_on_host, bool(drive.is_read_only))
        return drive

    def interface_to_change(self, update: NetworkInterfaceUpdate) -> NetworkInterface:
        """The interface that `update` is about; ConfigError when it cannot be changed so."""
        interface = next((i for i in self.config.network_interfaces if i.iface_id == update.iface_id), None)
        if interface is None:
            raise ConfigError(
                f"There is no network interface {update.iface_id!r}. Please verify the request arguments."
            )
        check_limiter(update.rx_rate_limiter)
        check_limiter(update.tx_rate_limiter)
        return interface


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
    return given if given.size else None


# -- what several check --------------------------------------------------------------------------------------------


def check_limiter(limiter: RateLimiter | None) -> None:
    """ConfigError when a bucket's numbers mean nothing."""
    if limiter is not None:
        from crackle.ratelimit.limiter import RateLimiter as Buckets

        Buckets(limiter).close()


def limits(limiter: RateLimiter | None) -> RateLimiter | None:
    """What of it limits anything, None for nothing. ConfigError when a bucket's numbers mean nothing."""
    check_limiter(limiter)
    if limiter is None:
        return None
    bandwidth, ops = _bucket_after(None, limiter.bandwidth), _bucket_after(None, limiter.ops)
    if bandwidth is None and ops is None:
        return None
    return msgspec.structs.replace(limiter, bandwidth=bandwidth, ops=ops)


def _complete_file_drive(drive: Drive) -> Drive:
    if drive.path_on_host is None:
        raise ConfigError("Invalid block config. path_on_host is missing.")
    read_only = bool(drive.is_read_only)
    _check_backing_file(drive.path_on_host, read_only)
    engine = drive.io_engine or "Sync"
    if engine == "Async":
        from crackle.virtio.block.uring import check_host

        check_host()
    complete: Drive = msgspec.structs.replace(
        drive, is_read_only=read_only, io_engine=engine, rate_limiter=limits(drive.rate_limiter)
    )
    return complete


def _is_link_local(address: str) -> bool:
    """Whether it is one that RFC 3927, 2.1 lets be used."""
    first, second, third, _ = address.split(".")
    return (first, second) == ("169", "254") and third not in ("0", "255")


def _check_opens(path: str, problem: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{problem}: {_reason(error)}: {path}") from None
    os.close(fd)


def _check_backing_file(path: str, read_only: bool) -> None:
    flags = os.O_RDONLY if read_only else os.O_RDWR
    try:
        os.close(os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK))
        if os.path.isdir(path):
            raise IsADirectoryError(21, "Is a directory")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Virtio backend error: Error manipulating the backing file: {_reason(error)} {path}"
        ) from None
    from crackle.virtio.block.backing import open_backing

    os.close(open_backing(path, read_only).fd)


def _reason(error: OSError | ValueError) -> str:
    return os_reason(error) if isinstance(error, OSError) else str(error)


def _check_boot_args(text: str) -> None:
    problem = "The kernel command line is invalid: "
    if len(text) >= CMDLINE_MAX_SIZE:
        raise ConfigError(
            f"{problem}Invalid cmdline capacity provided. It has {len(text)} characters, "
            f"{CMDLINE_MAX_SIZE - 1} is the most."
        )
    if not text.isascii() or "\0" in text:
        raise ConfigError(f"{problem}it may hold ASCII characters only, and no NUL.")
