"""`MicroVM`: a virtual machine as a Python object, in this process or another. Public as `crackle.MicroVM`.

A thin front of the `Controller`, or of a `RemoteController`: every call is a command, as an API request would be.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Unpack

import msgspec

from crackle.errors import CrackleError, GuestError, StateError
from crackle.runtime.ownership import end_dropped, enrol
from crackle.schema.balloon import Balloon
from crackle.schema.boot import BootSource
from crackle.schema.config import VmConfig
from crackle.schema.cpu import CpuConfig
from crackle.schema.drive import Drive, DriveUpdate, Overlay
from crackle.schema.entropy import EntropyDevice
from crackle.schema.jail import Jail
from crackle.schema.machine import HugePages, MachineConfig
from crackle.schema.mmds import MmdsConfig
from crackle.schema.net import NetworkInterface, NetworkInterfaceUpdate
from crackle.schema.pmem import Pmem
from crackle.schema.rate_limiter import RateLimiter
from crackle.schema.snapshot import SnapshotCreate, SnapshotHugePages, SnapshotLoad
from crackle.schema.vsock import Vsock
from crackle.snapshot.pair import read
from crackle.telemetry.logger import DEFAULT_INSTANCE_ID, Logger
from crackle.virtio.custom.base import VirtioDevice
from crackle.vmm.arguments import (
    backend_of,
    balloon_of,
    check_rest,
    checked,
    console_of,
    devices_of,
    document_of,
    drive_overrides,
    drives_of,
    entropy_of,
    files_of,
    interfaces_of,
    jail_of,
    make,
    overlay_of,
    pair_of,
    path_of,
    pmem_of,
    template_of,
)
from crackle.vmm.balloon import BalloonControl
from crackle.vmm.commands import ALLOWED, NOT_STARTED, PAUSED, Command
from crackle.vmm.console import DEFAULT_LIMIT, Console
from crackle.vmm.controller import DEFAULT_METADATA_LIMIT
from crackle.vmm.hosting import Hosting
from crackle.vmm.identity import CloneOptions
from crackle.vmm.machine import ExitStatus, Machine
from crackle.vmm.remote import Link, RemoteController, RemoteMachine
from crackle.vmm.silence import Silence

if TYPE_CHECKING:
    from crackle.vmm.hosting import Source

DEFAULT_GUEST_CID = 3
DEFAULT_BOOT_ARGS = "console=ttyS0 reboot=k panic=1 i8042.noaux i8042.nomux"
DEFAULT_SHUTDOWN_TIMEOUT = 30.0

NOTHING: Mapping[str, Any] = MappingProxyType({})


class MicroVM:
    """A microVM with the given kernel and disks.

    kernel, initrd: paths of a vmlinux or bzImage and of an initial RAM disk.
    rootfs: path of an image that becomes the root device /dev/vda; `read_only` mounts and opens it so.
    overlay: what takes the writes of rootfs, which is then only read: a file, made if it is not there, or an `Overlay`.
    drives: more disks, as paths or `Drive` resources, from /dev/vdb on (from /dev/vda without rootfs).
    interfaces: network interfaces, as names of TAP devices or `NetworkInterface` resources; the guest's eth0, eth1...
    vsock: path of the Unix socket that leads to the vsock ports of the guest, whose CID is 3; or a `Vsock` resource.
    metadata: a JSON document that the guest finds at http://169.254.169.254 on every interface, opening a session first
    (MMDS version 2); `mmds`, a `MmdsConfig`, says so otherwise. Either is enough; `self.metadata` changes the document,
    which has at most `metadata_limit` bytes.
    balloon: MiB of memory that the guest is to give up at first, often 0, which `self.balloon` changes. It lets go when
    the guest has no other memory, tells statistics every 5 s, and reports free pages; a `Balloon` says otherwise.
    pmem: files that the guest has in its address space, /dev/pmem0 and so on, as paths or `Pmem` resources.
    entropy: give the guest the host's random numbers, /dev/hwrng; an `EntropyDevice` limits how many.
    devices: virtio devices written in Python, instances of subclasses of `crackle.VirtioDevice`.
    boot_args: the kernel command line; the default puts the console on the serial port.
    cpus: 1 to 32, two to a core with `smt`. memory: in MiB, backed as `huge_pages` says: "None", "Transparent", or "2M"
    out of those the host has reserved. cpu_template: what the guest sees of its processor: the name of a static
    template ("T2A"), the path of a custom one, or a `CpuConfig`. track_dirty_pages: note which pages are written, for
    differential snapshots.
    console: (input, output) descriptors of the guest's serial port, -1 for none; by default `self.console` holds it,
    and keeps the last `console_limit` bytes of output.
    logger: what the controller logs to; by default nothing is logged.
    own_process: the guest runs in a process of its own, forked from a warm one, which is kept for that from the first
    time on; it ends with this one. Devices written in Python and a logger are this process's, and cannot be given then.
    jail: a `Jail`, which that process enters before anything else, so that it is `own_process` in any case.
    core_scheduling: `own_process` too, and where cores have several threads, nobody else runs on one at a time with the
    microVM; ConfigError where the kernel cannot do that.
    api_sock: `own_process` too, and that process serves the API as well, at a Unix socket with this path, which goes
    with the microVM. Forks are asked for here.

    As a context manager it starts the guest on entry and stops it on exit. Raises ConfigError when what is asked for
    cannot be had, with the API's words, and KvmError when the host cannot run it.

    Any thread may call. One lock lets their calls take turns; `wait`, `console`, `state` and `exit_status` are free of
    it. A thread of the microVM itself (a method of a device written in Python) gets StateError from what would wait for
    that thread, and where it would have to wait for another thread's turn.

    One that is dropped while it runs is stopped, with a ResourceWarning; one that runs when the program ends is stopped
    after the last non-daemon thread. In a forked child it is the parent's: every call raises StateError.
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
        balloon: int | Balloon | None = None,
        entropy: bool | EntropyDevice = False,
        pmem: Sequence[str | os.PathLike[str] | Pmem] = (),
        devices: Sequence[VirtioDevice] = (),
        overlay: str | os.PathLike[str] | Overlay | None = None,
        read_only: bool = False,
        boot_args: str = DEFAULT_BOOT_ARGS,
        cpus: int = 1,
        memory: int = 128,
        smt: bool = False,
        huge_pages: HugePages = "None",
        cpu_template: str | os.PathLike[str] | CpuConfig | None = None,
        track_dirty_pages: bool = False,
        instance_id: str = DEFAULT_INSTANCE_ID,
        console: tuple[int, int] | None = None,
        console_limit: int = DEFAULT_LIMIT,
        logger: Logger | None = None,
        profile: bool = False,
        own_process: bool = False,
        jail: Jail | None = None,
        core_scheduling: bool = False,
        api_sock: str | os.PathLike[str] | None = None,
    ) -> None:
        check_rest(
            instance_id,
            metadata_limit,
            logger,
            read_only=read_only,
            profile=profile,
            own_process=own_process,
            core_scheduling=core_scheduling,
        )
        static, custom_cpu = template_of(cpu_template)
        machine = make(
            MachineConfig,
            vcpu_count=cpus,
            mem_size_mib=memory,
            smt=smt,
            track_dirty_pages=track_dirty_pages,
            huge_pages=huge_pages,
            cpu_template=static,
        )
        source = make(
            BootSource,
            kernel_image_path=path_of(kernel, "kernel"),
            initrd_path=None if initrd is None else path_of(initrd, "initrd"),
            boot_args=boot_args,
        )
        disks, cards = drives_of(rootfs, drives, read_only, overlay), interfaces_of(interfaces)
        custom, randomness, air = devices_of(devices), entropy_of(entropy), balloon_of(balloon)
        mapped = pmem_of(pmem)
        if vsock is not None:
            if isinstance(vsock, Vsock):
                vsock = checked(vsock)
            else:
                vsock = make(Vsock, guest_cid=DEFAULT_GUEST_CID, uds_path=path_of(vsock, "vsock"))
        if metadata is not None:
            metadata = document_of(metadata)
            mmds = mmds or MmdsConfig([card.iface_id for card in cards], "V2")
        if mmds is not None:
            mmds = checked(mmds)
        confined = jail_of(
            jail, lambda: (source.kernel_image_path, source.initrd_path, *files_of(disks, mapped))
        )
        hosting = Hosting(
            console,
            console_limit,
            custom,
            logger,
            metadata_limit,
            profile,
            own_process or confined is not None or core_scheduling or api_sock is not None,
            confined,
            core_scheduling,
            None if api_sock is None else path_of(api_sock, "api_sock"),
        )
        self._set_up(instance_id, hosting)
        try:
            self._order("put_machine", machine)
            if custom_cpu is not None:
                self._order("put_cpu_config", custom_cpu)
            self._order("put_boot_source", source)
            for disk in disks:
                self._order("put_drive", disk)
            for card in cards:
                self._order("put_network", card)
            if vsock is not None:
                self._order("put_vsock", vsock)
            if air is not None:
                self._order("put_balloon", air)
            if randomness is not None:
                self._order("put_entropy", randomness)
            for each in mapped:
                self._order("put_pmem", each)
            if mmds is not None:
                self._order("put_mmds_config", mmds)
            if metadata is not None:
                self._order("put_mmds", metadata)
        except BaseException:
            self.end()
            raise

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        memory: str | os.PathLike[str] | None = None,
        *,
        resume: bool = True,
        handler: str | os.PathLike[str] | None = None,
        drives: Mapping[str, str | os.PathLike[str]] = NOTHING,
        overlays: Mapping[str, str | os.PathLike[str] | Overlay] = NOTHING,
        pmem: Mapping[str, str | os.PathLike[str]] = NOTHING,
        interfaces: Mapping[str, str] = NOTHING,
        vsock: str | os.PathLike[str] | None = None,
        metadata: Any = None,
        metadata_limit: int = DEFAULT_METADATA_LIMIT,
        devices: Sequence[VirtioDevice] = (),
        huge_pages: SnapshotHugePages = "Snapshot",
        track_dirty_pages: bool = False,
        clock_realtime: bool = False,
        instance_id: str = DEFAULT_INSTANCE_ID,
        console: tuple[int, int] | None = None,
        console_limit: int = DEFAULT_LIMIT,
        logger: Logger | None = None,
        profile: bool = False,
        own_process: bool = False,
        jail: Jail | None = None,
        core_scheduling: bool = False,
        api_sock: str | os.PathLike[str] | None = None,
    ) -> MicroVM:
        """The microVM of a snapshot, which goes on where that was taken; or is paused there, without `resume`.

        path: the directory that `snapshot` filled; or the state file, and `memory` the memory file. Neither is
        changed. The memory file must stay as it is for as long as the microVM lives: its pages are read when they
        are needed. drives, pmem, interfaces: other files, and other TAP devices, by the identifiers that the snapshot
        has for them. overlays: for a drive, where its writes go from now on: a file, made if it is not there over what
        the drive was when it was saved, or an `Overlay`; so that any number of microVMs may go on from one snapshot.
        handler: path of the Unix socket where a page-fault handler listens, another process, or a `PageHandler`. It
        gives the memory instead of the memory file, which is not looked at here then.
        vsock: another path for the Unix socket. metadata: a new document, where the guest has a metadata service:
        snapshots keep none. devices: new instances of those written in Python, in the same order. clock_realtime:
        let the guest's kvmclock go on by the time that has passed, rather than where it stood. The rest as in
        `MicroVM`. Raises ConfigError, with what is wrong, when there is no such snapshot or this host cannot run it.
        """
        check_rest(
            instance_id,
            metadata_limit,
            logger,
            resume=resume,
            profile=profile,
            own_process=own_process,
            core_scheduling=core_scheduling,
        )
        state_path, memory_path = pair_of(path, memory)
        request = make(
            SnapshotLoad,
            snapshot_path=state_path,
            mem_backend=backend_of(memory_path, handler),
            resume_vm=False,
            drive_overrides=drive_overrides(drives, overlays),
            pmem_overrides=[
                {"id": name, "path_on_host": path_of(path, "pmem")} for name, path in pmem.items()
            ],
            network_overrides=[{"iface_id": name, "host_dev_name": tap} for name, tap in interfaces.items()],
            vsock_override=None if vsock is None else {"uds_path": path_of(vsock, "vsock")},
            huge_pages=huge_pages,
            track_dirty_pages=track_dirty_pages,
            clock_realtime=clock_realtime,
        )
        custom = devices_of(devices)
        if metadata is not None:
            metadata = document_of(metadata)
        confined = jail_of(
            jail,
            lambda: (
                state_path,
                memory_path if handler is None else path_of(handler, "handler"),
                *_saved_files(state_path, request),
            ),
        )
        hosting = Hosting(
            console,
            console_limit,
            custom,
            logger,
            metadata_limit,
            profile,
            own_process or confined is not None or core_scheduling or api_sock is not None,
            confined,
            core_scheduling,
            None if api_sock is None else path_of(api_sock, "api_sock"),
        )
        vm = cls.begin_load(instance_id, hosting, request, metadata)
        vm.finish_load(resume=resume)
        return vm

    @classmethod
    def begin_load(
        cls,
        instance_id: str,
        hosting: Hosting,
        request: SnapshotLoad,
        metadata: Any = None,
        source: Source | None = None,
    ) -> MicroVM:
        """One that loads a snapshot, for which `finish_load` waits: for those that load several at a time.

        source: the snapshot, if it has been read already.
        """
        vm = cls.__new__(cls)
        vm._set_up(instance_id, hosting, source)
        vm._loading = [Command("load_snapshot", request)]
        if metadata is not None:
            vm._loading.insert(0, Command("put_mmds", metadata))
        try:
            if isinstance(vm._controller, RemoteController):
                while vm._loading:
                    vm._controller.submit(vm._loading.pop(0))
        except BaseException:
            vm.end()
            raise
        return vm

    def finish_load(self, *, resume: bool) -> None:
        """Wait for what `begin_load` began. When it fails, everything is given back."""
        try:
            with self._turn(waits=True):
                if isinstance(self._controller, RemoteController):
                    self._controller.collect()
                while self._loading:
                    self._controller.execute(self._loading.pop(0))
                self._has_machine()
            if resume:
                self.resume()
        except BaseException:
            self.end()
            raise

    @classmethod
    def begin_fork(cls, instance_id: str, hosting: Hosting, link: Link) -> MicroVM:
        """One whose process, at the other ends of `link`, is to be forked; then there is `finish_fork`."""
        vm = cls.__new__(cls)
        vm._set_up(instance_id, hosting, link=link)
        return vm

    def finish_fork(self, state: str) -> None:
        """Its process is there, and has a machine in this state."""
        assert isinstance(self._controller, RemoteController)
        self._controller.adopt(state)
        self._has_machine()

    def _set_up(
        self, instance_id: str, hosting: Hosting, source: Source | None = None, link: Link | None = None
    ) -> None:
        """Make console and controller, which know of no guest yet."""
        hosting.check()
        ends = (-1, -1) if hosting.console is None else console_of(hosting.console)
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._started: Machine | RemoteMachine | None = None
        self._loading: list[Command] = []
        self._told_of_end: Callable[[], None] | None = None
        self._console = Console(hosting.console_limit) if hosting.console is None else None
        if self._console is not None:
            ends = (self._console.guest_in, self._console.guest_out)
        self._ends = ends
        try:
            self._controller = (
                hosting.controller(instance_id, ends, source)
                if link is None
                else RemoteController(link, instance_id)
            )
        except BaseException:
            if self._console is not None:
                self._console.close()
            raise
        enrol(self)

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Boot the guest."""
        self._begin("start")

    def _begin(self, name: str, resource: Any = None) -> None:
        """Execute the command that makes the machine."""
        with self._turn(waits=True):
            self._order(name, resource)
            self._has_machine()

    def _has_machine(self) -> None:
        machine = self._controller.machine
        assert isinstance(machine, Machine | RemoteMachine)
        self._started = machine
        if self._console is not None:
            self._console.watch(machine.exit_fd, lambda: _end_of(machine))

    def pause(self) -> None:
        """Stop all vCPUs and devices where they are."""
        self._order("pause", waits=True)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._order("resume", waits=True)

    def snapshot(
        self,
        path: str | os.PathLike[str],
        memory: str | os.PathLike[str] | None = None,
        *,
        differential: bool = False,
        keep_overlays: bool = False,
    ) -> None:
        """Save the guest, which `restore` then lets go on: memory and all devices, but not the disks' contents.

        path: a directory, made if it is not there, that gets the files "state" and "memory"; or the state file's
        path, and `memory` the memory file's. What is there is replaced, both files together or none. A guest that
        runs is paused meanwhile. ConfigError when they cannot be written. differential: write only the pages that
        have changed since the snapshot before (with `track_dirty_pages`) or since the start, into the memory file of
        that snapshot if it is the same. keep_overlays: copy the drives' overlays too, beside the state file, so that
        the guest may go on writing to its own; those in memory are copied in any case.
        """
        state_path, memory_path = pair_of(path, memory, to_write=True)
        request = make(
            SnapshotCreate,
            snapshot_path=state_path,
            mem_file_path=memory_path,
            snapshot_type="Diff" if differential else "Full",
            keep_overlays=keep_overlays,
        )
        with self._turn(waits=True):
            self._running()
            runs = self.state != PAUSED
            if runs:
                self.pause()
            try:
                self._order("create_snapshot", request)
            finally:
                if runs:
                    self.resume()

    def fork(self, n: int = 1, *, first: int = 0, **options: Unpack[CloneOptions]) -> list[MicroVM]:
        """`n` microVMs that go on from where this one is, which goes on too; each with a process of its own.

        This one stands still for some milliseconds, and for as long as the kernel needs to share its memory, whatever
        `n` is. Nobody's memory is copied before somebody writes to it, page by page. Clones of one that is paused are
        paused. They end when this program does.

        The options are those of `Snapshot.clone`, of which a running guest can have instance_id, interfaces, macs,
        vsock, cid, drives, overlays, metadata, console and console_limit. A drive that the guest may write to, and has
        no overlay, needs one in `overlays`, or in `drives` a copy as of the fork: pause this microVM, copy the file,
        fork, resume. Where clones get an overlay, so does this microVM, over what its drive was: `config` says where
        its writes go from then on. By default a clone's metadata document is this one's.

        Where the guest runs in this process, that is forked as it is, with all that the program has in memory; the
        clones run none of the program, and have none of its descriptors. Programs whose memory others may not have,
        or that have C code which registers itself for forks, use `own_process`.

        When one cannot be had, none is, and this one goes on: ConfigError says why.
        """
        from crackle.vmm.forks import fork

        with self._turn(waits=True):
            self._running()
            return fork(self, n, first, options)

    def send_ctrl_alt_del(self) -> None:
        """Press Ctrl-Alt-Del in the guest."""
        self._order("send_ctrl_alt_del")

    def press_power_button(self) -> None:
        """Press the ACPI power button."""
        self._order("press_power_button")

    def attach(self, device: str | os.PathLike[str] | Drive | NetworkInterface | Pmem) -> str:
        """Give the guest, which runs, another disk, network interface or file in its memory; returns its identifier.

        device: a `Drive`, or the path of one; a `NetworkInterface`; or a `Pmem`. A Linux guest with ACPI sees it within
        milliseconds. Before the start it is one of those that the guest begins with. ConfigError when it cannot be had.
        """
        with self._turn():
            if isinstance(device, NetworkInterface):
                self._order("put_network", checked(device))
                return device.iface_id
            if isinstance(device, Pmem):
                self._order("put_pmem", checked(device))
                return device.id
            if not isinstance(device, Drive):
                path = path_of(device, "device")
                taken = {drive.drive_id for drive in self.config.drives}
                name = next(f"drive{n}" for n in range(len(taken) + 1) if f"drive{n}" not in taken)
                device = make(Drive, drive_id=name, is_root_device=False, path_on_host=path)
            self._order("put_drive", checked(device))
            return device.drive_id

    def detach(self, identifier: str) -> None:
        """Ask the guest for a device that can be attached, and take it away when the guest's driver has let go of it.

        A Linux guest does within milliseconds; unmount file systems first. One that it began with is unbound in the
        guest first (docs/hotplug.md). ConfigError when the guest has not let go after two seconds, or cannot be
        without: then it has it still.
        """
        with self._turn():
            config = self.config
            if any(card.iface_id == identifier for card in config.network_interfaces):
                self._order("delete_network", identifier)
            elif any(pmem.id == identifier for pmem in config.pmem):
                self._order("delete_pmem", identifier)
            else:
                self._order("delete_drive", identifier)

    def update_drive(
        self,
        drive_id: str,
        path: str | os.PathLike[str] | None = None,
        rate_limiter: RateLimiter | None = None,
        *,
        overlay: str | os.PathLike[str] | Overlay | None = None,
    ) -> None:
        """Put another file behind a drive, and the guest learns of the new size; or limit it, bucket by bucket.

        overlay: a new file, or an `Overlay`, that takes the writes from now on; what the drive is now stays as it is.
        With nothing, for a vhost-user drive: ask its back end again.
        """
        file = None if path is None else path_of(path, "path")
        layer = None if overlay is None else overlay_of(overlay, "overlay")
        self._order(
            "patch_drive",
            make(DriveUpdate, drive_id=drive_id, path_on_host=file, rate_limiter=rate_limiter, overlay=layer),
        )

    def update_interface(
        self, iface_id: str, *, rx_limiter: RateLimiter | None = None, tx_limiter: RateLimiter | None = None
    ) -> None:
        """Limit what a network interface receives and sends, bucket by bucket; one of size 0 takes its limit away."""
        update = make(
            NetworkInterfaceUpdate, iface_id=iface_id, rx_rate_limiter=rx_limiter, tx_rate_limiter=tx_limiter
        )
        self._order("patch_network", update)

    def patch_metadata(self, patch: Any) -> None:
        """Change the metadata document by a JSON merge patch (RFC 7396): None removes a key."""
        self._order("patch_mmds", document_of(patch, "the patch"))

    def wait(self, timeout: float | None = None) -> ExitStatus:
        """Wait until the guest ends, by itself or by another thread's `stop`, and say how. May be asked again.

        TimeoutError after `timeout` seconds; GuestError, with the registers, when it did not end well. Of a guest that
        says nothing where KVM runs no Linux a RuntimeWarning tells after ten seconds.
        """
        self._check_owner()
        self._check_waiter()
        status = self.silence(_warn).wait(self._machine().wait, timeout)
        if status is None:
            raise TimeoutError(f"the guest still runs after {timeout:g} s")
        return _unless_failed(status)

    def silence(self, tell: Callable[[str], None]) -> Silence:
        """What `wait` listens with, for who attends to the microVM in another way."""
        machine = self._machine()
        return Silence(lambda: int(machine.metrics()["uart"]["write_count"]), tell)

    def shutdown(self, timeout: float = DEFAULT_SHUTDOWN_TIMEOUT) -> ExitStatus:
        """Ask the guest to end, and stop it if it does not; give everything back, and say how it ended.

        First the power button is pressed, and half of `timeout` seconds later Ctrl-Alt-Del; after the rest it is as if
        the plug were pulled. The result's `step` says what it took. A paused guest goes on first. GuestError, when all
        is given back, if it did not end well.
        """
        step: str | None = None
        with self._turn(waits=True):
            machine = self._machine()
            if self.state == PAUSED:
                self.resume()
        for asked, press in (
            ("power button", machine.press_power_button),
            ("Ctrl-Alt-Del", machine.send_ctrl_alt_del),
        ):
            if machine.exit_status() is not None:
                break
            step = asked
            try:
                press()
            except StateError:
                break
            if machine.wait(max(0.0, timeout / 2)) is not None:
                break
        else:
            step = "stop"
        self.stop()
        return _unless_failed(msgspec.structs.replace(machine.wait() or _STOPPED, step=step))

    def fileno(self) -> int:
        """For `select` and its like: readable once the guest has ended. StateError when it does not run."""
        return self._machine().exit_fd

    def stop(self) -> None:
        """End the guest, however it is, and give everything back. Idempotent."""
        with self._turn(waits=True):
            self.end()

    def end(self) -> None:
        """`stop`, for `crackle.runtime.ownership`: at the end of the program, or of the last reference."""
        with self._lock:
            if self._console is not None:
                self._console.settle()
            self._controller.stop()
            if self._console is not None:
                self._console.close()
            told, self._told_of_end = self._told_of_end, None
        if told is not None:
            told()

    def when_ended(self, tell: Callable[[], None]) -> None:
        """Call once when everything has been given back: for who counts microVMs."""
        self._told_of_end = tell

    def disown(self) -> None:
        """In a forked child: close the copies of the descriptors. The microVM is the parent's, and goes on there."""
        self._controller.disown()
        if self._console is not None:
            self._console.disown()

    def runs(self, thread: int) -> bool:
        """Whether that is one of the microVM's own threads, as threading.get_ident() names it."""
        return self._started is not None and self._started.runs(thread)

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        if not hasattr(self, "_controller") or self._pid != os.getpid():
            return
        try:
            if self._controller.machine is not None and self.exit_status is None:
                _warn(f"unclosed MicroVM {self!r}", ResourceWarning, source=self, stacklevel=2)
        finally:
            end_dropped(self)

    def __enter__(self) -> MicroVM:
        try:
            if self._controller.machine is None:
                self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A forked child that leaves the block leaves the parent's guest alone.
        if self._pid == os.getpid():
            self.stop()

    # -- what it tells -------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        if not hasattr(self, "_controller"):
            return "<MicroVM, not made>"
        name = f"<MicroVM {self._controller.instance_id!r}"
        if self._pid != os.getpid():
            return f"{name} of process {self._pid}>"
        if isinstance(self._controller, RemoteController):
            return f"{name}: {self.state}, process {self._controller.pid}>"
        config = self._controller.config.machine_config
        assert config is not None
        return f"{name}: {self.state}, {config.vcpu_count} vCPU, {config.mem_size_mib} MiB>"

    @property
    def state(self) -> str:
        """ "Not started", "Running", "Paused" or "Stopped", which a guest that has ended by itself is too."""
        self._check_owner()
        return self._controller.state

    @property
    def instance_id(self) -> str:
        """Its name, which log and metadata have too."""
        return self._controller.instance_id

    @property
    def pid(self) -> int:
        """The process that the guest runs in: this one, or its own."""
        self._check_owner()
        return self._controller.pid if isinstance(self._controller, RemoteController) else self._pid

    @property
    def exit_status(self) -> ExitStatus | None:
        """How the guest ended; None while it has not, or was never started. Waits for nothing."""
        self._check_owner()
        return None if self._started is None else self._started.exit_status()

    @property
    def console(self) -> Console:
        """The serial console. StateError when descriptors were given for it."""
        self._check_owner()
        if self._console is None:
            raise StateError("this microVM's console was given to somebody else")
        return self._console

    @property
    def config(self) -> VmConfig:
        """The configuration, as GET /vm/config gives it."""
        config: VmConfig = self._order("get_config")
        return config

    @property
    def balloon(self) -> BalloonControl:
        """The balloon: its size, statistics and hints. Each asks, and says so where there is none."""
        return BalloonControl(self._order)

    @property
    def metadata(self) -> Any:
        """The document that the guest reads from its metadata service. Assigning replaces it.

        ConfigError for one that is too large, and when the guest runs without a metadata service.
        """
        return self._order("get_mmds")

    @metadata.setter
    def metadata(self, document: Any) -> None:
        self._order("put_mmds", document_of(document))

    def metrics(self) -> dict[str, Any]:
        """Counters of the devices and vCPUs since the start."""
        with self._turn():
            if self._controller.machine is None:
                raise StateError("the microVM is not running")
            return dict(self._machine().metrics())

    # -- who may call what, when ---------------------------------------------------------------------------------

    def _order(self, name: str, resource: Any = None, *, waits: bool = False) -> Any:
        """Execute a command in this thread's turn."""
        with self._turn(waits=waits):
            if NOT_STARTED not in ALLOWED[name]:
                self._running()
            return self._controller.execute(Command(name, resource))

    @contextmanager
    def _turn(self, *, waits: bool = False) -> Iterator[None]:
        """This thread's turn. waits: what is done in it waits for the microVM's own threads."""
        self._check_owner()
        if waits:
            self._check_waiter()
        if not self._lock.acquire(blocking=not self.runs(threading.get_ident())):
            raise StateError(
                "another thread is giving this microVM an order, for which the microVM's own thread cannot wait"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _check_owner(self) -> None:
        if self._pid != os.getpid():
            raise StateError(
                f"this microVM belongs to process {self._pid}, of which this one ({os.getpid()}) is a fork: "
                "make one here, or ask that process"
            )

    def _check_waiter(self) -> None:
        if self.runs(threading.get_ident()):
            raise StateError(
                "this is one of the microVM's own threads, which cannot wait for itself: call from another thread"
            )

    def _machine(self) -> Machine | RemoteMachine:
        """The machine that was started, ended or not."""
        if self._started is None:
            raise StateError("the microVM is not running: it has not been started")
        return self._started

    def _running(self) -> Machine | RemoteMachine:
        """The machine, if its guest has not ended; StateError says how it did."""
        if self._started is not None and (status := self._started.exit_status()) is not None:
            raise StateError(f"the microVM has stopped: {status.message}")
        return self._machine()


def _warn(sentence: str) -> None:
    # At the line that called `wait`.
    warnings.warn(sentence, RuntimeWarning, stacklevel=5)


_STOPPED = ExitStatus("stopped", "the microVM was stopped", 0)


def _unless_failed(status: ExitStatus) -> ExitStatus:
    if status.exit_code:
        raise GuestError(status.message)
    return status


def _end_of(machine: Machine | RemoteMachine) -> CrackleError | None:
    """Why the guest ended, as the error for who still expects something of it."""
    status = machine.exit_status()
    if status is None:
        return None
    if status.reason == "stopped":
        return StateError("the microVM has been stopped")
    if status.exit_code:
        return GuestError(status.message)
    return CrackleError(f"the guest ended: {status.message}")


def _saved_files(state_path: str, request: SnapshotLoad) -> Iterator[str]:
    """Of the disks and the persistent memory that a snapshot has."""
    config = read(state_path).config
    return files_of(config.drives, config.pmem, request)
