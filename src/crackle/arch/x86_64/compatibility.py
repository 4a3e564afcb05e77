"""Whether a guest that was saved on one host can go on on another: what it saw of its CPU, "
"compared by CPUID and MSRs.

A feature that it saw and that is not here is a reason to refuse; what is only unlike is told.
"""

from __future__ import annotations

from crackle.arch.x86_64.features import FEATURES, REGISTERS, names_of
from crackle.arch.x86_64.msr import saved_msrs
from crackle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from crackle.arch.x86_64.state import VcpuState
    from crackle.kvm import CpuidEntry, Kvm, Vcpu

# Bits that follow what the guest has switched on: OSXSAVE, OSPKE, and MONITOR by IA32_MISC_ENABLE.
_CHANGING = {(1, 0, "ecx"): 1 << 27 | 1 << 3, (7, 0, "ecx"): 1 << 4}
# Where the registers are in an entry of CPUID.
_EAX, _EBX = 3, 4


def check_vcpus(kvm: Kvm, vcpus: Sequence[Vcpu], states: Sequence[VcpuState]) -> list[str]:
    """What is unlike, in sentences. ConfigError, with their names, when features are missing here.

    vcpus: as they are prepared for a new guest of this host's.
    """
    # Asked back from KVM: there are hosts that show a guest more than they say they support.
    here = {(entry.function, entry.index): entry for entry in vcpus[0].get_cpuid2()}
    saved = {(leaf[0], leaf[1]): leaf for leaf in states[0].cpuid}
    missing = [name for place in FEATURES for name in _missing(saved, here, *place)]
    known = frozenset(saved_msrs(kvm.msr_index_list()))
    registers = sorted(
        {index for state in states for index, value in state.msrs.items() if value and index not in known}
    )
    missing += [f"MSR {index:#x}" for index in registers]
    if missing:
        raise ConfigError(
            f"This host's CPU or KVM lacks what the guest has seen on the one it was saved on: {', '.join(missing)}. "
            "Load it on a host that has all of it."
        )
    return _unlike(saved, here)


def _missing(
    saved: dict[tuple[int, int], tuple[int, ...]],
    here: dict[tuple[int, int], CpuidEntry],
    function: int,
    index: int,
    register: str,
) -> list[str]:
    if (function, index) not in saved:
        return []
    there = saved[function, index][_EAX + REGISTERS.index(register)]
    ours = here.get((function, index))
    offered: int = 0 if ours is None else getattr(ours, register)
    bits = there & ~offered & ~_CHANGING.get((function, index, register), 0)
    return names_of(function, index, register, bits)


def _unlike(
    saved: dict[tuple[int, int], tuple[int, ...]], here: dict[tuple[int, int], CpuidEntry]
) -> list[str]:
    told = []
    ours = here[0, 0]
    there = saved.get((0, 0))
    if there is not None and there[_EBX:] != (ours.ebx, ours.ecx, ours.edx):
        told.append("The snapshot is from a CPU of another vendor than this host's.")
    model = saved.get((1, 0))
    if model is not None and model[_EAX] != here[1, 0].eax:
        told.append(
            f"The snapshot is from another model of CPU ({model[_EAX]:#x}) than this host's ({here[1, 0].eax:#x})."
        )
    return told
