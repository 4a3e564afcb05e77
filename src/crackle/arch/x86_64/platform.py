"""x86_64 as `crackle.arch.interface` wants it: a PC's chips, CPUID and MSRs, the board, the boot protocols."""

from __future__ import annotations

from crackle.arch.interface import DeviceInfo
from crackle.arch.x86_64 import acpi, configure_system, enter_kernel, layout, mptable, prepare_vcpu
from crackle.arch.x86_64.board import Board, BoardState
from crackle.arch.x86_64.cmdline import build as build_cmdline
from crackle.arch.x86_64.kernel import load_initrd, load_kernel
from crackle.arch.x86_64.layout import CMDLINE_MAX_SIZE, memory_layout
from crackle.arch.x86_64.state import (
    VcpuState,
    VmState,
    restore_vcpus,
    restore_vm,
    rewind_vcpus,
    rewind_vm,
    save_vcpu,
    save_vm,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from crackle.arch.interface import Finding
    from crackle.arch.x86_64.kernel import LoadedKernel
    from crackle.kvm import Kvm, Vcpu, Vm
    from crackle.memory import GuestMemory
    from crackle.schema.cpu import CpuConfig

__all__ = [
    "CMDLINE_MAX_SIZE",
    "DEVICE_LINES",
    "DEVICE_MEMORY",
    "DEVICE_ROUTES",
    "DEVICE_WINDOWS",
    "SAVED_DEVICE_LINES",
    "BoardState",
    "VcpuState",
    "VmState",
    "build_cmdline",
    "check_vcpus",
    "create_chips",
    "describe",
    "enter_kernel",
    "load_initrd",
    "load_kernel",
    "make_board",
    "make_ready",
    "memory_layout",
    "prepare_vcpus",
    "probe",
    "restore_vcpus",
    "restore_vm",
    "rewind_vcpus",
    "rewind_vm",
    "save_vcpu",
    "save_vm",
    "use_template",
]

DEVICE_WINDOWS = range(layout.VIRTIO_MMIO_START, layout.VIRTIO_MMIO_LAST + 1, layout.MMIO_WINDOW_SIZE)
make_board = Board
DEVICE_LINES = range(layout.GSI_FIRST, layout.GSI_VMGENID)
# A guest that began before there was a generation ID may have a device on its line. It has no other use for that.
SAVED_DEVICE_LINES = range(layout.GSI_FIRST, layout.GSI_LAST + 1)
DEVICE_MEMORY = range(layout.MMIO64_START, layout.MMIO64_END, layout.HUGE_PAGE_SIZE)
DEVICE_ROUTES = range(layout.GSI_MSI_FIRST, layout.GSI_MSI_LAST + 1)

# For which tables are made before they are wanted.
_FEW_DEVICES, _FEW_VCPUS = 4, (1, 2)


def create_chips(vm: Vm) -> None:
    """The PICs, the IOAPIC and the PIT, and where KVM may keep what Intel's hosts need for real mode."""
    vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP_ADDRESS)
    vm.set_tss_addr(layout.KVM_TSS_ADDRESS)
    vm.create_irqchip()
    vm.create_pit2()


def check_vcpus(kvm: Kvm, vcpus: Sequence[Vcpu], states: Sequence[VcpuState]) -> list[str]:
    """What is unlike where `states` were saved, in sentences. ConfigError when they cannot run here."""
    from crackle.arch.x86_64.compatibility import check_vcpus

    return check_vcpus(kvm, vcpus, states)


def prepare_vcpus(kvm: Kvm, vcpus: Sequence[Vcpu], *, smt: bool) -> None:
    """CPUID and MSRs for each, FPU and local APIC for the first."""
    cpuid, msrs = kvm.supported_cpuid(), frozenset(kvm.msr_index_list())
    for index, vcpu in enumerate(vcpus):
        prepare_vcpu(vcpu, index=index, count=len(vcpus), smt=smt, supported_cpuid=cpuid, supported_msrs=msrs)


def use_template(
    kvm: Kvm, vcpus: Sequence[Vcpu], *, smt: bool, name: str | None, custom: CpuConfig | None
) -> None:
    """Have vCPUs that are prepared show their guest what a template leaves: a static one, or one of its own."""
    from crackle.arch.x86_64 import template

    if name is None:
        if custom is not None:
            template.apply(template.custom(custom), kvm, vcpus, smt=smt)
        return
    from crackle.arch.x86_64.static_templates import named

    template.apply(named(name, kvm.supported_cpuid()), kvm, vcpus, smt=smt)


def make_ready() -> None:
    """Make the tables of small machines with few devices, which are kept."""
    devices = [
        DeviceInfo(address, layout.MMIO_WINDOW_SIZE, line)
        for address, line in zip(DEVICE_WINDOWS[:_FEW_DEVICES], DEVICE_LINES, strict=False)
    ]
    for vcpu_count in _FEW_VCPUS:
        table = mptable.build(layout.SYSTEM_MEM_START, vcpu_count)
        acpi.write_tables(
            _Nowhere(),
            layout.SYSTEM_MEM_START + len(table),
            vcpu_count=vcpu_count,
            devices=devices,
            sleep_port=layout.SLEEP_PORT,
            vmgenid=layout.VMGENID_ADDR,
            vmclock=layout.VMCLOCK_ADDR,
            hotplug=layout.HOTPLUG_ADDR,
        )


class _Nowhere:
    """In place of guest memory."""

    def write(self, gpa: int, data: bytes | bytearray, /) -> None:
        """It is not wanted."""


def describe(
    memory: GuestMemory,
    *,
    kernel: LoadedKernel,
    cmdline: bytes,
    initrd: tuple[int, int] | None,
    vcpu_count: int,
    devices: Sequence[DeviceInfo],
) -> None:
    """Command line, boot parameters, MP and ACPI tables, GDT and page tables."""
    configure_system(
        memory,
        kernel=kernel,
        cmdline=cmdline,
        initrd=initrd,
        vcpu_count=vcpu_count,
        devices=devices,
        sleep_port=layout.SLEEP_PORT,
        vmgenid=layout.VMGENID_ADDR,
        vmclock=layout.VMCLOCK_ADDR,
        hotplug=layout.HOTPLUG_ADDR,
    )


def probe(kvm: Kvm) -> list[Finding]:
    """User code, interrupts, system calls and traps."""
    from crackle.arch.x86_64.probe import examine

    return examine(kvm)
