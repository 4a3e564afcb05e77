"""What the bits of CPUID are called, which tell a guest what its processor can do.

The names are those of Linux (/proc/cpuinfo), as far as it has one; the bits those of Intel SDM volume 2, CPUID, AMD APM
volume 3, appendix E, and Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

REGISTERS = ("eax", "ebx", "ecx", "edx")

FEATURES = {
    (1, 0, "ecx"): (
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca "
        "sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"
    ),
    (1, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx "
        "fxsr sse sse2 ss ht tm ia64 pbe"
    ),
    (6, 0, "eax"): ("dtherm ida arat"),
    (7, 0, "ebx"): (
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds "
        "mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel_pt avx512pf "
        "avx512er avx512cd sha_ni avx512bw avx512vl"
    ),
    (7, 0, "ecx"): (
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni "
        "avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri "
        "movdir64b enqcmd sgx_lc pks"
    ),
    (7, 0, "edx"): (
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort "
        "- tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 "
        "amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd"
    ),
    (7, 1, "eax"): (
        "- - - - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - amx_fp16 - "
        "avx_ifma - - lam"
    ),
    (0xD, 0, "eax"): (
        "x87_state sse_state avx_state bndregs_state bndcsr_state opmask_state zmm_hi256_state hi16_zmm_state "
        "- pkru_state"
    ),
    (0xD, 1, "eax"): ("xsaveopt xsavec xgetbv1 xsaves xfd"),
    (0x4000_0001, 0, "eax"): (
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi "
        "kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control "
        "kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - "
        "- - - - - kvm_clocksource_stable"
    ),
    (0x8000_0001, 0, "ecx"): (
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit "
        "wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc "
        "mwaitx"
    ),
    (0x8000_0001, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx "
        "fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"
    ),
    (0x8000_0008, 0, "ebx"): (
        "clzero irperf xsaveerptr - - - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - "
        "amd_stibp_always_on amd_ibrs_preferred amd_ibrs_same_mode efer_lmsle_unsupported - - amd_ppin "
        "amd_ssbd virt_ssbd amd_ssb_no cppc"
    ),
}
"""By leaf, subleaf and register: names of the bits from 0 on, "-" where there is none."""


def bit_of(function: int, index: int, register: str, name: str) -> int:
    """The feature's bit in that register, as a mask. ValueError where it has no such feature."""
    return 1 << FEATURES[function, index, register].split().index(name)


def names_of(function: int, index: int, register: str, bits: int) -> list[str]:
    """Of all bits that are set in `bits`; those that have no name by their place."""
    names = FEATURES[function, index, register].split()
    return [
        names[bit]
        if bit < len(names) and names[bit] != "-"
        else f"CPUID {function:#x}:{index} {register} bit {bit}"
        for bit in range(32)
        if bits >> bit & 1
    ]
