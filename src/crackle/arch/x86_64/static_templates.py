"""The CPU templates that have a name: what hosts of several models are to have in common for their guests.

Each is for the models that it was made for, and does to CPUID what Firecracker's of that name does. C3 and T2 look like
EC2's instances of that name; T2S also lets a guest move between Skylake and Cascade Lake; T2CL on Intel and T2A on AMD
have the same instructions.
"""

from __future__ import annotations

from struct import pack

from crackle.arch.x86_64.cpuid import AMD, INTEL
from crackle.arch.x86_64.features import bit_of
from crackle.arch.x86_64.template import Change, Template
from crackle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crackle.arch.x86_64.protocols import CpuidEntry

    Place = tuple[int, int, str]

# CPUID leaf 1, EAX: all that is model, family and stepping (Intel SDM volume 2, CPUID, figure 3-6).
_SIGNATURE = 0x0FFF_3FFF
_SKYLAKE, _CASCADE_LAKE, _ICE_LAKE, _MILAN = 0x5_0654, 0x5_0657, 0x6_06A6, 0xA0_0F11

_IVY_BRIDGE_E, _HASWELL_E = 0x3_06E4, 0x3_06F2

# IA32_ARCH_CAPABILITIES (Intel SDM volume 4, table 2-2): which faults the processor does not have.
_ARCH_CAPABILITIES = 0x10A
_ALL = 0xFFFF_FFFF_FFFF_FFFF
# RSBA, SKIP_L1DFL_VMENTRY, IF_PSCHANGE_MC_NO, bits 10 and 11, FB_CLEAR, RRSBA, GDS_NO, RFDS_NO: what both have, or what
# makes a guest cautious that runs on either.
_OF_BOTH_LAKES = 0x0C0A_0C4C
# Controls and what is reserved; not what says that a fault is not there.
_CONTROLS = 0xFFFF_FFFF_E2F5_1E00

# Features that a guest does not see, and with a plus those that it does see, whatever the host has.
_C3: Mapping[Place, str] = {
    (1, 0, "ecx"): "dtes64 monitor ds_cpl vmx tm2 cid sdbg fma xtpr pdcm movbe",
    (1, 0, "edx"): "+mce +mtrr pn dts acpi ss tm pbe",
    (
        7,
        0,
        "ebx",
    ): "sgx bmi1 hle avx2 bmi2 invpcid rtm cqm mpx rdt_a avx512f avx512dq rdseed adx avx512ifma clflushopt "
    "clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    (7, 0, "ecx"): "avx512vbmi umip pku ospke avx512_vnni avx512_vpopcntdq la57 rdpid sgx_lc",
    (7, 0, "edx"): "avx512_4vnniw avx512_4fmaps",
    (0xD, 0, "eax"): "bndregs_state bndcsr_state opmask_state zmm_hi256_state hi16_zmm_state pkru_state",
    (0xD, 1, "eax"): "xsavec xgetbv1 xsaves",
    (0x8000_0001, 0, "ecx"): "abm 3dnowprefetch",
    (0x8000_0001, 0, "edx"): "pdpe1gb",
}
_T2: Mapping[Place, str] = {
    (1, 0, "ecx"): "dtes64 monitor ds_cpl vmx smx est tm2 cid sdbg xtpr pdcm dca",
    (1, 0, "edx"): "+mce +mtrr pn dts acpi ss tm ia64 pbe",
    (
        7,
        0,
        "ebx",
    ): "sgx hle +erms rtm cqm mpx rdt_a avx512f avx512dq rdseed adx avx512ifma pcommit clflushopt clwb "
    "intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    (7, 0, "ecx"): "avx512vbmi umip pku ospke avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg "
    "avx512_vpopcntdq la57 rdpid sgx_lc",
    (7, 0, "edx"): "avx512_4vnniw avx512_4fmaps fsrm avx512_vp2intersect",
    (0xD, 0, "eax"): "bndregs_state bndcsr_state opmask_state zmm_hi256_state hi16_zmm_state pkru_state",
    (0xD, 1, "eax"): "xsavec xgetbv1 xsaves",
    (0x8000_0001, 0, "ecx"): "3dnowprefetch mwaitx",
    (0x8000_0001, 0, "edx"): "pdpe1gb",
    (0x8000_0008, 0, "ebx"): "wbnoinvd",
}
_T2CL: Mapping[Place, str] = {
    **_T2,
    (0x8000_0001, 0, "ecx"): "sse4a misalignsse 3dnowprefetch mwaitx",
    (0x8000_0001, 0, "edx"): "mmxext mmx fxsr fxsr_opt pdpe1gb",
}
_T2A: Mapping[Place, str] = {
    **_T2,
    (0x8000_0001, 0, "ecx"): "svm sse4a misalignsse 3dnowprefetch mwaitx",
    (0x8000_0001, 0, "edx"): "mmxext fxsr_opt pdpe1gb",
    (0x8000_0008, 0, "ebx"): "clzero +xsaveerptr wbnoinvd +amd_ibrs_preferred +amd_ibrs_same_mode "
    "+efer_lmsle_unsupported",
}

# By name: the vendor, the processors it is for, the one it shows, its features and its MSRs.
_TEMPLATES = {
    "C3": (INTEL, (_SKYLAKE, _CASCADE_LAKE, _ICE_LAKE), _IVY_BRIDGE_E, _C3, ()),
    "T2": (INTEL, (_SKYLAKE, _CASCADE_LAKE, _ICE_LAKE), _HASWELL_E, _T2, ()),
    "T2S": (
        *(INTEL, (_SKYLAKE, _CASCADE_LAKE), _HASWELL_E, _T2),
        ((_ARCH_CAPABILITIES, _ALL, _OF_BOTH_LAKES),),
    ),
    "T2CL": (
        *(INTEL, (_CASCADE_LAKE, _ICE_LAKE), _HASWELL_E, _T2CL),
        ((_ARCH_CAPABILITIES, _CONTROLS, 0),),
    ),
    "T2A": (AMD, (_MILAN,), _HASWELL_E, _T2A, ()),
}


def named(name: str, entries: Sequence[CpuidEntry]) -> Template:
    """The template of that name, for a host whose KVM reports these entries. ConfigError where it is not for that."""
    vendor, models, _, _, _ = _TEMPLATES[name]
    leaves = {entry.function: entry for entry in entries if not entry.index}
    if pack("<III", leaves[0].ebx, leaves[0].edx, leaves[0].ecx) != vendor:
        raise ConfigError(
            "Failed to get CPU template: CPU vendor mismatched between actual CPU and CPU template. "
            f"{name} is for {vendor.decode()}."
        )
    model = leaves[1].eax & _SIGNATURE
    if model not in models:
        known = ", ".join(f"{each:#x}" for each in models)
        raise ConfigError(
            "Failed to get CPU template: The current CPU model is not permitted to apply the CPU template. "
            f"CPUID says {model:#x} here; {name} is for {known}."
        )
    return made(name)


def made(name: str) -> Template:
    """The same for any host."""
    _, _, signature, features, msrs = _TEMPLATES[name]
    changes = [Change(1, 0, None, (("eax", _SIGNATURE, signature),))]
    for (function, index, register), names in features.items():
        mask = value = 0
        for each in names.split():
            bit = bit_of(function, index, register, each.removeprefix("+"))
            mask |= bit
            value |= bit if each.startswith("+") else 0
        changes.append(Change(function, index, None, ((register, mask, value),)))
    return Template(tuple(changes), msrs)
