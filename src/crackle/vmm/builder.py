"""From a configuration to a machine that is ready to start.

`Shell` is the part that needs only the machine configuration: memory and its slots, interrupt controllers, timer,
vCPUs. Making it takes milliseconds, nearly all of them KVM waiting for grace periods, so it is made on a helper thread
before it is asked for. `build` adds the rest: kernel, devices, tables, registers. Whatever fails, everything made so
far is given back.
"""

from __future__ import annotations

import os
from _thread import allocate_lock, start_new_thread

import msgspec

from crackle.arch import (
    LoadedKernel,
    build_cmdline,
    configure_system,
    enter_kernel,
    layout,
    load_initrd,
    load_kernel,
    memory_layout,
    prepare_vcpu,
)
from crackle.errors import ConfigError
from crackle.kvm import MEM_LOG_DIRTY_PAGES, Kvm, Vcpu, Vm
from crackle.memory import GuestMemory
from crackle.vmm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from crackle.schema.config import VmConfig
    from crackle.schema.drive import Drive
    from crackle.schema.machine import MachineConfig
    from crackle.telemetry.logger import Logger

_BACKINGS = {"None": "anonymous", "Transparent": "transparent", "2M": "hugepages"}


class BuildOptions(msgspec.Struct, kw_only=True):
    """What a front end decides, and no API resource says.

    console_in, console_out: descriptors of the serial console, -1 for none; the machine does not close them.
    profile: also measure how long exits take to handle.
    """

    instance_id: str = "anonymous-instance"
    boot_timer: bool = False
    logger: Logger | None = None
    console_in: int = 0
    console_out: int = 1
    profile: bool = False


class Parts(msgspec.Struct):
    """What a shell has made; `close` gives it all back, in the order in which things depend on each other."""

    memory: GuestMemory | None = None
    kvm: Kvm | None = None
    vm: Vm | None = None
    vcpus: list[Vcpu] = msgspec.field(default_factory=list)

    def close(self) -> None:
        """Idempotent."""
        for vcpu in self.vcpus:
            vcpu.close()
        for part in (self.vm, self.kvm, self.memory):
            if part is not None:
                part.close()


class Shell:
    """A virtual machine without devices or kernel, being made on a thread of its own.

    `take` waits for that thread and hands the parts over; `close` waits too and gives them back; `abandon` gives
    them back in the background. After any of them the shell owns nothing.
    """

    def __init__(self, config: MachineConfig) -> None:
        self.config = config
        self._parts = Parts()
        self._error: BaseException | None = None
        self._made = allocate_lock()
        self._made.acquire()
        start_new_thread(self._run, ())

    def _run(self) -> None:
        try:
            _make(self.config, self._parts)
        except BaseException as error:
            self._error = error
        finally:
            self._made.release()

    def take(self) -> Parts:
        """The finished parts, which the caller now owns. Raises what making them raised."""
        parts = self._release()
        if self._error is not None:
            parts.close()
            raise self._error
        return parts

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._release().close()

    def abandon(self) -> None:
        """Give everything back in the background: closing a VM takes as long as making one."""
        start_new_thread(self.close, ())

    def _release(self) -> Parts:
        with self._made:
            parts, self._parts = self._parts, Parts()
        return parts


def prepare(config: MachineConfig) -> Shell:
    """Start making the shell of a machine with `config`."""
    return Shell(config)


def _make(config: MachineConfig, parts: Parts) -> None:
    backing = _BACKINGS[config.huge_pages]
    parts.memory = memory = GuestMemory(memory_layout(config.mem_size_mib << 20), backing=backing)
    parts.kvm = kvm = Kvm()
    missing = kvm.missing()
    if missing:
        raise ConfigError(f"this host's KVM lacks {', '.join(missing)}; `crackle doctor` tells more")
    parts.vm = vm = kvm.create_vm()
    vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP_ADDRESS)
    vm.set_tss_addr(layout.KVM_TSS_ADDRESS)
    vm.create_irqchip()
    vm.create_pit2()
    for index in range(config.vcpu_count):
        parts.vcpus.append(vm.create_vcpu(index))
    cpuid, msrs = kvm.supported_cpuid(), frozenset(kvm.msr_index_list())
    for index, vcpu in enumerate(parts.vcpus):
        prepare_vcpu(
            vcpu,
            index=index,
            count=config.vcpu_count,
            smt=config.smt,
            supported_cpuid=cpuid,
            supported_msrs=msrs,
        )
    memory.track_dirty(config.track_dirty_pages)
    flags = MEM_LOG_DIRTY_PAGES if config.track_dirty_pages else 0
    for slot, region in enumerate(memory.regions):
        vm.set_user_memory_region(slot, region.gpa, region.size, region.hva, flags)


def build(config: VmConfig, shell: Shell | None, options: BuildOptions) -> Machine:
    """A machine, its vCPUs ready to run the kernel's first instruction. Takes over `shell`, if there is one.

    ConfigError or KvmError when it cannot be made.
    """
    assert config.machine_config is not None, "the controller fills it in"
    if shell is not None and shell.config != config.machine_config:
        shell.abandon()
        shell = None
    parts = (shell or Shell(config.machine_config)).take()
    machine = Machine(parts, options)
    try:
        _furnish(machine, config, options)
    except BaseException:
        machine.stop()
        raise
    return machine


def _furnish(machine: Machine, config: VmConfig, options: BuildOptions) -> None:
    """Add the devices and the kernel."""
    machine.add_legacy_devices(_console_output(machine, config, options))
    root: Drive | None = None
    for drive in config.drives:
        machine.add_drive(drive)
        if drive.is_root_device:
            root = drive
    kernel, initrd = _load(machine.memory, config)
    cmdline = build_cmdline(
        config.boot_source.boot_args,
        root=root is not None,
        partuuid=None if root is None else root.partuuid,
        read_only=root is not None and bool(root.is_read_only),
        devices=machine.device_infos,
    )
    configure_system(
        machine.memory,
        kernel=kernel,
        cmdline=cmdline,
        initrd=initrd,
        vcpu_count=len(machine.vcpus),
        devices=machine.device_infos,
        sleep_port=machine.sleep_port,
    )
    enter_kernel(machine.vcpus[0], kernel)


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
        raise ConfigError(f"cannot open the serial output {path}: {error.strerror}") from None


def _load(memory: GuestMemory, config: VmConfig) -> tuple[LoadedKernel, tuple[int, int] | None]:
    source = config.boot_source
    fd = _open(source.kernel_image_path, "kernel")
    try:
        kernel = load_kernel(memory, fd)
    finally:
        os.close(fd)
    if source.initrd_path is None:
        return kernel, None
    fd = _open(source.initrd_path, "initrd")
    try:
        return kernel, load_initrd(memory, fd, kernel)
    finally:
        os.close(fd)


def _open(path: str, what: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot open the {what} {path}: {error.strerror}") from None
