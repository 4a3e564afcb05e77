"""What a guest has seen of its CPU is there where it goes on, or the names of what is not are told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from crackle.arch.x86_64.compatibility import check_vcpus
from crackle.arch.x86_64.state import VcpuState, restore_vcpus, rewind_vcpus, save_vcpu
from crackle.errors import ConfigError
from crackle.kvm import CpuidEntry
from support.snapshots import VCPU

EAX, EBX, ECX, EDX = range(3, 7)
# Leaf, subleaf, flags, four registers.
HERE = [
    CpuidEntry(0, 0, 0, 0xD, 0x68747541, 0x444D4163, 0x69746E65),
    CpuidEntry(1, 0, 0, 0x800F12, 0, 1 << 0 | 1 << 31, 1 << 4),
    CpuidEntry(7, 0, 1, 1, 1 << 5, 0, 0),
    CpuidEntry(0x4000_0001, 0, 0, 1, 0, 0, 0),
]


class Kvm:
    def msr_index_list(self) -> list[int]:
        return [0x10, 0x6E0]


class Vcpu:
    def get_cpuid2(self) -> list[CpuidEntry]:
        return HERE


def told(state: VcpuState, *others: VcpuState) -> list[str]:
    kvm: Any = Kvm()
    vcpu: Any = Vcpu()
    return check_vcpus(kvm, [vcpu], [state, *others])


def saved(**fields: Any) -> VcpuState:
    leaves = tuple(tuple(entry) for entry in HERE)
    return msgspec.structs.replace(VCPU, **{"cpuid": leaves, **fields})


def with_bits(function: int, register: int, bits: int) -> tuple[tuple[int, ...], ...]:
    """CPUID with these bits set as well."""
    leaves = []
    for entry in HERE:
        leaf = list(entry)
        if entry.function == function:
            leaf[register] |= bits
        leaves.append(tuple(leaf))
    return tuple(leaves)


def test_the_same_cpu_is_told_nothing_of() -> None:
    assert told(saved()) == []


@pytest.mark.parametrize(
    ("function", "register", "bits", "names"),
    [
        (1, ECX, 1 << 25, "aes"),
        (1, ECX, 1 << 28 | 1 << 12, "fma, avx"),
        (1, EDX, 1 << 26, "sse2"),
        (7, EBX, 1 << 16 | 1 << 3, "bmi1, avx512f"),
        (7, ECX, 1 << 23, "CPUID 0x7:0 ecx bit 23"),
        (7, EDX, 1 << 22, "amx_bf16"),
        (0x4000_0001, EAX, 1 << 24, "kvm_clocksource_stable"),
    ],
)
def test_a_feature_that_is_missing_is_named(function: int, register: int, bits: int, names: str) -> None:
    with pytest.raises(ConfigError, match=f"saved on: {names}. Load it on a host that has all of it."):
        told(saved(cpuid=with_bits(function, register, bits)))


def test_a_leaf_that_is_missing_has_no_features() -> None:
    leaves = (*saved().cpuid, (0xD, 1, 1, 1, 0, 0, 0))
    with pytest.raises(ConfigError, match="xsaveopt"):
        told(saved(cpuid=leaves))


@pytest.mark.parametrize(
    ("function", "register", "bits"), [(1, ECX, 1 << 27), (7, ECX, 1 << 4), (1, ECX, 1 << 3)]
)
def test_what_follows_the_guests_own_settings_is_no_feature(function: int, register: int, bits: int) -> None:
    assert told(saved(cpuid=with_bits(function, register, bits))) == []


def test_a_register_that_is_missing_is_named_unless_it_holds_nothing() -> None:
    assert told(saved(msrs={0x10: 5, 0xC000_0104: 0})) == []
    with pytest.raises(ConfigError, match="MSR 0xc0000104"):
        told(saved(), saved(msrs={0x10: 5, 0xC000_0104: 1}))


def test_what_is_only_unlike_is_told() -> None:
    leaves = [list(leaf) for leaf in saved().cpuid]
    leaves[0][EBX] = 0x756E6547
    leaves[1][EAX] = 0x50654
    assert told(saved(cpuid=tuple(map(tuple, leaves)))) == [
        "The snapshot is from a CPU of another vendor than this host's.",
        "The snapshot is from another model of CPU (0x50654) than this host's (0x800f12).",
    ]


class Registers:
    """A vCPU that notes in which order it is given what."""

    tsc_khz = 2_000_000
    index = 0
    tsc_offset: int | None = None

    def __init__(self, **fields: Any) -> None:
        self.given: list[tuple[str, Any]] = []
        self._fields = {"get_xsave": bytes(4096), "get_nested_state": b"", "get_pdptrs": (), **fields}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("set_"):
            return lambda *values: self.given.append((name[4:], values if len(values) > 1 else values[0]))
        return lambda *_: self._fields[name]


def given_to(vcpu: Registers, state: VcpuState) -> dict[str, Any]:
    kvm: Any = Kvm()
    target: Any = vcpu
    restore_vcpus(kvm, [target], [state])
    return dict(vcpu.given)


def test_registers_are_restored_in_the_order_in_which_they_depend_on_each_other() -> None:
    vcpu = Registers(get_nested_state=b"fresh")
    given_to(vcpu, saved(msrs={0x6E0: 9, 0x10: 5}, nested=b"guest of a guest"))
    order = [name for name, _ in vcpu.given]
    assert order.index("cpuid2") == 0
    assert order.index("sregs") < order.index("lapic") < order.index("msrs") < order.index("nested_state")
    assert order[-1] == "vcpu_events"
    assert [value for name, value in vcpu.given if name == "msrs"] == [{}, {0x10: 5}, {0x6E0: 9}]


def test_page_directory_pointers_are_restored_where_there_are_some() -> None:
    assert given_to(Registers(), saved(sregs={"cr3": 1}))["sregs"] == {"cr3": 1}
    given = given_to(Registers(), saved(sregs={"cr3": 1}, pdptrs=(1, 2, 3, 4)))
    assert given["sregs_with_pdptrs"] == ({"cr3": 1}, (1, 2, 3, 4))
    assert "sregs" not in given


class Ticking(Registers):
    """A vCPU whose TSC is that of a host, and an offset."""

    host = 1000

    def __init__(self) -> None:
        super().__init__(get_lapic=bytes(1024))
        self.tsc_offset = 7

    def get_msrs(self, _indices: object) -> dict[int, int]:
        Ticking.host += 10
        assert self.tsc_offset is not None
        return {0x10: self.host + self.tsc_offset & (1 << 64) - 1}


SECOND = 2_000_000_000


@pytest.mark.parametrize(
    ("states", "apart"),
    [
        # As of other moments, and apart as their offsets were.
        ([saved(msrs={0x10: 500}, tsc_offset=5), saved(msrs={0x10: 9500}, tsc_offset=5)], 0),
        ([saved(msrs={0x10: 500}, tsc_offset=5), saved(msrs={0x10: 9500}, tsc_offset=3)], -2),
        ([saved(msrs={0x10: 500}, tsc_offset=(1 << 64) - 5), saved(msrs={0x10: 9}, tsc_offset=5)], 10),
        # Of an older snapshot.
        ([saved(msrs={0x10: 500}), saved(msrs={0x10: 500 + SECOND - 1})], 0),
        ([saved(msrs={0x10: 500}), saved(msrs={0x10: 500 + SECOND})], SECOND),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_time_stamp_counters_stay_as_far_apart_as_they_were(
    states: list[VcpuState], apart: int, again: bool
) -> None:
    vcpus: list[Any] = [Ticking(), Ticking()]
    kvm: Any = Kvm()
    restore_vcpus(kvm, vcpus, states)
    if again:
        Ticking.host += 3 * SECOND
        rewind_vcpus(vcpus, states)
    # The first goes on from where it stood.
    assert vcpus[0].tsc_offset + Ticking.host & (1 << 64) - 1 == 500
    assert (vcpus[1].tsc_offset - vcpus[0].tsc_offset - apart) % (1 << 64) == 0
    assert not any(name == "msrs" and 0x10 in value for vcpu in vcpus for name, value in vcpu.given)


def test_a_nested_state_that_a_new_vcpu_has_anyway_is_left_alone() -> None:
    assert "nested_state" not in given_to(Registers(get_nested_state=b"fresh"), saved(nested=b"fresh"))
    assert "nested_state" not in given_to(Registers(), saved())


def test_an_xsave_area_is_as_long_as_the_host_wants_it() -> None:
    assert given_to(Registers(get_xsave=bytes(8192)), saved(xsave=b"x" * 4096))[
        "xsave"
    ] == b"x" * 4096 + bytes(4096)
    assert given_to(Registers(), saved(xsave=b"x" * 4096 + bytes(4096)))["xsave"] == b"x" * 4096
    with pytest.raises(
        ConfigError, match="the guest's XSAVE area has 8192 bytes, this host's KVM takes 4096"
    ):
        given_to(Registers(), saved(xsave=b"x" * 8192))


@pytest.mark.parametrize(
    ("lvt", "deadline", "expected"),
    [
        (2 << 17 | 0xEC, 0, 77),
        (2 << 17 | 0xEC, 5, 5),
        (2 << 17 | 1 << 16 | 0xEC, 0, 0),
        (1 << 17 | 0xEC, 0, 0),
    ],
)
def test_a_deadline_that_may_just_have_passed_comes_again(lvt: int, deadline: int, expected: int) -> None:
    """Only where the guest waits for one."""
    lapic = bytearray(1024)
    lapic[0x320:0x324] = lvt.to_bytes(4, "little")
    fields = {f"get_{name}": b"" for name in ("xcrs", "debugregs", "vcpu_events")}
    vcpu: Any = Registers(
        get_lapic=bytes(lapic),
        get_msrs={0x10: 77, 0x6E0: deadline},
        get_mp_state=0,
        get_cpuid2=HERE,
        get_regs={},
        get_sregs={},
        **fields,
    )
    kvm: Any = Kvm()
    assert save_vcpu(kvm, vcpu).msrs[0x6E0] == expected
