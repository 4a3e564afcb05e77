"""What a snapshot keeps of KVM itself on x86_64: the chips, the guest's clock, and each vCPU.

What KVM gives as one block stays one. The order of restoring matters: CPUID before what it allows, the MP state before
the events, the local APIC and the time stamp counter before the deadline of its timer, the vCPUs before the chips,
whose interrupts their local APICs take.

The time stamp counters go on from where they stood, as the guest's clock does, and exactly as far apart as they were:
by KVM_VCPU_TSC_OFFSET (Documentation/virt/kvm/devices/vcpu.rst, 4.1), of which all vCPUs' are worked out from the
first's. That document has the first's from the host's TSC at the time of kvmclock, so that both go on by the time that
has passed; here neither does, and a guest takes its time from one of them. By their MSRs alone each would be as it was
some microseconds sooner or later than the others, unless KVM guesses that a value within a second of what it expects is
meant to be the others': right mostly, wrong for vCPUs that were apart, or between which a restore took longer, as it
may when a page-fault handler is slow.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from crackle.arch.x86_64.msr import saved_msrs
from crackle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from crackle.kvm import Kvm, Vcpu, Vm

_IRQCHIPS = (0, 1, 2)  # PIC 1, PIC 2, IOAPIC
_TSC = 0x10
_TSC_DEADLINE = 0x6E0
_MASK = (1 << 64) - 1

# The local APIC's timer (Intel SDM volume 3, 10.5.4): its place in the register page, masked, and deadline mode.
_LVT_TIMER, _LVT_MASKED, _LVT_MODE, _LVT_DEADLINE = 0x320, 1 << 16, 3 << 17, 2 << 17
# Its interrupt's number; and where interrupts are noted that wait for the vCPU, 32 in each 16 bytes (10.8.4).
_VECTOR, _IRR = 0xFF, (0x200, 0x280)


class VmState(msgspec.Struct, frozen=True, kw_only=True):
    """struct kvm_irqchip of PIC 1, PIC 2 and IOAPIC, struct kvm_pit_state2, and kvmclock in nanoseconds.

    realtime_ns: the host's CLOCK_REALTIME when kvmclock was that; None in snapshots that do not say.
    """

    irqchips: tuple[bytes, ...]
    pit: bytes
    clock_ns: int
    realtime_ns: int | None = None


class VcpuState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of a vCPU that KVM can tell. cpuid: (function, index, flags, eax, ebx, ecx, edx) of each leaf.

    pdptrs: of a guest that pages by PAE, which may have changed the table in memory since the CPU read it. tsc_offset:
    only as far as it is other than that of another vCPU. Older snapshots have neither.
    """

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
    nested: bytes = b""
    pdptrs: tuple[int, ...] = ()
    tsc_offset: int | None = None


def save_vm(vm: Vm) -> VmState:
    """The chips; all vCPUs are paused."""
    clock_ns, realtime_ns = vm.get_clock()
    if realtime_ns is None:
        # Before Linux 5.16, and on a host whose own time does not come from the TSC: then it is this, to a few us.
        realtime_ns = time.time_ns()
    return VmState(
        irqchips=tuple(vm.get_irqchip(chip) for chip in _IRQCHIPS),
        pit=vm.get_pit2(),
        clock_ns=clock_ns,
        realtime_ns=realtime_ns,
    )


def restore_vm(vm: Vm, state: VmState, *, realtime: bool = False) -> None:
    """The reverse of `save_vm`, after the vCPUs' state. realtime: let kvmclock go on by what has passed since.

    ConfigError when nobody knows how much that is.
    """
    if realtime and state.realtime_ns is None:
        raise ConfigError(
            "The snapshot does not say what time it was when it was taken, which clock_realtime needs: "
            "an earlier version of Crackle has taken it. Leave clock_realtime out."
        )
    vm.set_pit2(state.pit)
    _set_clock(vm, state, realtime)
    for chip in state.irqchips:
        vm.set_irqchip(chip)


def save_vcpu(kvm: Kvm, vcpu: Vcpu) -> VcpuState:
    """A paused vCPU's state. Looking at its MP state first makes KVM deliver what is on its way."""
    mp_state = vcpu.get_mp_state()
    lapic = vcpu.get_lapic()
    msrs = vcpu.get_msrs(saved_msrs(kvm.msr_index_list()))
    timer = int.from_bytes(lapic[_LVT_TIMER : _LVT_TIMER + 4], "little")
    if timer & (_LVT_MODE | _LVT_MASKED) == _LVT_DEADLINE and msrs.get(_TSC_DEADLINE) == 0:
        # It may have expired just now, which KVM keeps where nobody can see it: better once too often than never.
        msrs[_TSC_DEADLINE] = msrs[_TSC]
    return VcpuState(
        cpuid=tuple(tuple(leaf) for leaf in vcpu.get_cpuid2()),
        tsc_khz=vcpu.tsc_khz,
        mp_state=mp_state,
        regs=vcpu.get_regs(),
        sregs=vcpu.get_sregs(),
        xsave=vcpu.get_xsave(),
        xcrs=vcpu.get_xcrs(),
        debugregs=vcpu.get_debugregs(),
        lapic=lapic,
        msrs=msrs,
        nested=vcpu.get_nested_state(),
        events=vcpu.get_vcpu_events(),
        pdptrs=vcpu.get_pdptrs(),
        tsc_offset=vcpu.tsc_offset,
    )


def restore_vcpus(kvm: Kvm, vcpus: Sequence[Vcpu], states: Sequence[VcpuState]) -> None:
    """The reverse of `save_vcpu`, before the vCPUs run. KvmError where this host's KVM does not take it."""
    for vcpu, state in zip(vcpus, states, strict=True):
        _restore_registers(kvm, vcpu, state)
    _set_tscs(vcpus, states)
    for vcpu, state in zip(vcpus, states, strict=True):
        # An absolute time of the TSC, which must be there first.
        if (deadline := state.msrs.get(_TSC_DEADLINE)) is not None:
            vcpu.set_msrs({_TSC_DEADLINE: deadline})
        # After IA32_FEATURE_CONTROL and EFER, which allow it. Mostly nothing but what a new vCPU has.
        if state.nested and state.nested != vcpu.get_nested_state():
            vcpu.set_nested_state(state.nested)
        vcpu.set_vcpu_events(state.events)


def _restore_registers(kvm: Kvm, vcpu: Vcpu, state: VcpuState) -> None:
    vcpu.set_cpuid2(state.cpuid)
    if vcpu.tsc_khz != state.tsc_khz:
        vcpu.tsc_khz = state.tsc_khz
    vcpu.set_mp_state(state.mp_state)
    vcpu.set_regs(state.regs)
    if state.pdptrs:
        vcpu.set_sregs_with_pdptrs(state.sregs, state.pdptrs)
    else:
        vcpu.set_sregs(state.sregs)
    vcpu.set_xsave(_of_length(state.xsave, len(vcpu.get_xsave())))
    vcpu.set_xcrs(state.xcrs)
    vcpu.set_debugregs(state.debugregs)
    vcpu.set_lapic(state.lapic)
    known = frozenset(saved_msrs(kvm.msr_index_list()))
    # What this KVM does not know is zero: `check_vcpus` has seen to that.
    msrs = {index: value for index, value in state.msrs.items() if value or index in known}
    for index in (_TSC, _TSC_DEADLINE):
        msrs.pop(index, None)
    vcpu.set_msrs(msrs)


def _set_tscs(vcpus: Sequence[Vcpu], states: Sequence[VcpuState]) -> None:
    """Have the time stamp counters go on from where they stood, as far apart as they were."""
    first, begin = vcpus[0], states[0]
    now = first.tsc_offset
    if now is None:
        # KVM guesses which are meant to be alike.
        for vcpu, state in zip(vcpus, states, strict=True):
            vcpu.set_msrs({_TSC: state.msrs[_TSC]})
        return
    now += begin.msrs[_TSC] - first.get_msrs([_TSC])[_TSC]
    for vcpu, state in zip(vcpus, states, strict=True):
        vcpu.tsc_offset = now + _apart(begin, state) & _MASK


def _apart(one: VcpuState, other: VcpuState) -> int:
    """How far ahead of `one` `other`'s TSC was."""
    if one.tsc_offset is not None and other.tsc_offset is not None:
        return other.tsc_offset - one.tsc_offset
    # An older snapshot has them as of different moments. KVM takes what is within a second as meant to be alike.
    found = other.msrs[_TSC] - one.msrs[_TSC]
    return 0 if abs(found) < one.tsc_khz * 1000 else found


def rewind_vcpus(vcpus: Sequence[Vcpu], states: Sequence[VcpuState]) -> None:
    """Take back what time has done to vCPUs that were restored and have not run: TSCs, and timers that went on.

    What is on its way to them stays so, but for the timers' own interrupts.
    """
    _set_tscs(vcpus, states)
    for vcpu, state in zip(vcpus, states, strict=True):
        _rewind_timer(vcpu, state)


def _rewind_timer(vcpu: Vcpu, state: VcpuState) -> None:
    timer = int.from_bytes(state.lapic[_LVT_TIMER : _LVT_TIMER + 4], "little")
    if not timer & _LVT_MASKED:
        now, lapic = vcpu.get_lapic(), bytearray(state.lapic)
        own = timer & _VECTOR
        for place in range(*_IRR, 16):
            bits = int.from_bytes(now[place : place + 4], "little")
            if place == _IRR[0] + (own >> 5 << 4):
                bits &= ~(1 << (own & 31))
            bits |= int.from_bytes(lapic[place : place + 4], "little")
            lapic[place : place + 4] = bits.to_bytes(4, "little")
        vcpu.set_lapic(bytes(lapic))
    if (deadline := state.msrs.get(_TSC_DEADLINE)) is not None:
        vcpu.set_msrs({_TSC_DEADLINE: deadline})


def rewind_vm(vm: Vm, state: VmState, *, realtime: bool = False) -> None:
    """The same for the PIT and kvmclock. What the PIT has raised meanwhile may be one tick too many."""
    vm.set_pit2(state.pit)
    _set_clock(vm, state, realtime)


def _set_clock(vm: Vm, state: VmState, realtime: bool) -> None:
    passed = time.time_ns() - (state.realtime_ns or 0) if realtime else 0
    vm.set_clock(state.clock_ns + max(passed, 0))


def _of_length(area: bytes, size: int) -> bytes:
    """An XSAVE area for a KVM that wants so many bytes. ConfigError when one with fewer would lose something."""
    if len(area) > size and any(area[size:]):
        raise ConfigError(f"the guest's XSAVE area has {len(area)} bytes, this host's KVM takes {size}")
    return area[:size].ljust(size, b"\0")
