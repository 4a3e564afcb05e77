"""CPUID of each vCPU: the topology of this machine, and what is hidden from or promised to the guest."""

from __future__ import annotations

import struct
from collections import namedtuple

import pytest

from crackle.arch.x86_64.cpuid import normalise
from crackle.errors import ConfigError

Entry = namedtuple("Entry", "function index flags eax ebx ecx edx")
Key = tuple[int, int]
ALL = 0xFFFF_FFFF


def text(*leaves: int, string: bytes) -> list[Entry]:
    """Brand string leaves."""
    parts = struct.iter_unpack("<4I", string.ljust(16 * len(leaves), b"\0"))
    return [Entry(leaf, 0, 0, *part) for leaf, part in zip(leaves, parts, strict=True)]


def vendor(name: bytes) -> Entry:
    ebx, edx, ecx = struct.unpack("<III", name)
    return Entry(0, 0, 0, 0x1F, ebx, ecx, edx)


BRAND = (0x8000_0002, 0x8000_0003, 0x8000_0004)
KVM_LEAVES = [
    Entry(0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D564B, 0x564B4D56, 0x4D),
    Entry(0x4000_0001, 0, 0, 0x01007EFB, 0, 0, 0),
]
COMMON = [
    Entry(1, 0, 0, 0x00A10F11, 0xAB_CD_EF_12, 0x7FFF_FFFF, ALL),
    Entry(0xB, 0, 1, 1, 2, 0x100, 99),
    Entry(0x8000_0006, 0, 0, 1, 2, 3, ALL),
    *KVM_LEAVES,
]
INTEL = [
    vendor(b"GenuineIntel"),
    *COMMON,
    Entry(4, 0, 1, 1 << 5 | 1 | ALL & 0xFFFF_C000, 1, 2, 3),
    Entry(4, 1, 1, 1 << 5 | 2, 1, 2, 3),
    Entry(4, 2, 1, 2 << 5 | 3, 1, 2, 3),
    Entry(4, 3, 1, 3 << 5 | 3, 1, 2, 3),
    Entry(4, 4, 1, 0, 0, 0, 0),
    Entry(6, 0, 0, ALL, 5, ALL, 7),
    Entry(7, 0, 1, 1, 0, ALL, ALL),
    Entry(7, 1, 1, 0, 0, ALL, 0),
    Entry(0xA, 0, 0, 1, 2, 3, 4),
    Entry(0x1F, 0, 1, 9, 9, 9, 9),
    *text(*BRAND, string=b"Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz"),
]
AMD = [
    vendor(b"AuthenticAMD"),
    *COMMON,
    Entry(7, 0, 1, 1, 0, ALL, ALL),
    Entry(0x8000_0001, 0, 0, 0, 0, 0, 0),
    *text(*BRAND, string=b"AMD EPYC 7R13 48-Core Processor"),
    Entry(0x8000_0008, 0, 0, 0x3030, 5, ALL, 6),
    Entry(0x8000_001D, 0, 1, 1 << 5 | 1, 1, 2, 3),
    Entry(0x8000_001D, 1, 1, 2 << 5 | 3, 1, 2, 3),
    Entry(0x8000_001D, 2, 1, 3 << 5 | 3 | 7 << 14, 1, 2, 3),
    Entry(0x8000_001D, 3, 1, 0, 0, 0, 0),
    Entry(0x8000_001E, 0, 0, 0, 0, 0, 0),
]


def cpuid(host: list[Entry], index: int = 0, count: int = 1, smt: bool = False) -> dict[Key, Entry]:
    result = normalise(host, index, count, smt)
    found = {(entry.function, entry.index): entry for entry in result}
    assert len(found) == len(result), "each leaf once"
    return found


def bits(register: int, high: int, low: int) -> int:
    return register >> low & (1 << high - low + 1) - 1


@pytest.mark.parametrize("host", [INTEL, AMD])
@pytest.mark.parametrize(("count", "addressable"), [(1, 1), (2, 2), (3, 4), (4, 4), (17, 32), (32, 32)])
def test_leaf_1_names_the_vcpu_and_its_package(host: list[Entry], count: int, addressable: int) -> None:
    for index in range(count):
        leaf = cpuid(host, index, count)[1, 0]
        assert leaf.eax == 0x00A10F11
        assert bits(leaf.ebx, 31, 24) == index
        assert bits(leaf.ebx, 23, 16) == addressable
        assert bits(leaf.ebx, 15, 8) == 8, "cache line of 64 bytes for CLFLUSH"
        assert bits(leaf.ebx, 7, 0) == 0x12
        assert bits(leaf.edx, 28, 28) == (count > 1)


def test_leaf_1_always_shows_the_hypervisor_and_the_deadline_timer_and_never_pdcm() -> None:
    ecx = cpuid(AMD)[1, 0].ecx
    assert bits(ecx, 31, 31) == 1
    assert bits(ecx, 24, 24) == 1
    assert bits(ecx, 15, 15) == 0
    bare = [entry._replace(ecx=0) if entry.function == 1 else entry for entry in AMD]
    assert cpuid(bare)[1, 0].ecx == 1 << 31 | 1 << 24


def test_kvms_own_leaves_are_kept() -> None:
    found = cpuid(AMD)
    assert [found[leaf.function, 0] for leaf in KVM_LEAVES] == KVM_LEAVES


@pytest.mark.parametrize(
    ("count", "smt", "shift", "threads"),
    [(1, False, 0, 1), (1, True, 0, 1), (4, False, 0, 1), (4, True, 1, 2)],
)
def test_leaf_b_enumerates_threads_and_cores(count: int, smt: bool, shift: int, threads: int) -> None:
    for index in range(count):
        found = cpuid(INTEL, index, count, smt)
        assert found[0xB, 0][2:] == (1, shift, threads, 0x100, index)
        assert found[0xB, 1][2:] == (1, 5, count, 0x201, index)
        assert found[0xB, 2][2:] == (1, 0, 0, 2, index)


def test_leaf_1f_says_the_same_where_the_host_has_it() -> None:
    found = cpuid(INTEL, 1, 2)
    assert all(found[0x1F, level][2:] == found[0xB, level][2:] for level in range(3))
    assert (0x1F, 0) not in cpuid(AMD)


def test_leaf_b_is_made_up_where_the_host_has_none() -> None:
    host = [entry for entry in AMD if entry.function != 0xB]
    assert cpuid(host, 3, 4)[0xB, 1][2:] == (1, 5, 4, 0x201, 3)


@pytest.mark.parametrize(
    ("count", "smt", "threads"), [(1, False, 1), (4, False, 1), (4, True, 2), (3, True, 2)]
)
@pytest.mark.parametrize(("host", "leaf", "l3"), [(INTEL, 4, 3), (AMD, 0x8000_001D, 2)])
def test_caches_are_shared_as_the_topology_says(
    host: list[Entry], leaf: int, l3: int, count: int, smt: bool, threads: int
) -> None:
    found = cpuid(host, 0, count, smt)
    for index in range(l3):
        assert bits(found[leaf, index].eax, 25, 14) == threads - 1
    assert bits(found[leaf, l3].eax, 25, 14) == count - 1
    assert found[leaf, l3 + 1].eax == 0, "no cache type: the list ends"
    if host is INTEL:
        assert {bits(found[4, index].eax, 31, 26) for index in range(4)} == {count // threads - 1}


def test_cache_geometry_is_the_hosts() -> None:
    found = cpuid(INTEL)
    assert found[4, 1][4:] == (1, 2, 3)
    assert bits(found[4, 1].eax, 13, 0) == 1 << 5 | 2


def test_intel_power_features_and_counters_are_hidden() -> None:
    found = cpuid(INTEL)
    assert found[6, 0][3:] == (ALL & ~(1 << 1), 5, ALL & ~(1 << 3), 7)
    assert found[0xA, 0][3:] == (0, 0, 0, 0)


def test_intel_leaf_7_hides_waitpkg_and_has_the_x87_changes() -> None:
    leaf = cpuid(INTEL)[7, 0]
    assert leaf.ebx == 1 << 6 | 1 << 13
    assert leaf.ecx == ALL & ~(1 << 5)
    assert cpuid(INTEL)[7, 1].ecx == ALL


def brand(found: dict[Key, Entry]) -> bytes:
    return b"".join(struct.pack("<4I", *found[leaf, 0][3:]) for leaf in BRAND).rstrip(b"\0")


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        (b"Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", b"Intel(R) Xeon(R) Processor @ 2.90GHz"),
        (b"Intel(R) Something 800MHz", b"Intel(R) Xeon(R) Processor @ 800MHz"),
        (b"Intel(R) Xeon(R) 6975P-C", b"Intel(R) Xeon(R) Processor"),
        (b"Intel @ fastGHz", b"Intel(R) Xeon(R) Processor"),
        (b"", b"Intel(R) Xeon(R) Processor"),
    ],
)
def test_intels_brand_string_keeps_only_the_frequency(host: bytes, shown: bytes) -> None:
    others = [entry for entry in INTEL if entry.function not in BRAND]
    assert brand(cpuid(others + text(*BRAND, string=host))) == shown


def test_amds_brand_string_tells_no_model() -> None:
    assert brand(cpuid(AMD)) == b"AMD EPYC"


@pytest.mark.parametrize(
    ("index", "count", "smt", "core", "threads"), [(0, 1, 0, 0, 1), (5, 8, 0, 5, 1), (5, 8, 1, 2, 2)]
)
def test_amd_topology_leaves(index: int, count: int, smt: int, core: int, threads: int) -> None:
    found = cpuid(AMD, index, count, bool(smt))
    assert bits(found[0x8000_0001, 0].ecx, 22, 22) == 1, "topology extensions"
    sizes = found[0x8000_0008, 0]
    assert bits(sizes.ecx, 7, 0) == count - 1
    assert bits(sizes.ecx, 15, 12) == 7
    assert bits(sizes.ecx, 11, 8) == 0xF, "reserved bits are as they were"
    leaf = found[0x8000_001E, 0]
    assert (leaf.eax, bits(leaf.ebx, 7, 0), bits(leaf.ebx, 15, 8), leaf.ecx) == (index, core, threads - 1, 0)


def test_the_amd_apic_id_leaf_is_made_up_where_the_host_has_none() -> None:
    host = [entry for entry in AMD if entry.function != 0x8000_001E]
    assert cpuid(host, 1, 2)[0x8000_001E, 0][3:] == (1, 1, 0, 0)


def test_amd_has_no_arch_capabilities() -> None:
    assert cpuid(AMD)[7, 0].edx == ALL & ~(1 << 29)
    assert cpuid(INTEL)[7, 0].edx == ALL


def test_reserved_bits_of_the_l3_leaf_are_zero() -> None:
    assert cpuid(AMD)[0x8000_0006, 0].edx == ALL & ~0x30000


def test_another_vendor_keeps_what_is_its_own() -> None:
    host = [vendor(b"HygonGenuine"), *AMD[1:]]
    found = cpuid(host, 1, 2)
    assert brand(found) == b"AMD EPYC 7R13 48-Core Processor"
    assert bits(found[1, 0].ebx, 31, 24) == 1
    assert found[0xB, 1].edx == 1


def test_the_hosts_entries_are_not_changed() -> None:
    host = list(INTEL)
    normalise(host, 1, 2, True)
    assert host == INTEL


@pytest.mark.parametrize(("index", "count"), [(0, 0), (1, 1), (-1, 2), (0, 33), (32, 32)])
def test_a_vcpu_that_cannot_be_is_refused(index: int, count: int) -> None:
    with pytest.raises(ConfigError, match=f"vCPU {index} of {count}"):
        normalise(AMD, index, count, False)


def test_a_host_without_the_basic_leaves_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaf 0 or 1"):
        normalise(KVM_LEAVES, 0, 1, False)
