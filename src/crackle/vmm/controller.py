"""The one controller of a microVM: commands in, results out, whoever asks.

It owns the configuration, the lifecycle (*not started -> running <-> paused -> stopped*, as the table in
:mod:`crackle.vmm.commands` says) and, once started, the machine. A command that fails changes nothing.
"""

from __future__ import annotations

import time

import msgspec

from crackle.errors import ConfigError, StateError, TooLargeError, context
from crackle.schema.boot import BootSource
from crackle.schema.config import VmConfig
from crackle.schema.instance import InstanceInfo, Version
from crackle.schema.machine import default_machine_config
from crackle.telemetry.logger import DEFAULT_INSTANCE_ID, Logger
from crackle.telemetry.metrics import Metrics
from crackle.version import FIRECRACKER_VERSION, VERSION
from crackle.vmm.commands import (
    NOT_STARTED,
    PAUSED,
    RUNNING,
    STOPPED,
    Command,
    absent,
    check_state,
    check_supported,
)
from crackle.vmm.configuration import Configuration, merge
from crackle.vmm.devices import ASKS, KINDS, PATCHES, RESOURCES, kind_of_drive
from crackle.vmm.files import read_template
from crackle.vmm.preload import preload_coming

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, NoReturn, Protocol

    from crackle.memory import GuestMemory
    from crackle.mmds.store import Store
    from crackle.runtime.threads import Worker
    from crackle.schema import (
        Balloon,
        Drive,
        DriveUpdate,
        Fork,
        LoggerConfig,
        MachineConfig,
        MetricsConfig,
        MmdsConfig,
        NetworkInterface,
        NetworkInterfaceUpdate,
        Pmem,
        PmemUpdate,
        SnapshotCreate,
        SnapshotLoad,
    )
    from crackle.schema.fork import Clone, Forked
    from crackle.snapshot.fork import Heritage, Line
    from crackle.snapshot.load import Loaded, Template
    from crackle.snapshot.plan import Plan
    from crackle.snapshot.state import MachineState
    from crackle.vmm.devices import Held

    class Shell(Protocol):
        """The part of a machine that needs only the machine configuration, being made ahead of time."""

        def close(self) -> None: ...
        def disown(self) -> None: ...

    class ExitStatus(Protocol):
        """Why a machine ended, and the process's exit status that follows."""

        @property
        def reason(self) -> str: ...
        @property
        def message(self) -> str: ...
        @property
        def exit_code(self) -> int: ...

    class Machine(Protocol):
        """A built machine, as far as the controller is concerned.

        ``exit_fd`` is readable once it has ended.
        """

        @property
        def exit_fd(self) -> int: ...
        @property
        def state(self) -> str: ...
        @property
        def memory(self) -> GuestMemory: ...
        def exit_status(self) -> ExitStatus | None: ...
        def start(self) -> None: ...
        def pause(self) -> None: ...
        def resume(self) -> None: ...
        def stand_by(self) -> None: ...
        def at_rest(self, call: Callable[[Sequence[Worker]], object]) -> None: ...
        def send_ctrl_alt_del(self) -> None: ...
        def press_power_button(self) -> None: ...
        def serve_metadata(self, config: MmdsConfig, store: Store) -> None: ...
        def update(self, kind: str, identifier: str, resource: Any, held: Held | None = None) -> None: ...
        def attach(self, kind: str, identifier: str, resource: Any, held: Held | None = None) -> None: ...
        def detach(self, kind: str, identifier: str) -> None: ...
        def ask(self, kind: str, identifier: str, call: Callable[[Any, Any], Any], resource: Any) -> Any: ...
        def metrics(self) -> Mapping[str, Mapping[str, Any]]: ...
        def save(self, *, durable: bool = True) -> MachineState: ...
        def copy_overlay(self, drive: str, path: str) -> None: ...
        def check_forkable(self) -> None: ...
        def fork(self) -> int: ...
        def disk_below(self, drive_id: str) -> tuple[str | None, str | None] | None: ...
        def note_dirty(self, bitmaps: list[bytes] | None) -> None: ...
        def dirty_pages(self) -> list[bytes] | None: ...
        def forget_dirty(self) -> None: ...
        def stop(self) -> None: ...
        def disown(self) -> None: ...

    Build = Callable[[VmConfig, "Shell | None", Mapping[tuple[str, str], Held]], "Machine"]

    class Cloner(Protocol):
        """What a forked process does to be a clone."""

        @property
        def api_sock(self) -> str: ...
        def become(self, heritage: Heritage, index: int, clone: Clone, line: Line) -> NoReturn: ...

    Restore = Callable[[Loaded | Heritage, "Shell | None", Mapping[tuple[str, str], Held]], "Machine"]
    Prepare = Callable[[MachineConfig, bool, Any], "Shell | None"]

APP_NAME = "Crackle"

# The metrics of how long something took, and what it is called in the log.
LATENCIES = {
    "pause_vm": "pause vm",
    "resume_vm": "resume vm",
    "load_snapshot": "load snapshot",
    "full_create_snapshot": "create full snapshot",
    "diff_create_snapshot": "create diff snapshot",
}

# Bytes of metadata, as compact JSON.
DEFAULT_METADATA_LIMIT = 51200


class Controller:
    """Executes commands on one microVM. Not thread-safe: one thread gives all commands.

    ``build`` makes the machine when it starts, out of the configuration and of what is held for its devices.
    ``prepare``, if given, makes ahead of time what needs only the machine configuration; it is called with the first
    configuration command and again when the machine configuration changes, or whether guest memory is shared, with what
    it has made before. What it returns goes to ``build``, whether it fits or not. ``shell`` is what was made already,
    for the default machine. ``metadata_limit`` is in bytes. ``lock_drives``: lock the files of drives that do not say.
    ``restore`` makes a machine, paused, out of a snapshot. ``template``: what a load finds, if that is known already.
    ``cloner`` makes what a clone is to do, when there is to be one.
    """

    def __init__(
        self,
        build: Build,
        prepare: Prepare | None = None,
        *,
        instance_id: str = DEFAULT_INSTANCE_ID,
        logger: Logger | None = None,
        metrics: Metrics | None = None,
        on_start: Callable[[Machine], None] | None = None,
        shell: Shell | None = None,
        metadata_limit: int = DEFAULT_METADATA_LIMIT,
        lock_drives: bool = True,
        restore: Restore | None = None,
        template: Template | None = None,
        cloner: Callable[[], Cloner] | None = None,
    ) -> None:
        self.instance_id = instance_id
        self.logger = Logger(instance_id) if logger is None else logger
        self.metrics = Metrics() if metrics is None else metrics
        self._lock_drives = lock_drives
        self._configuration = self._unconfigured(BootSource(kernel_image_path=""))
        # Whether anything of it is part of what the guest is made of.
        self._configured = False
        self._stopped = False
        self.machine: Machine | None = None
        self.on_start = on_start
        self.metadata_limit = metadata_limit
        self._store: Store | None = None
        self._build = build
        self._restore = restore
        self._template = template
        self.cloner = cloner
        # Who wants to know that a snapshot could not be restored, besides the one who asked.
        self.on_failed_load: Callable[[], None] | None = None
        self._prepare = prepare
        self._shell = shell
        self._shell_for = None if shell is None else (self.config.machine_config, False)

    def execute(self, command: Command) -> Any:
        """The command's result, or None if it has none.

        Raises StateError if it is not allowed now, ConfigError if what it asks for cannot be honoured, and
        another CrackleError if carrying it out failed; the message is the API's answer.
        """
        check_state(command.name, self.state)
        check_supported(command)
        if self.state != NOT_STARTED or not self._configuration.take(command):
            return self._carry_out(command)
        self._configured |= command.name != "put_serial"
        self._prepare_shell()
        return None

    def _carry_out(self, command: Command) -> Any:
        own = getattr(self, f"_{command.name}", None)
        if command.name in ASKS:
            return self._ask_device(command.name, command.resource)
        if own is None:
            return self._patch_device(PATCHES[command.name], command.resource)
        return own(*(() if command.resource is None else (command.resource,)))

    @property
    def state(self) -> str:
        """Of the machine, once there is one."""
        if self._stopped:
            return STOPPED
        return NOT_STARTED if self.machine is None else self.machine.state

    @property
    def config(self) -> VmConfig:
        """Everything configured so far."""
        return self._configuration.config

    def configure(self, config: VmConfig) -> None:
        """Give every section of ``config`` as the command it stands for. Raises as :meth:`execute` does."""
        for command in commands_of(config):
            self.execute(command)

    # Answers

    def _get_instance(self) -> InstanceInfo:
        return InstanceInfo(self.instance_id, self.state, FIRECRACKER_VERSION, APP_NAME, VERSION)  # type: ignore[arg-type]

    def _get_version(self) -> Version:
        return Version(FIRECRACKER_VERSION, VERSION)

    def _get_machine(self) -> MachineConfig | None:
        return self.config.machine_config

    def _get_config(self) -> VmConfig:
        # Host-side outputs are not part of what the guest is made of, and the API does not report them; nor templates.
        shown: VmConfig = msgspec.structs.replace(
            self.config, logger=None, metrics=None, serial=msgspec.UNSET, cpu_config=None
        )
        return shown

    # Configuration

    def _put_logger(self, config: LoggerConfig) -> None:
        with context("Logger error"):
            self.logger.set(
                config.log_path, config.level, config.show_level, config.show_log_origin, config.module
            )
        self.config.logger = config

    def _put_metrics(self, config: MetricsConfig) -> None:
        extra: dict[str, Any] = {"id": self.instance_id} if config.emit_id else {}
        if config.properties is not None:
            extra["properties"] = config.properties
        with context("Metrics error"):
            self.metrics.configure(config.metrics_path, extra)
        self.config.metrics = config

    # Metadata

    def _metadata(self) -> Store:
        """The metadata document's store, made when it is first asked for; a guest that runs without gets none."""
        if self._store is None:
            if self.state != NOT_STARTED and self.config.mmds_config is None:
                raise ConfigError("The MMDS data store is not initialized.")
            from crackle.mmds.store import Store

            self._store = Store(self.metadata_limit)
        return self._store

    def _get_mmds(self) -> Any:
        with context("MMDS error"):
            return self._metadata().get()

    def _put_mmds(self, document: Any = None) -> None:
        with _metadata_context():
            self._metadata().put(document)

    def _patch_mmds(self, patch: Any = None) -> None:
        with _metadata_context():
            self._metadata().patch(patch)

    # Life

    def _unconfigured(self, boot_source: BootSource) -> Configuration:
        config = VmConfig(drives=[], boot_source=boot_source, machine_config=default_machine_config())
        return Configuration(config, self.logger.warning, lock_drives=self._lock_drives)

    def _start(self) -> None:
        with context("Start microvm error"):
            if not self.config.boot_source.kernel_image_path:
                raise ConfigError(
                    "Cannot start microvm without kernel configuration. Give a boot source first."
                )
            machine = self._build(self.config, self._take_shell(), self._configuration.held)
            self._run(machine, machine.start)
        self._began(machine)

    def _take_shell(self) -> Shell | None:
        shell, self._shell, self._shell_for = self._shell, None, None
        return shell

    def _run(self, machine: Machine, start: Callable[[], None] | None) -> None:
        """Give a machine that has just been made what it lacks, and let it run, if it is to."""
        try:
            if self.config.mmds_config is not None:
                machine.serve_metadata(self.config.mmds_config, self._metadata())
            if start is not None:
                start()
        except BaseException:
            machine.stop()
            raise

    def _began(self, machine: Machine) -> None:
        self.machine = machine
        self._configuration.started()
        self.metrics.sources.append(machine.metrics)
        if self.on_start is not None:
            self.on_start(machine)

    def _pause(self) -> None:
        if self.state == RUNNING:
            self._timed("pause_vm", self._running_machine().pause)

    def _resume(self) -> None:
        if self.state == PAUSED:
            self._timed("resume_vm", self._running_machine().resume)

    def _stand_by(self) -> None:
        self._running_machine().stand_by()

    def _create_snapshot(self, request: SnapshotCreate) -> None:
        from crackle.snapshot.save import save

        with context("Create snapshot error"):
            if self.state != PAUSED:
                raise ConfigError(
                    "Cannot save the microVM state: Operation not allowed: save/restore unavailable while running. "
                    "Pause the microVM first."
                )
            kind = request.snapshot_type.lower()
            self._timed(
                f"{kind}_create_snapshot",
                lambda: save(self._running_machine(), self.config, self.instance_id, request),
            )

    def _load_snapshot(self, request: SnapshotLoad) -> None:
        with context("Load snapshot error"):
            if self._configured:
                raise ConfigError(
                    "Loading a microVM snapshot not allowed after configuring boot-specific resources."
                )
            try:
                with context("Failed to restore from snapshot"):
                    self._timed("load_snapshot", lambda: self._load(request))
            except BaseException:
                if self.on_failed_load is not None:
                    self.on_failed_load()
                raise

    def _load(self, request: SnapshotLoad) -> None:
        from crackle.snapshot.load import Loaded

        self._go_on_from(Loaded(request, self._template), running=request.resume_vm)

    def _go_on_from(self, loaded: Loaded | Heritage, *, running: bool) -> None:
        """Have the machine of a snapshot, or of a parent. Takes `loaded` over; nothing has changed when that fails."""
        assert self._restore is not None, "who allows the command says how"
        before, config = self._configuration, loaded.snapshot.config
        self._configuration = self._unconfigured(config.boot_source)
        try:
            for command in commands_of(config):
                if command.name != "put_boot_source":
                    self._configuration.take(command)
            # These are this process's own, and the snapshot has none.
            for name in ("logger", "metrics", "serial"):
                setattr(self.config, name, getattr(before.config, name))
            loaded.take(self.config)
            machine = self._restore(loaded, self._take_shell(), self._configuration.held)
            self._run(machine, machine.resume if running else None)
        except BaseException:
            self._configuration.close()
            self._configuration = before
            raise
        finally:
            loaded.close()
        before.close()
        self._began(machine)

    def _fork(self, request: Fork) -> Forked:
        with context("Fork error"):
            if self.cloner is None:
                raise ConfigError(
                    "a microVM inside another program cannot be forked. Run it in a process of its own."
                )
            from crackle.snapshot.fork import fork
            from crackle.snapshot.plan import plan

            cloner = self.cloner()
            # As it is before the drives have new layers.
            config = msgspec.msgpack.decode(msgspec.msgpack.encode(self.config), type=VmConfig)
            planned = plan(request.clones, config, cloner.api_sock)
            planned.flush(self.config)
            forked = fork(
                self._running_machine(),
                config,
                self.instance_id,
                planned.clones,
                cloner.become,
                document=None if self._store is None else self._store.get(),
                split=lambda heritage: self._add_layers(planned, heritage),
            )
            planned.flush(self.config, made=True)
        self.logger.info(
            f"Forked {len(planned.clones)} clones; the microVM stood still for {forked.pause_us} us."
        )
        return forked

    def _add_layers(self, plan: Plan, heritage: Heritage) -> None:
        machine = self._running_machine()
        with context("Unable to put an overlay on a drive"):
            for update in plan.layers:
                drive = self._configuration.drive_to_change(update)
                below = machine.disk_below(update.drive_id)
                if below is not None:
                    plan.lie_lower(heritage, update.drive_id, *below)
                else:
                    # The guest stands still: the disk is waited for when it does not.
                    self._configuration.update_drive(drive, update, machine.update, durable=False)

    def inherit(self, heritage: Heritage) -> None:
        """In a clone's process, before anything else: have the parent's machine, paused. Raises as a load does."""
        self._go_on_from(heritage, running=False)
        self._running_machine().note_dirty(heritage.dirty)

    def _send_ctrl_alt_del(self) -> None:
        self._running_machine().send_ctrl_alt_del()

    def _press_power_button(self) -> None:
        self._running_machine().press_power_button()

    def _get_metrics(self) -> Mapping[str, Mapping[str, Any]]:
        if self.machine is None:
            raise StateError("the microVM is not running")
        return self.machine.metrics()

    def _flush_metrics(self) -> None:
        counters = self.metrics.counters["logger"]
        counters["missed_log_count"], counters["rate_limited_log_count"] = (
            self.logger.lost,
            self.logger.throttled,
        )
        with context("Internal VMM error"):
            self.metrics.flush()

    def _put_drive(self, drive: Drive) -> None:
        with context("Drive config error: Unable to attach the block device"):
            self._configuration.check_new_drive(drive)
            preload_coming(drives=[drive])
        self._configuration.put_drive(drive)
        with context("Drive config error: Unable to attach the block device"):
            self._attach(kind_of_drive(drive), drive.drive_id, self.config.drives[-1])

    def _put_network(self, interface: NetworkInterface) -> None:
        with context("Network config error: Unable to attach the net device"):
            self._configuration.check_new_interface(interface)
            preload_coming(interfaces=[interface])
        self._configuration.put_network(interface)
        with context("Network config error: Unable to attach the net device"):
            self._attach("net", interface.iface_id, self.config.network_interfaces[-1])

    def _put_pmem(self, pmem: Pmem) -> None:
        with context("Pmem config error: Unable to attach the pmem device"):
            self._configuration.check_new_pmem(pmem)
            preload_coming(pmem=[pmem])
        self._configuration.put_pmem(pmem)
        with context("Pmem config error: Unable to attach the pmem device"):
            self._attach("pmem", pmem.id, self.config.pmem[-1])

    def _attach(self, kind: str, identifier: str, resource: Drive | NetworkInterface | Pmem) -> None:
        """Have the guest get what has just been configured, or forget it."""
        try:
            held = self._configuration.held.get((kind, identifier))
            self._running_machine().attach(kind, identifier, resource, held)
        except BaseException:
            self._configuration.forget(kind, identifier)
            raise

    def _delete_drive(self, drive_id: str) -> None:
        with context("Drive config error: Unable to detach the block device"):
            drive = self._configuration.drive_to_remove(drive_id)
            kind = kind_of_drive(drive)
            self._running_machine().detach(kind, drive_id)
        self._configuration.forget(kind, drive_id)

    def _delete_network(self, iface_id: str) -> None:
        with context("Network config error: Unable to detach the net device"):
            self._configuration.interface_to_remove(iface_id)
            self._running_machine().detach("net", iface_id)
        self._configuration.forget("net", iface_id)

    def _delete_pmem(self, identifier: str) -> None:
        with context("Pmem config error: Unable to detach the pmem device"):
            self._configuration.pmem_to_remove(identifier)
            self._running_machine().detach("pmem", identifier)
        self._configuration.forget("pmem", identifier)

    def _patch_drive(self, update: DriveUpdate) -> None:
        with context("Drive config error: Unable to patch the block device"):
            drive = self._configuration.drive_to_change(update)
            self._configuration.update_drive(drive, update, self._running_machine().update)

    def _patch_network(self, update: NetworkInterfaceUpdate) -> None:
        with context("Network config error: Unable to update the net device"):
            interface = self._configuration.interface_to_change(update)
            self._running_machine().update("net", update.iface_id, update)
        merge(interface, update)

    def _patch_pmem(self, update: PmemUpdate) -> None:
        with context("Pmem config error: Unable to patch the pmem device"):
            pmem = self._configuration.pmem_to_change(update)
            self._running_machine().update("pmem", pmem.id, update)
        merge(pmem, update)

    def _patch_device(self, name: str, update: Any) -> None:
        """Change a device of a kind that needs no more than its registry says."""
        resource = KINDS[name].resource
        assert resource is not None, "whoever can be changed has been configured"
        with context(resource.words):
            identifier = name if resource.id_field is None else getattr(update, resource.id_field)
            before = resource.find(self.config, identifier)
            self._running_machine().update(name, identifier, update)
        merge(before, update)

    def _ask_device(self, name: str, resource: Any) -> Any:
        """Ask a device what its registry says, of which there is one at most."""
        kind, ask = ASKS[name]
        how = KINDS[kind].resource
        assert how is not None, "whoever can be asked has been configured"
        configured = how.of(self.config)
        if not configured:
            raise absent(name, self.state)
        with context(ask.words):
            result = self._running_machine().ask(kind, kind, ask.call, resource)
        if ask.notes:
            merge(configured[0], resource)
        return result

    def _get_balloon(self) -> Balloon:
        if self.config.balloon is None:
            raise absent("get_balloon", self.state)
        return self.config.balloon

    def stop(self) -> None:
        """End the microVM, whatever its state, and let go of everything it holds; idempotent."""
        self._stopped = True
        machine, self.machine = self.machine, None
        shell, self._shell, self._shell_for = self._shell, None, None
        if shell is not None:
            shell.close()
        if machine is not None:
            # What it counted stays to be told when it is gone.
            last = machine.metrics()
            self.metrics.sources[:] = [lambda: last]
            machine.stop()
        self._configuration.close()

    def disown(self) -> None:
        """In a forked child: close the copies of everything, which is the parent's and goes on there."""
        if self._shell is not None:
            self._shell.disown()
        if self.machine is not None:
            self.machine.disown()
        self._configuration.disown()

    def _running_machine(self) -> Machine:
        assert self.machine is not None, "a started microVM has a machine"
        return self.machine

    def _timed(self, metric: str, call: Callable[[], None]) -> None:
        begin = time.monotonic_ns()
        call()
        elapsed_us = (time.monotonic_ns() - begin) // 1000
        self.metrics.counters["latencies_us"][f"vmm_{metric}"] = elapsed_us
        self.logger.info(f"'{LATENCIES[metric]}' VMM action took {elapsed_us} us.")

    # Making ready ahead of time

    def _prepare_shell(self) -> None:
        assert self.config.machine_config is not None
        wanted = self.config.machine_config, self.config.shares_memory
        if self._prepare is None or self._shell_for == wanted:
            return
        base, self._shell, self._shell_for = self._shell, None, wanted
        try:
            self._shell = self._prepare(*wanted, base)
        except Exception as error:
            if base is not None:
                base.close()
            # What cannot be made ahead of time fails again, with its reason, when the microVM starts.
            self.logger.debug(f"Nothing was made ahead of time: {error}")


class _metadata_context(context):  # noqa: N801 - reads as a statement
    """Says that it is about metadata, and whether there is too much of it."""

    def __init__(self) -> None:
        super().__init__("MMDS error")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, TooLargeError):
            self._words = "MMDS limit exceeded error"
        super().__exit__(kind, error, trace)


def commands_of(config: VmConfig) -> list[Command]:
    """The commands that a configuration file stands for, outputs first so that the others are logged."""
    template = config.cpu_config
    if isinstance(template, str):
        template = read_template(template)
    sections: list[tuple[str, Any]] = [
        ("put_logger", config.logger),
        ("put_metrics", config.metrics),
        ("put_machine", config.machine_config),
        ("put_cpu_config", template),
        ("put_boot_source", config.boot_source),
        *((f"put_{kind.name}", resource) for kind in RESOURCES for resource in kind.of(config)),
        ("put_mmds_config", config.mmds_config),
        ("put_serial", config.serial),
    ]
    return [
        Command(name, section)
        for name, section in sections
        if section is not None and section is not msgspec.UNSET
    ]
