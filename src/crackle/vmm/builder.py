"""From a configuration, or from what was saved of a machine, to one that is ready to run.

`build` takes a `Shell` and adds the rest: devices, kernel, tables, registers. `restore` adds what a snapshot holds
instead. Whatever fails, everything made so far is given back.
"""

from __future__ import annotations

import os

from crackle.arch import platform
from crackle.errors import ConfigError, os_reason
from crackle.memory import GuestMemory, huge_pages_missing
from crackle.vmm.devices import configured, is_read_only, kind_of_drive
from crackle.vmm.files import BootFile
from crackle.vmm.machine import BuildOptions, Machine, untold
from crackle.vmm.preload import preload
from crackle.vmm.shell import Shell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from crackle.arch import LoadedKernel
    from crackle.schema.config import VmConfig
    from crackle.schema.drive import Drive
    from crackle.schema.serial import Serial
    from crackle.snapshot.fork import Heritage
    from crackle.snapshot.load import Loaded
    from crackle.snapshot.state import Snapshot
    from crackle.virtio.custom.base import VirtioDevice as CustomDevice
    from crackle.vmm.devices import Held


def build(
    config: VmConfig,
    shell: Shell | None,
    options: BuildOptions,
    held: Mapping[tuple[str, str], Held] | None = None,
) -> Machine:
    """A machine, its vCPUs ready to run the kernel's first instruction. Takes over `shell`, if there is one.

    held: what is open for devices already, by kind and identifier; what is missing is opened.
    ConfigError or KvmError when it cannot be made.
    """
    machine = _bare(config, shell, options)
    try:
        _use_template(machine, config)
        _furnish(machine, config, options, held or {})
    except BaseException:
        machine.stop()
        raise
    return machine


def restore(
    loaded: Loaded | Heritage,
    shell: Shell | None,
    options: BuildOptions,
    held: Mapping[tuple[str, str], Held] | None = None,
) -> Machine:
    """The machine that was saved, or forked, paused where it was then. Takes over `shell`, if any; else as `build`."""
    snapshot = loaded.snapshot
    machine = _bare(snapshot.config, shell, options)
    try:
        _check_fits(machine, snapshot, options)
        with loaded.fill(machine.memory, untold if options.logger is None else options.logger.error):
            _furnish_as_saved(machine, snapshot, options, held or {})
            machine.restore(snapshot.machine, realtime=loaded.clock_realtime)
    except ValueError as error:
        machine.stop()
        raise ConfigError(f"its state does not fit together: {error}") from None
    except BaseException:
        machine.stop()
        raise
    return machine


def _bare(config: VmConfig, shell: Shell | None, options: BuildOptions) -> Machine:
    """The machine for `config`, without any device."""
    assert config.machine_config is not None, "the controller fills it in"
    wanted = (config.machine_config, config.shares_memory)
    if shell is None or (shell.config, shell.shared) != wanted:
        shell = Shell(*wanted, base=shell)
    try:
        # While KVM makes the rest ready, on the shell's thread.
        terminal = options.console_in >= 0 and os.isatty(options.console_in)
        preload(config, custom=bool(options.devices), terminal=terminal)
    except BaseException:
        shell.abandon()
        raise
    parts = shell.take()
    try:
        machine = Machine(parts, options)
    except BaseException:
        parts.close()
        raise
    if options.logger is not None and (why := huge_pages_missing(machine.memory.backing)):
        options.logger.warning(f"Guest memory gets no transparent huge pages: {why}.")
    return machine


def _use_template(machine: Machine, config: VmConfig) -> None:
    """Which of the two is configured: each takes the place of the other."""
    described, custom = config.machine_config, config.cpu_config
    assert described is not None, "the controller fills it in"
    assert not isinstance(custom, str), "a file has been read where its name was given"
    name, kvm = described.cpu_template or None, machine.parts.kvm
    if name is not None or custom is not None:
        assert kvm is not None
        platform.use_template(kvm, machine.vcpus, smt=described.smt, name=name, custom=custom)


def _furnish(
    machine: Machine, config: VmConfig, options: BuildOptions, held: Mapping[tuple[str, str], Held]
) -> None:
    """Add the devices and the kernel."""
    _add_board(machine, config, options)
    for kind, identifier, resource in configured(config):
        machine.add(kind, identifier, resource, held.get((kind, identifier)))
    root = next((drive for drive in config.drives if drive.is_root_device), None)
    if root is not None:
        read_only = is_read_only(machine.devices[kind_of_drive(root), root.drive_id])
    else:
        read_only = any(pmem.read_only for pmem in config.pmem if pmem.root_device)
    for index, custom in enumerate(options.devices):
        machine.add_custom(_name_of(index, custom), custom)
    kernel, initrd = _load(machine.memory, config, held)
    cmdline = platform.build_cmdline(
        config.boot_source.boot_args,
        root=_root_of(config, root),
        read_only=read_only,
        devices=machine.plugs.infos,
    )
    platform.describe(
        machine.memory,
        kernel=kernel,
        cmdline=cmdline,
        initrd=initrd,
        vcpu_count=len(machine.vcpus),
        devices=machine.plugs.infos,
    )
    platform.enter_kernel(machine.vcpus[0], kernel)


def _name_of(index: int, custom: CustomDevice) -> str:
    """What a device written in Python is called, the `index`-th of them."""
    return f"{type(custom).__name__.lower()}{index}"


def _check_fits(machine: Machine, snapshot: Snapshot, options: BuildOptions) -> None:
    """ConfigError when what was saved is no machine for this host, or not this machine."""
    state = snapshot.machine
    layout = tuple((region.gpa, region.size) for region in machine.memory.regions)
    if layout != state.memory or len(machine.vcpus) != len(state.vcpus):
        raise ConfigError(
            f"it has {len(state.vcpus)} vCPUs and memory at {_shown(state.memory)}, and its configuration says "
            f"{len(machine.vcpus)} and {_shown(layout)}"
        )
    assert machine.parts.kvm is not None
    for unlike in platform.check_vcpus(machine.parts.kvm, machine.vcpus, state.vcpus):
        if options.logger is not None:
            options.logger.warning(unlike)


def _shown(layout: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{gpa:#x} to {gpa + size - 1:#x}" for gpa, size in layout)


def _furnish_as_saved(
    machine: Machine, snapshot: Snapshot, options: BuildOptions, held: Mapping[tuple[str, str], Held]
) -> None:
    """Add the devices that the guest knows, each in its place."""
    config = snapshot.config
    _add_board(machine, config, options)
    resources = {(kind, identifier): resource for kind, identifier, resource in configured(config)}
    customs = {_name_of(index, custom): custom for index, custom in enumerate(options.devices)}
    for saved in snapshot.machine.devices:
        key = saved.kind, saved.identifier
        if key in resources:
            machine.add(*key, resources.pop(key), held.get(key), saved.transport)
        elif saved.kind == "custom" and saved.identifier in customs:
            machine.add_custom(saved.identifier, customs.pop(saved.identifier), saved.transport)
        else:
            raise ConfigError(
                f"its guest has a {saved.kind} device {saved.identifier!r}, which is not given"
                if saved.kind == "custom"
                else f"its configuration has no {saved.kind} device {saved.identifier!r}, which its guest has"
            )
    if resources or customs:
        names = ", ".join([identifier for _, identifier in resources] + list(customs))
        raise ConfigError(f"its guest does not know these devices: {names}")


def _root_of(config: VmConfig, drive: Drive | None) -> str | None:
    """What the guest's kernel calls its root device, if it is told of one."""
    if drive is not None:
        return f"PARTUUID={drive.partuuid}" if drive.partuuid else "/dev/vda"
    return next((f"/dev/pmem{index}" for index, pmem in enumerate(config.pmem) if pmem.root_device), None)


def _add_board(machine: Machine, config: VmConfig, options: BuildOptions) -> None:
    serial = config.serial or None
    if serial is None:
        machine.add_board(options.console_out, None)
    else:
        machine.add_board(_console_output(machine, serial, options), serial.rate_limiter)


def _console_output(machine: Machine, serial: Serial, options: BuildOptions) -> int:
    """The descriptor that takes the guest's output: the file or named pipe configured, or what the front end gave."""
    path = serial.serial_out_path
    if path is None:
        return options.console_out
    try:
        # Reading too, so that opening a named pipe waits for nobody and writing to it raises no SIGPIPE.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
        return machine.own_fd(os.open(path, flags, 0o600))
    except OSError as error:
        raise ConfigError(f"cannot open the serial output {path}: {os_reason(error)}") from None
    except ValueError as error:
        raise ConfigError(f"cannot open the serial output {path!r}: {os_reason(error)}") from None


def _load(
    memory: GuestMemory, config: VmConfig, held: Mapping[tuple[str, str], Held]
) -> tuple[LoadedKernel, tuple[int, int] | None]:
    source = config.boot_source
    with _BootFile(held, source.kernel_image_path, "kernel") as fd:
        kernel = platform.load_kernel(memory, fd)
    if source.initrd_path is None:
        return kernel, None
    with _BootFile(held, source.initrd_path, "initrd") as fd:
        return kernel, platform.load_initrd(memory, fd, kernel)


class _BootFile:
    """A file that is being loaded: the one that is held, or open for as long; named in what goes wrong."""

    def __init__(self, held: Mapping[tuple[str, str], Held], path: str, what: str) -> None:
        kept: Any = held.get(("boot", what))
        self._kept = kept is not None
        self._file: BootFile = kept if self._kept else BootFile(path, f"The {what} file cannot be opened: ")

    def __enter__(self) -> int:
        return self._file.fd

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not self._kept:
            self._file.close()
        if isinstance(error, ConfigError):
            error.args = (f"{error}: {self._file.path}",)
