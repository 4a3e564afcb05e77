"""Whether a guest that was saved on one host can go on on another: what it saw of its CPU, "
"compared by CPUID and MSRs.

A feature that it saw and that is not here is a reason to refuse; what is only unlike is told. The names are those of
Linux (/proc/cpuinfo), the bits those of Intel SDM volume 2, CPUID, AMD APM volume 3, appendix E, and
Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from crackle.arch.x86_64.msr import saved_msrs
from crackle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from crackle.arch.x86_64.state import VcpuState
    from crackle.kvm import CpuidEntry, Kvm, Vcpu

# Leaf, subleaf, register (its place in an entry), names of the bits from 0 on; "-" where there is none.
_EAX, _EBX, _ECX, _EDX = 3, 4, 5, 6
_FEATURES = (
    (
        *(1, 0, _ECX),
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca "
        "sse4_1 sse4_2 "
        "x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    (
        *(1, 0, _EDX),
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi "
        "mmx fxsr sse sse2 "
        "ss ht tm ia64 pbe",
    ),
    (6, 0, _EAX, "dtherm ida arat"),
    (
        *(7, 0, _EBX),
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a "
        "avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd "
        "sha_ni avx512bw "
        "avx512vl",
    ),
    (
        *(7, 0, _ECX),
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni "
        "avx512_bitalg tme "
        "avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    (
        *(7, 0, _EDX),
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - "
        "tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 "
        "amx_tile amx_int8 "
        "spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    (
        *(7, 1, _EAX),
        "- - - - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - amx_fp16 - "
        "avx_ifma - - lam",
    ),
    (0xD, 1, _EAX, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        *(0x4000_0001, 0, _EAX),
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi "
        "kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield "
        "kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - "
        "kvm_clocksource_stable",
    ),
    (
        *(0x8000_0001, 0, _ECX),
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit "
        "wdt - lwp fma4 "
        "tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    (
        *(0x8000_0001, 0, _EDX),
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx "
        "fxsr fxsr_opt "
        "pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    (
        *(0x8000_0008, 0, _EBX),
        "clzero irperf xsaveerptr - - - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - "
        "amd_stibp_always_on - - - - - "
        "amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc",
    ),
)

# Bits that follow what the guest has switched on: OSXSAVE, OSPKE, and MONITOR by IA32_MISC_ENABLE.
_CHANGING = {(1, 0, _ECX): 1 << 27 | 1 << 3, (7, 0, _ECX): 1 << 4}


def check_vcpus(kvm: Kvm, vcpus: Sequence[Vcpu], states: Sequence[VcpuState]) -> list[str]:
    """What is unlike, in sentences. ConfigError, with their names, when features are missing here.

    vcpus: as they are prepared for a new guest of this host's.
    """
    # Asked back from KVM: there are hosts that show a guest more than they say they support.
    here = {(entry.function, entry.index): entry for entry in vcpus[0].get_cpuid2()}
    saved = {(leaf[0], leaf[1]): leaf for leaf in states[0].cpuid}
    missing = [
        name
        for function, index, register, names in _FEATURES
        for name in _missing(saved, here, function, index, register, names)
    ]
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
    register: int,
    described: str,
) -> list[str]:
    if (function, index) not in saved:
        return []
    there: tuple[int, ...] = saved[function, index]
    # An entry is a tuple of the same order.
    ours = here.get((function, index))
    offered = 0 if ours is None else (ours.eax, ours.ebx, ours.ecx, ours.edx)[register - _EAX]
    bits = there[register] & ~offered & ~_CHANGING.get((function, index, register), 0)
    if not bits:
        return []
    names, letter = described.split(), "abcd"[register - _EAX]
    return [
        names[bit]
        if bit < len(names) and names[bit] != "-"
        else f"CPUID {function:#x}:{index} e{letter}x bit {bit}"
        for bit in range(32)
        if bits >> bit & 1
    ]


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
