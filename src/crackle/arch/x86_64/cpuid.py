"""CPUID for one vCPU: what KVM supports, with this machine's topology in place of the host's.

Leaves and bits are those of Intel SDM volume 2, CPUID, and AMD APM volume 3, appendix E. APIC ids are the
vCPU indices. The vCPUs are one package; with SMT, vCPUs 2n and 2n+1 are the two threads of core n. The result
is what Firecracker gives its guests, so that CPU templates and expectations written for it hold.
"""

from __future__ import annotations

from struct import pack, unpack
from typing import TYPE_CHECKING

from crackle.arch.x86_64.layout import MAX_VCPUS
from crackle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from crackle.arch.x86_64.protocols import CpuidEntry

    Entry = TypeVar("Entry", bound=CpuidEntry)

INTEL = b"GenuineIntel"
AMD = b"AuthenticAMD"

SIGNIFICANT_INDEX = 1 << 0
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the entry is for one subleaf."""

_MASK32 = 0xFFFF_FFFF
_CORE_ID_SHIFT = (MAX_VCPUS - 1).bit_length()
_BRAND_SIZE = 48
_BRAND_LEAVES = (0x8000_0002, 0x8000_0003, 0x8000_0004)
_INTEL_BRAND = b"Intel(R) Xeon(R) Processor"
_AMD_BRAND = b"AMD EPYC"


class Topology:
    """Where one vCPU is among the others, and the brand the CPU shows."""

    __slots__ = ("brand", "count", "index", "intel", "threads")

    def __init__(self, index: int, count: int, smt: bool, intel: bool, brand: bytes | None) -> None:
        self.index = index
        self.count = count
        self.threads = 2 if smt and count > 1 else 1
        self.intel = intel
        self.brand = brand


def normalise(entries: Sequence[Entry], index: int, count: int, smt: bool) -> list[Entry]:
    """The entries for KVM_SET_CPUID2 of vCPU `index` of `count` (1 to 32), from those of
    KVM_GET_SUPPORTED_CPUID.

    ConfigError if the index or the count is out of range or leaf 0 or 1 is missing. Unknown vendors keep what
    is theirs.
    """
    if not 0 <= index < count <= MAX_VCPUS:
        raise ConfigError(f"vCPU {index} of {count} is not possible: there can be 1 to {MAX_VCPUS}")
    leaves = {entry.function: entry for entry in entries if not entry.index}
    if 0 not in leaves or 1 not in leaves:
        raise ConfigError("KVM reports no CPUID leaf 0 or 1; this host cannot run x86_64 guests")
    vendor = pack("<III", leaves[0].ebx, leaves[0].edx, leaves[0].ecx)
    brand = {INTEL: _intel_brand(leaves), AMD: _AMD_BRAND}.get(vendor)
    topology = Topology(index, count, smt, vendor == INTEL, brand)
    edits = {INTEL: _INTEL_EDITS, AMD: _AMD_EDITS}.get(vendor, _COMMON_EDITS)
    result = []
    for entry in entries:
        function = entry.function
        if function in _TOPOLOGY_LEAVES:
            continue
        edit = edits.get(function)
        result.append(edit(entry, topology) if edit else entry)
    any_entry = entries[0]
    for function in _TOPOLOGY_LEAVES:
        if function == 0xB or function in leaves:
            result.extend(_topology_leaf(any_entry, function, topology))
    if vendor == AMD and 0x8000_001E not in leaves:
        blank = any_entry._replace(function=0x8000_001E, index=0, flags=0, eax=0, ebx=0, ecx=0, edx=0)
        result.append(_amd_apic_id(blank, topology))
    return result


def _topology_leaf(any_entry: Entry, function: int, topology: Topology) -> list[Entry]:
    """Leaf 0xB, or 0x1F which says the same: threads of a core, cores of the package, and no more levels."""
    levels = (
        (topology.threads.bit_length() - 1, topology.threads, 1),
        (_CORE_ID_SHIFT, topology.count, 2),
        (0, 0, 0),
    )
    return [
        any_entry._replace(
            function=function,
            index=level,
            flags=SIGNIFICANT_INDEX,
            eax=shift,
            ebx=processors,
            ecx=kind << 8 | level,
            edx=topology.index,
        )
        for level, (shift, processors, kind) in enumerate(levels)
    ]


def _features(entry: Entry, topology: Topology) -> Entry:
    """Leaf 1: APIC id, number of addressable ids, cache flush line; no PDCM; TSC deadline timer,
    hypervisor; HTT.
    """
    addressable = 1 << (topology.count - 1).bit_length()
    return entry._replace(
        ebx=entry.ebx & 0xFF | 8 << 8 | addressable << 16 | topology.index << 24,
        ecx=entry.ecx & ~(1 << 15) | 1 << 24 | 1 << 31,
        edx=_put(entry.edx, 28, 28, topology.count > 1),
    )


def _cache(entry: Entry, topology: Topology) -> Entry:
    """Leaf 4 of Intel and 0x8000001D of AMD: a core's threads share L1 and L2, all vCPUs share L3."""
    kind, level = entry.eax & 0x1F, entry.eax >> 5 & 7
    if not kind:
        return entry
    eax = entry.eax
    if level in (1, 2):
        eax = _put(eax, 25, 14, topology.threads - 1)
    elif level == 3:
        eax = _put(eax, 25, 14, topology.count - 1)
    if topology.intel:
        eax = _put(eax, 31, 26, max(topology.count // topology.threads, 1) - 1)
    return entry._replace(eax=eax)


def _intel_power(entry: Entry, topology: Topology) -> Entry:  # noqa: ARG001
    """Leaf 6: no turbo boost, no performance-energy bias."""
    return entry._replace(eax=entry.eax & ~(1 << 1), ecx=entry.ecx & ~(1 << 3))


def _intel_extended_features(entry: Entry, topology: Topology) -> Entry:  # noqa: ARG001
    """Leaf 7: the x87 changes every current CPU has (FDP on exceptions only, no FCS and FDS), and no
    WAITPKG.
    """
    if entry.index:
        return entry
    return entry._replace(ebx=entry.ebx | 1 << 6 | 1 << 13, ecx=entry.ecx & ~(1 << 5))


def _amd_structured_features(entry: Entry, topology: Topology) -> Entry:  # noqa: ARG001
    """Leaf 7: no IA32_ARCH_CAPABILITIES, which KVM offers on AMD although AMD has no such MSR."""
    return entry if entry.index else entry._replace(edx=entry.edx & ~(1 << 29))


def _no_pmu(entry: Entry, topology: Topology) -> Entry:  # noqa: ARG001
    """Leaf 0xA: no performance counters."""
    return entry._replace(eax=0, ebx=0, ecx=0, edx=0)


def _l2_l3(entry: Entry, topology: Topology) -> Entry:  # noqa: ARG001
    """Leaf 0x80000006: bits 17:16 of EDX are reserved."""
    return entry._replace(edx=entry.edx & ~0x3_0000)


def _amd_extended_features(entry: Entry, topology: Topology) -> Entry:  # noqa: ARG001
    """Leaf 0x80000001: topology extensions, that is leaves 0x8000001D and 0x8000001E."""
    return entry._replace(ecx=entry.ecx | 1 << 22)


def _amd_sizes(entry: Entry, topology: Topology) -> Entry:
    """Leaf 0x80000008: number of threads; 7 bits of an APIC id are below the package."""
    return entry._replace(ecx=_put(_put(entry.ecx, 15, 12, 7), 7, 0, topology.count - 1))


def _amd_apic_id(entry: Entry, topology: Topology) -> Entry:
    """Leaf 0x8000001E: APIC id, core id and threads of it, one node with id 0."""
    ebx = _put(_put(entry.ebx, 15, 8, topology.threads - 1), 7, 0, topology.index // topology.threads)
    return entry._replace(eax=topology.index, ebx=ebx, ecx=entry.ecx & ~0x7FF)


def _brand(entry: Entry, topology: Topology) -> Entry:
    """Leaves 0x80000002 to 0x80000004: 16 bytes each of a name that does not tell hosts apart."""
    if topology.brand is None:
        return entry
    start = (entry.function - _BRAND_LEAVES[0]) * 16
    eax, ebx, ecx, edx = unpack("<4I", topology.brand.ljust(_BRAND_SIZE, b"\0")[start : start + 16])
    return entry._replace(eax=eax, ebx=ebx, ecx=ecx, edx=edx)


def _intel_brand(leaves: dict[int, Entry]) -> bytes:
    """The default brand, with the host's frequency ("@ 2.90GHz") if its own brand ends in one."""
    host = b"".join(
        pack("<4I", leaves[leaf].eax, leaves[leaf].ebx, leaves[leaf].ecx, leaves[leaf].edx)
        for leaf in _BRAND_LEAVES
        if leaf in leaves
    )
    frequency = host.rstrip(b"\0 ").rpartition(b" ")[2]
    number = frequency[:-3].replace(b".", b"", 1)
    if frequency[-3:] not in (b"THz", b"GHz", b"MHz") or not number.isdigit():
        return _INTEL_BRAND
    return (_INTEL_BRAND + b" @ " + frequency)[:_BRAND_SIZE]


def _put(register: int, high: int, low: int, value: int) -> int:
    """`register` with `value` in bits high:low."""
    mask = (1 << high - low + 1) - 1 << low
    return register & ~mask & _MASK32 | value << low


_TOPOLOGY_LEAVES = (0xB, 0x1F)

if TYPE_CHECKING:
    Edit = Callable[[Entry, Topology], Entry]

_COMMON_EDITS = {1: _features, 0x8000_0006: _l2_l3}
_INTEL_EDITS = {
    **_COMMON_EDITS,
    4: _cache,
    6: _intel_power,
    7: _intel_extended_features,
    0xA: _no_pmu,
    **dict.fromkeys(_BRAND_LEAVES, _brand),
}
_AMD_EDITS = {
    **_COMMON_EDITS,
    7: _amd_structured_features,
    0x8000_0001: _amd_extended_features,
    0x8000_0008: _amd_sizes,
    0x8000_001D: _cache,
    0x8000_001E: _amd_apic_id,
    **dict.fromkeys(_BRAND_LEAVES, _brand),
}
