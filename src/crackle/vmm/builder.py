"""From a configuration to a machine that is ready to start.

`build` takes a `Shell` and adds the rest: devices, kernel, tables, registers. Whatever fails, everything made so far is
given back.
"""

from __future__ import annotations

import os

from crackle.arch import platform
from crackle.errors import ConfigError, os_reason
from crackle.memory import GuestMemory, huge_pages_missing
from crackle.vmm.devices import configured, is_read_only, kind_of_drive
from crackle.vmm.files import BootFile
from crackle.vmm.machine import BuildOptions, Machine
from crackle.vmm.preload import preload
from crackle.vmm.shell import Shell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from crackle.arch import LoadedKernel
    from crackle.schema.config import VmConfig
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
    assert config.machine_config is not None, "the controller fills it in"
    wanted = (config.machine_config, config.shares_memory)
    if shell is not None and (shell.config, shell.shared) != wanted:
        shell.abandon()
        shell = None
    shell = shell or Shell(*wanted)
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
    try:
        _furnish(machine, config, options, held or {})
    except BaseException:
        machine.stop()
        raise
    return machine


def _furnish(
    machine: Machine, config: VmConfig, options: BuildOptions, held: Mapping[tuple[str, str], Held]
) -> None:
    """Add the devices and the kernel."""
    if options.logger is not None and (why := huge_pages_missing(machine.memory.backing)):
        options.logger.warning(f"Guest memory gets no transparent huge pages: {why}.")
    machine.add_board(_console_output(machine, config, options))
    for kind, identifier, resource in configured(config):
        machine.add(kind, identifier, resource, held.get((kind, identifier)))
    root = next((drive for drive in config.drives if drive.is_root_device), None)
    read_only = root is not None and is_read_only(machine.devices[kind_of_drive(root), root.drive_id])
    for index, custom in enumerate(options.devices):
        machine.add_custom(f"{type(custom).__name__.lower()}{index}", custom)
    kernel, initrd = _load(machine.memory, config, held)
    cmdline = platform.build_cmdline(
        config.boot_source.boot_args,
        root=root is not None,
        partuuid=None if root is None else root.partuuid,
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


def _console_output(machine: Machine, config: VmConfig, options: BuildOptions) -> int:
    """The descriptor that takes the guest's output: the file or named pipe configured, or what the front end gave."""
    serial: Any = config.serial
    path = getattr(serial, "serial_out_path", None)
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
