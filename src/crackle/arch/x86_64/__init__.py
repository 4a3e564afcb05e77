"""x86_64: what lies between the configured microVM and the kernel's first instruction.

`configure_system` writes everything the guest reads from memory, `prepare_vcpu` and `enter_kernel` set a
vCPU's registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crackle.arch.interface import DeviceInfo
from crackle.arch.x86_64 import acpi, boot, cpuid, layout, mptable, msr, registers
from crackle.arch.x86_64.cmdline import Cmdline
from crackle.arch.x86_64.cmdline import build as build_cmdline
from crackle.arch.x86_64.kernel import PVH, LoadedKernel, load_initrd, load_kernel
from crackle.arch.x86_64.layout import memory_layout
from crackle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from crackle.arch.x86_64.protocols import CpuidEntry, Vcpu
    from crackle.memory import GuestMemory

__all__ = [
    "Cmdline",
    "DeviceInfo",
    "LoadedKernel",
    "build_cmdline",
    "configure_system",
    "enter_kernel",
    "layout",
    "load_initrd",
    "load_kernel",
    "memory_layout",
    "prepare_vcpu",
]


def configure_system(
    memory: GuestMemory,
    *,
    kernel: LoadedKernel,
    cmdline: bytes,
    initrd: tuple[int, int] | None,
    vcpu_count: int,
    devices: Sequence[DeviceInfo],
    power_gsi: int | None = layout.GSI_POWER,
    sleep_port: int | None = None,
    vmgenid: int | None = None,
    vmclock: int | None = None,
    hotplug: int | None = None,
) -> None:
    """Write the command line, boot parameters, MP table, ACPI tables, GDT and page tables to guest memory.

    cmdline: without its NUL. initrd: (guest physical address, bytes). devices: in the order the guest is to
    number them. power_gsi: interrupt that presses the power button, or None. sleep_port: I/O port of a sleep
    control register (the status register is the next port) through which the guest can power off, or None.

    ConfigError for a vCPU count outside 1..32 or a command line longer than the kernel or the layout allows.
    """
    if not 1 <= vcpu_count <= layout.MAX_VCPUS:
        raise ConfigError(f"the number of vCPUs must be between 1 and {layout.MAX_VCPUS}, not {vcpu_count}")
    if len(cmdline) >= layout.CMDLINE_MAX_SIZE:
        limit = layout.CMDLINE_MAX_SIZE - 1
        raise ConfigError(f"kernel command line is too long: {len(cmdline)} characters, at most {limit} fit")
    memory.write(layout.CMDLINE_START, cmdline + b"\0")
    pvh = kernel.protocol == PVH
    if pvh:
        boot.write_start_info(memory, initrd=initrd)
    else:
        boot.write_zero_page(
            memory, setup_header=kernel.setup_header, cmdline_size=len(cmdline) + 1, initrd=initrd
        )
    table = mptable.build(layout.SYSTEM_MEM_START, vcpu_count)
    memory.write(layout.SYSTEM_MEM_START, table)
    acpi.write_tables(
        memory,
        layout.SYSTEM_MEM_START + len(table),
        vcpu_count=vcpu_count,
        devices=devices,
        power_gsi=power_gsi,
        sleep_port=sleep_port,
        vmgenid=vmgenid,
        vmclock=vmclock,
        hotplug=hotplug,
    )
    registers.write_tables(memory, pvh=pvh)
    boot.write_reset_vector(memory)


def prepare_vcpu(
    vcpu: Vcpu,
    *,
    index: int,
    count: int,
    smt: bool,
    supported_cpuid: Sequence[CpuidEntry],
    supported_msrs: Container[int] | None = None,
) -> None:
    """Give vCPU `index` of `count` its CPUID and MSRs, and vCPU 0 its FPU and local APIC: what needs no
    kernel yet.

    supported_cpuid: of KVM_GET_SUPPORTED_CPUID. supported_msrs: of KVM_GET_MSR_INDEX_LIST; None takes all as
    supported.
    """
    # CPUID first: it decides which bits of MSRs and control registers KVM accepts.
    vcpu.set_cpuid2(cpuid.normalise(supported_cpuid, index, count, smt))
    vcpu.set_msrs(msr.boot_msrs(supported_msrs))
    if index == 0:
        vcpu.set_fpu(registers.boot_fpu())
        vcpu.set_lapic(registers.boot_lapic(vcpu.get_lapic()))


def enter_kernel(vcpu: Vcpu, kernel: LoadedKernel) -> None:
    """Set the registers of vCPU 0, once prepared, to begin at the kernel's entry as its boot protocol
    says.
    """
    pvh = kernel.protocol == PVH
    vcpu.set_regs(registers.boot_regs(kernel.entry, pvh=pvh))
    vcpu.set_sregs(registers.boot_sregs(vcpu.get_sregs(), pvh=pvh))
