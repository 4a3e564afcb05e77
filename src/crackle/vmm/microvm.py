"""`MicroVM`: a virtual machine as a Python object, in this process.

A thin front of the `Controller`: every call is one of its commands, as an API request would be.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crackle.errors import ConfigError, CrackleError, GuestError, StateError
from crackle.runtime.ownership import end_dropped, enrol
from crackle.schema.boot import BootSource
from crackle.schema.drive import Drive
from crackle.schema.machine import MachineConfigUpdate
from crackle.schema.mmds import MmdsConfig
from crackle.schema.vsock import Vsock
from crackle.telemetry.logger import OFF, Logger
from crackle.vmm.builder import build
from crackle.vmm.commands import Command
from crackle.vmm.console import DEFAULT_LIMIT, Console
from crackle.vmm.controller import DEFAULT_METADATA_LIMIT, Controller
from crackle.vmm.machine import BuildOptions, Machine
from crackle.vmm.shell import Shell, prepare

if TYPE_CHECKING:
    from types import TracebackType

    from crackle.schema.config import VmConfig
    from crackle.schema.machine import HugePages
    from crackle.schema.net import NetworkInterface
    from crackle.schema.rate_limiter import RateLimiter
    from crackle.virtio.custom.base import VirtioDevice
    from crackle.vmm.devices import Held
    from crackle.vmm.machine import ExitStatus

DEFAULT_GUEST_CID = 3
DEFAULT_BOOT_ARGS = "console=ttyS0 reboot=k panic=1 i8042.noaux i8042.nomux"


class MicroVM:
    """A microVM with the given kernel and disks.

    kernel, initrd: paths of a vmlinux or bzImage and of an initial RAM disk.
    rootfs: path of an image that becomes the root device /dev/vda; `read_only` mounts and opens it so.
    drives: more disks, as paths or `Drive` resources, from /dev/vdb on (from /dev/vda without rootfs).
    interfaces: network interfaces, as names of TAP devices or `NetworkInterface` resources; the guest's eth0, eth1...
    vsock: path of the Unix socket that leads to the vsock ports of the guest, whose CID is 3; or a `Vsock` resource.
    metadata: a JSON document that the guest finds at http://169.254.169.254 on every interface, opening a session first
    (MMDS version 2); `mmds`, a `MmdsConfig`, says so otherwise. Either is enough; `self.metadata` changes the document,
    which has at most `metadata_limit` bytes.
    devices: virtio devices written in Python, subclasses of `crackle.VirtioDevice`.
    boot_args: the kernel command line; the default puts the console on the serial port.
    cpus: 1 to 32, two to a core with `smt`. memory: in MiB, backed as `huge_pages` says: "None", "Transparent", or "2M"
    out of those the host has reserved. track_dirty_pages: note which pages are written, for differential snapshots.
    console: (input, output) descriptors of the guest's serial port, -1 for none; by default `self.console` holds it,
    and keeps the last `console_limit` bytes of output.
    logger: what the controller logs to; by default nothing is logged.

    As a context manager it starts the guest on entry and stops it on exit. Raises ConfigError when what is asked for
    cannot be had, KvmError when the host cannot run it.
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str],
        rootfs: str | os.PathLike[str] | None = None,
        *,
        initrd: str | os.PathLike[str] | None = None,
        drives: Sequence[str | os.PathLike[str] | Drive] = (),
        interfaces: Sequence[str | NetworkInterface] = (),
        vsock: str | os.PathLike[str] | Vsock | None = None,
        metadata: Any = None,
        mmds: MmdsConfig | None = None,
        metadata_limit: int = DEFAULT_METADATA_LIMIT,
        devices: Sequence[VirtioDevice] = (),
        read_only: bool = False,
        boot_args: str = DEFAULT_BOOT_ARGS,
        cpus: int = 1,
        memory: int = 128,
        smt: bool = False,
        huge_pages: HugePages = "None",
        track_dirty_pages: bool = False,
        instance_id: str = "anonymous-instance",
        console: tuple[int, int] | None = None,
        console_limit: int = DEFAULT_LIMIT,
        logger: Logger | None = None,
        profile: bool = False,
    ) -> None:
        self._console = Console(console_limit) if console is None else None
        if console is None:
            assert self._console is not None
            console = (self._console.guest_in, self._console.guest_out)
        self._options = BuildOptions(
            console_in=console[0],
            console_out=console[1],
            console_waits=True,
            ends_on_panic=True,
            logger=logger,
            profile=profile,
            devices=tuple(devices),
        )
        self._controller = Controller(
            _Builder(self._options),
            prepare,
            instance_id=instance_id,
            logger=logger or Logger(instance_id, level=OFF),
            metadata_limit=metadata_limit,
        )
        enrol(self)
        try:
            execute = self._controller.execute
            machine = MachineConfigUpdate(cpus, memory, smt, None, track_dirty_pages, huge_pages)
            execute(Command("put_machine", machine))
            source = BootSource(os.fspath(kernel), None if initrd is None else os.fspath(initrd), boot_args)
            execute(Command("put_boot_source", source))
            for drive in _drives(rootfs, drives, read_only):
                execute(Command("put_drive", drive))
            for interface in _interfaces(interfaces):
                execute(Command("put_network", interface))
            if vsock is not None:
                if not isinstance(vsock, Vsock):
                    vsock = Vsock(DEFAULT_GUEST_CID, os.fspath(vsock))
                execute(Command("put_vsock", vsock))
            if mmds is None and metadata is not None:
                names = [interface.iface_id for interface in self._controller.config.network_interfaces]
                mmds = MmdsConfig(names, "V2")
            if mmds is not None:
                execute(Command("put_mmds_config", mmds))
            if metadata is not None:
                self.metadata = metadata
        except BaseException:
            self.stop()
            raise

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Boot the guest."""
        self._controller.execute(Command("start"))
        if self._console is not None:
            machine = self._machine()
            self._console.watch(machine.exit_fd, lambda: _end_of(machine))

    def pause(self) -> None:
        """Stop all vCPUs and devices where they are."""
        self._controller.execute(Command("pause"))

    def resume(self) -> None:
        """Go on after `pause`."""
        self._controller.execute(Command("resume"))

    def send_ctrl_alt_del(self) -> None:
        """Press Ctrl-Alt-Del in the guest."""
        self._controller.execute(Command("send_ctrl_alt_del"))

    def press_power_button(self) -> None:
        """Press the ACPI power button."""
        self._machine().press_power_button()

    def update_drive(
        self,
        drive_id: str,
        path: str | os.PathLike[str] | None = None,
        rate_limiter: RateLimiter | None = None,
    ) -> None:
        """Put another file behind a drive, and the guest learns of the new size; or limit it, bucket by bucket.

        With neither, for a vhost-user drive: ask its back end again.
        """
        from crackle.schema.drive import DriveUpdate

        update = DriveUpdate(drive_id, None if path is None else os.fspath(path), rate_limiter)
        self._controller.execute(Command("patch_drive", update))

    def update_interface(
        self, iface_id: str, *, rx_limiter: RateLimiter | None = None, tx_limiter: RateLimiter | None = None
    ) -> None:
        """Limit what a network interface receives and sends, bucket by bucket; one of size 0 takes its limit away."""
        from crackle.schema.net import NetworkInterfaceUpdate

        self._controller.execute(
            Command("patch_network", NetworkInterfaceUpdate(iface_id, rx_limiter, tx_limiter))
        )

    def patch_metadata(self, patch: Any) -> None:
        """Change the metadata document by a JSON merge patch (RFC 7396): None removes a key."""
        self._controller.execute(Command("patch_mmds", patch))

    def wait(self, timeout: float | None = None) -> ExitStatus:
        """Wait until the guest ends by itself, and say how. TimeoutError after `timeout` seconds.

        GuestError, with the registers, when it did not end well.
        """
        machine = self._machine()
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(machine.exit_fd, select.POLLIN)
        while (status := machine.exit_status()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not poll.poll(None if left is None else left * 1000) and left is not None:
                raise TimeoutError(f"the guest still runs after {timeout:g} s")
        if status.exit_code:
            raise GuestError(status.message)
        return status

    def fileno(self) -> int:
        """For `select` and its like: readable once the guest has ended. StateError when it does not run."""
        return self._machine().exit_fd

    def stop(self) -> None:
        """End the guest, however it is, and give everything back. Idempotent."""
        if self._console is not None:
            self._console.settle()
        self._controller.stop()
        if self._console is not None:
            self._console.close()

    end = stop

    def disown(self) -> None:
        """In a forked child: close the copies of the descriptors. The microVM is the parent's, and goes on there."""
        self._controller.disown()
        if self._console is not None:
            self._console.disown()

    def runs(self, thread: int) -> bool:
        """Whether that is one of the microVM's own threads, as threading.get_ident() names it."""
        machine = self._controller.machine
        return isinstance(machine, Machine) and machine.runs(thread)

    def __del__(self) -> None:
        if hasattr(self, "_controller"):
            end_dropped(self)

    def __enter__(self) -> MicroVM:
        try:
            if self.state in ("Not started", "Stopped"):
                self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- what it tells -------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "Not started", "Running", "Paused" or "Stopped", which a guest that has ended is after `stop` only."""
        return self._controller.state

    @property
    def console(self) -> Console:
        """The serial console. StateError when descriptors were given for it."""
        if self._console is None:
            raise StateError("this microVM's console was given to somebody else")
        return self._console

    @property
    def config(self) -> VmConfig:
        """The configuration, as GET /vm/config gives it."""
        config: VmConfig = self._controller.execute(Command("get_config"))
        return config

    @property
    def metadata(self) -> Any:
        """The document that the guest reads from its metadata service. Assigning replaces it.

        ConfigError for one that is too large, and when the guest runs without a metadata service.
        """
        return self._controller.execute(Command("get_mmds"))

    @metadata.setter
    def metadata(self, document: Any) -> None:
        self._controller.execute(Command("put_mmds", document))

    def metrics(self) -> dict[str, Any]:
        """Counters of the devices and vCPUs since the start."""
        return self._machine().metrics()

    def _machine(self) -> Machine:
        if self._controller.machine is None:
            raise StateError("the microVM is not running")
        assert isinstance(self._controller.machine, Machine)
        return self._controller.machine


class _Builder:
    """Makes the controller's machine; not a method of the microVM, so that the two are no cycle."""

    def __init__(self, options: BuildOptions) -> None:
        self._options = options

    def __call__(self, config: VmConfig, shell: Any, held: Mapping[tuple[str, str], Held]) -> Machine:
        assert shell is None or isinstance(shell, Shell)
        return build(config, shell, self._options, held)


def _end_of(machine: Machine) -> CrackleError | None:
    """Why the guest ended, as the error for who still expects something of it."""
    status = machine.exit_status()
    if status is None:
        return None
    if status.reason == "stopped":
        return StateError("the microVM has been stopped")
    return (
        GuestError(status.message) if status.exit_code else CrackleError(f"the guest ended: {status.message}")
    )


def _drives(
    rootfs: str | os.PathLike[str] | None, drives: Sequence[str | os.PathLike[str] | Drive], read_only: bool
) -> list[Drive]:
    if isinstance(drives, (str, os.PathLike)):
        raise ConfigError(
            f"drives must be a sequence of paths and Drives, not the path {os.fspath(drives)!r} alone"
        )
    result = []
    if rootfs is not None:
        result.append(Drive("rootfs", True, path_on_host=os.fspath(rootfs), is_read_only=read_only))
    for index, drive in enumerate(drives):
        if isinstance(drive, Drive):
            result.append(drive)
        else:
            result.append(Drive(f"drive{index}", False, path_on_host=os.fspath(drive), is_read_only=False))
    names = [drive.drive_id for drive in result]
    if len(set(names)) < len(names):
        raise CrackleError(f"two drives have the same name: {', '.join(sorted(names))}")
    return result


def _interfaces(interfaces: Sequence[str | NetworkInterface]) -> list[NetworkInterface]:
    from crackle.schema.net import NetworkInterface

    if isinstance(interfaces, str):
        raise ConfigError(
            f"interfaces must be a sequence of TAP devices and NetworkInterfaces, not the name {interfaces!r} alone"
        )
    return [
        NetworkInterface(f"eth{index}", interface) if isinstance(interface, str) else interface
        for index, interface in enumerate(interfaces)
    ]
