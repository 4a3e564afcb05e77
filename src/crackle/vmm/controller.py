"""The one controller of a microVM: commands in, results out, whoever asks.

It owns the configuration, the lifecycle (*not started -> running <-> paused -> stopped*, as the table in
:mod:`crackle.vmm.commands` says) and, once started, the machine. A command that fails changes nothing.
"""

from __future__ import annotations

import os
import time

import msgspec

from crackle.errors import ConfigError, CrackleError, os_reason
from crackle.schema.boot import BootSource
from crackle.schema.config import VmConfig
from crackle.schema.instance import InstanceInfo, Version
from crackle.schema.machine import default_machine_config, updated
from crackle.telemetry.logger import DEFAULT_INSTANCE_ID, Logger
from crackle.telemetry.metrics import Metrics
from crackle.version import VERSION
from crackle.vmm.commands import NOT_STARTED, PAUSED, RUNNING, STOPPED, Command, check_state, check_supported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    from crackle.schema import (
        Drive,
        DriveUpdate,
        LoggerConfig,
        MachineConfig,
        MachineConfigUpdate,
        MetricsConfig,
        Serial,
    )

    class Shell(Protocol):
        """The part of a machine that needs only the machine configuration, being made ahead of time."""

        def close(self) -> None: ...
        def abandon(self) -> None: ...

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
        def exit_status(self) -> ExitStatus | None: ...
        def start(self) -> None: ...
        def pause(self) -> None: ...
        def resume(self) -> None: ...
        def send_ctrl_alt_del(self) -> None: ...
        def update_drive(self, drive_id: str, path: str) -> None: ...
        def metrics(self) -> Mapping[str, Mapping[str, Any]]: ...
        def stop(self) -> None: ...

    Build = Callable[[VmConfig, "Shell | None"], "Machine"]
    Prepare = Callable[[MachineConfig], "Shell | None"]

APP_NAME = "Crackle"

# The kernel command line's room, its final NUL included (Documentation/arch/x86/boot.rst, cmdline_size).
CMDLINE_MAX_SIZE = 2048


class Controller:
    """Executes commands on one microVM. Not thread-safe: one thread gives all commands.

    ``build`` makes the machine out of the configuration when it starts. ``prepare``, if given, makes ahead of
    time what needs only the machine configuration; it is called with the first configuration command and
    again when the machine configuration changes. What it returns goes to ``build``, or is abandoned when it no
    longer fits. ``shell`` is what was made for the default machine already.
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
    ) -> None:
        self.instance_id = instance_id
        self.logger = Logger(instance_id) if logger is None else logger
        self.metrics = Metrics() if metrics is None else metrics
        self.config = VmConfig(
            drives=[], boot_source=BootSource(kernel_image_path=""), machine_config=default_machine_config()
        )
        self.state = NOT_STARTED
        self.machine: Machine | None = None
        self.on_start = on_start
        self._build = build
        self._prepare = prepare
        self._shell = shell
        self._shell_for = None if shell is None else self.config.machine_config

    def execute(self, command: Command) -> Any:
        """The command's result, or None if it has none.

        Raises StateError if it is not allowed now, ConfigError if what it asks for cannot be honoured, and
        another CrackleError if carrying it out failed; the message is the API's answer.
        """
        check_state(command.name, self.state)
        check_supported(command)
        result = getattr(self, f"_{command.name}")(*(() if command.resource is None else (command.resource,)))
        if command.name in _CONFIGURES:
            self._prepare_shell()
        return result

    def configure(self, config: VmConfig) -> None:
        """Give every section of ``config`` as the command it stands for. Raises as :meth:`execute` does."""
        for command in commands_of(config):
            self.execute(command)

    # Answers

    def _get_instance(self) -> InstanceInfo:
        return InstanceInfo(self.instance_id, self.state, VERSION, APP_NAME)  # type: ignore[arg-type]

    def _get_version(self) -> Version:
        return Version(VERSION)

    def _get_machine(self) -> MachineConfig | None:
        return self.config.machine_config

    def _get_config(self) -> VmConfig:
        # Host-side outputs are not part of what the guest is made of, and the API does not report them.
        shown: VmConfig = msgspec.structs.replace(
            self.config, logger=None, metrics=None, serial=msgspec.UNSET
        )
        return shown

    # Configuration

    def _put_machine(self, update: MachineConfig | MachineConfigUpdate) -> None:
        assert self.config.machine_config is not None
        with _context("Machine config error"):
            self.config.machine_config = updated(self.config.machine_config, update)

    _patch_machine = _put_machine

    def _put_boot_source(self, source: BootSource) -> None:
        with _context("Boot source error"):
            _check_opens(source.kernel_image_path, "The kernel file cannot be opened")
            if source.initrd_path is not None:
                _check_opens(source.initrd_path, "The initrd file cannot be opened")
            if source.boot_args is not None:
                _check_boot_args(source.boot_args)
        self.config.boot_source = source

    def _put_drive(self, drive: Drive) -> None:
        drives = self.config.drives
        with _context("Drive config error"):
            at = next((i for i, other in enumerate(drives) if other.drive_id == drive.drive_id), None)
            if drive.is_root_device and drives and drives[0].is_root_device and at != 0:
                raise ConfigError(
                    f"A root block device already exists! It is {drives[0].drive_id!r}; "
                    f"{drive.drive_id!r} cannot be another."
                )
            if drive.path_on_host is None:
                raise ConfigError(
                    "Unable to create the virtio block device: Invalid block config. path_on_host is missing."
                )
            read_only = bool(drive.is_read_only)
            _check_backing_file("Unable to create the virtio block device", drive.path_on_host, read_only)
        complete: Drive = msgspec.structs.replace(
            drive, is_read_only=read_only, io_engine="Sync", rate_limiter=None
        )
        if at is not None:
            del drives[at]
        # The root device comes first: the guest's /dev/vda is the first device.
        drives.insert(0 if drive.is_root_device else len(drives) if at is None else at, complete)

    def _put_logger(self, config: LoggerConfig) -> None:
        with _context("Logger error"):
            self.logger.configure(config)
        self.config.logger = config

    def _put_metrics(self, config: MetricsConfig) -> None:
        with _context("Metrics error"):
            self.metrics.configure(config, self.instance_id)
        self.config.metrics = config

    def _put_serial(self, serial: Serial) -> None:
        self.config.serial = serial

    # Life

    def _start(self) -> None:
        with _context("Start microvm error"):
            if not self.config.boot_source.kernel_image_path:
                raise ConfigError(
                    "Cannot start microvm without kernel configuration. Give a boot source first."
                )
            shell, self._shell, self._shell_for = self._shell, None, None
            machine = self._build(self.config, shell)
            try:
                machine.start()
            except BaseException:
                machine.stop()
                raise
        self.machine = machine
        self.state = RUNNING
        self.metrics.sources.append(machine.metrics)
        if self.on_start is not None:
            self.on_start(machine)

    def _pause(self) -> None:
        if self.state == RUNNING:
            self._timed("pause", self._running_machine().pause)
        self.state = PAUSED

    def _resume(self) -> None:
        if self.state == PAUSED:
            self._timed("resume", self._running_machine().resume)
        self.state = RUNNING

    def _send_ctrl_alt_del(self) -> None:
        self._running_machine().send_ctrl_alt_del()

    def _flush_metrics(self) -> None:
        self.metrics.counters["logger"]["missed_log_count"] = self.logger.lost
        with _context("Internal VMM error"):
            self.metrics.flush()

    def _patch_drive(self, update: DriveUpdate) -> None:
        with _context("Drive config error: Unable to patch the block device"):
            drive = next((d for d in self.config.drives if d.drive_id == update.drive_id), None)
            if drive is None:
                raise ConfigError(
                    f"There is no drive {update.drive_id!r}. Please verify the request arguments."
                )
            if update.path_on_host is None:
                raise ConfigError("There is nothing to change. Please verify the request arguments.")
            _check_backing_file("Block", update.path_on_host, bool(drive.is_read_only))
            self._running_machine().update_drive(update.drive_id, update.path_on_host)
        drive.path_on_host = update.path_on_host

    def stop(self) -> None:
        """End the microVM, whatever its state, and let go of everything it holds; idempotent."""
        self.state = STOPPED
        machine, self.machine = self.machine, None
        shell, self._shell, self._shell_for = self._shell, None, None
        if shell is not None:
            shell.close()
        if machine is not None:
            # What it counted stays to be told when it is gone.
            last = machine.metrics()
            self.metrics.sources[:] = [lambda: last]
            machine.stop()

    def _running_machine(self) -> Machine:
        assert self.machine is not None, "a started microVM has a machine"
        return self.machine

    def _timed(self, what: str, call: Callable[[], None]) -> None:
        begin = time.monotonic_ns()
        call()
        elapsed_us = (time.monotonic_ns() - begin) // 1000
        self.metrics.counters["latencies_us"][f"vmm_{what}_vm"] = elapsed_us
        self.logger.info(f"{what.capitalize()}d the microVM in {elapsed_us} us.")

    # Making ready ahead of time

    def _prepare_shell(self) -> None:
        if self._prepare is None or self._shell_for == self.config.machine_config:
            return
        if self._shell is not None:
            self._shell.abandon()
            self._shell = None
        assert self.config.machine_config is not None
        self._shell_for = self.config.machine_config
        try:
            self._shell = self._prepare(self.config.machine_config)
        except Exception as error:
            # What cannot be made ahead of time fails again, with its reason, when the microVM starts.
            self.logger.debug(f"Nothing was made ahead of time: {error}")


_CONFIGURES = frozenset(("put_machine", "patch_machine", "put_boot_source", "put_drive"))


class _context:  # noqa: N801 - reads as a statement
    """Puts words in front of the message of a Crackle error that passes through."""

    __slots__ = ("_words",)

    def __init__(self, words: str) -> None:
        self._words = words

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, CrackleError):
            error.args = (f"{self._words}: {error}",)


def commands_of(config: VmConfig) -> list[Command]:
    """The commands that a configuration file stands for, outputs first so that the others are logged."""
    sections: list[tuple[str, Any]] = [
        ("put_logger", config.logger),
        ("put_metrics", config.metrics),
        ("put_machine", config.machine_config),
        ("put_cpu_config", config.cpu_config),
        ("put_boot_source", config.boot_source),
        *(("put_drive", drive) for drive in config.drives),
        *(("put_network", interface) for interface in config.network_interfaces),
        ("put_vsock", config.vsock),
        ("put_balloon", config.balloon),
        ("put_mmds_config", config.mmds_config),
        ("put_entropy", config.entropy),
        *(("put_pmem", device) for device in config.pmem),
        ("put_serial", config.serial),
        ("put_memory_hotplug", config.memory_hotplug),
    ]
    return [
        Command(name, section)
        for name, section in sections
        if section is not None and section is not msgspec.UNSET
    ]


def _check_opens(path: str, problem: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{problem}: {_reason(error)}: {path}") from None
    os.close(fd)


def _check_backing_file(problem: str, path: str, read_only: bool) -> None:
    flags = os.O_RDONLY if read_only else os.O_RDWR
    try:
        os.close(os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK))
        if os.path.isdir(path):
            raise IsADirectoryError(21, "Is a directory")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{problem}: Virtio backend error: Error manipulating the backing file: {_reason(error)} {path}"
        ) from None


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
