"""What a snapshot keeps of KVM itself on x86_64: the chips, the guest's clock, and each vCPU.

What KVM gives as one block stays one. The order of restoring matters: CPUID before what it allows, the MP state before
the events, the local APIC and the time stamp counter before the deadline of its timer.
"""

from __future__ import annotations

from typing import Any

import msgspec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.kvm import Kvm, Vcpu, Vm

_IRQCHIPS = (0, 1, 2)  # PIC 1, PIC 2, IOAPIC
_TSC_DEADLINE = 0x6E0


class VmState(msgspec.Struct, frozen=True, kw_only=True):
    """struct kvm_irqchip of PIC 1, PIC 2 and IOAPIC, struct kvm_pit_state2, and kvmclock in nanoseconds."""

    irqchips: tuple[bytes, ...]
    pit: bytes
    clock_ns: int


class VcpuState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of a vCPU that KVM can tell. cpuid: (function, index, flags, eax, ebx, ecx, edx) of each leaf."""

    cpuid: tuple[tuple[int, ...], ...]
    tsc_khz: int
    mp_state: int
    regs: dict[str, int]
    sregs: dict[str, Any]
    xsave: bytes
    xcrs: bytes
    debugregs: bytes
    lapic: bytes
    msrs: dict[int, int]
    events: bytes


def save_vm(vm: Vm) -> VmState:
    """The chips; all vCPUs are paused."""
    return VmState(
        irqchips=tuple(vm.get_irqchip(chip) for chip in _IRQCHIPS),
        pit=vm.get_pit2(),
        clock_ns=vm.get_clock()[0],
    )


def restore_vm(vm: Vm, state: VmState) -> None:
    """The reverse of `save_vm`, before the vCPUs' state."""
    vm.set_pit2(state.pit)
    for chip in state.irqchips:
        vm.set_irqchip(chip)
    vm.set_clock(state.clock_ns)


def save_vcpu(kvm: Kvm, vcpu: Vcpu) -> VcpuState:
    """A paused vCPU's state. Looking at its MP state first makes KVM deliver what is on its way."""
    mp_state = vcpu.get_mp_state()
    return VcpuState(
        cpuid=tuple(tuple(leaf) for leaf in vcpu.get_cpuid2()),
        tsc_khz=vcpu.tsc_khz,
        mp_state=mp_state,
        regs=vcpu.get_regs(),
        sregs=vcpu.get_sregs(),
        xsave=vcpu.get_xsave(),
        xcrs=vcpu.get_xcrs(),
        debugregs=vcpu.get_debugregs(),
        lapic=vcpu.get_lapic(),
        msrs=vcpu.get_msrs(kvm.msr_index_list()),
        events=vcpu.get_vcpu_events(),
    )


def restore_vcpu(vcpu: Vcpu, state: VcpuState) -> None:
    """The reverse of `save_vcpu`, before the vCPU runs. KvmError where this host's KVM does not take it."""
    vcpu.set_cpuid2(state.cpuid)
    if vcpu.tsc_khz != state.tsc_khz:
        vcpu.tsc_khz = state.tsc_khz
    vcpu.set_mp_state(state.mp_state)
    vcpu.set_regs(state.regs)
    vcpu.set_sregs(state.sregs)
    vcpu.set_xsave(state.xsave)
    vcpu.set_xcrs(state.xcrs)
    vcpu.set_debugregs(state.debugregs)
    vcpu.set_lapic(state.lapic)
    # Its value is an absolute time of the TSC, which must be there first.
    deadline = {index: value for index, value in state.msrs.items() if index == _TSC_DEADLINE}
    vcpu.set_msrs({index: value for index, value in state.msrs.items() if index != _TSC_DEADLINE})
    vcpu.set_msrs(deadline)
    vcpu.set_vcpu_events(state.events)
