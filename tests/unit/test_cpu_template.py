"""CPU templates: what their text means, which bits they change, and which hosts a static one is for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from crackle.arch.x86_64 import static_templates
from crackle.arch.x86_64.template import Change, Template, apply, changed, custom
from crackle.errors import ConfigError
from crackle.kvm import CpuidEntry
from crackle.schema.cpu import CpuConfig, bits, number
from crackle.vmm.files import read_template

ALL = 0xFFFF_FFFF
# This one's CPUID says that it is Milan; every feature is there.
MILAN = [
    CpuidEntry(0, 0, 0, 0xD, 0x68747541, 0x444D4163, 0x69746E65),
    CpuidEntry(1, 0, 0, 0xA0_0F11, 0, ALL, ALL),
    CpuidEntry(7, 0, 1, 1, ALL, ALL, ALL),
    CpuidEntry(0xD, 0, 1, 0x2FF, 0, 0, 0),
    CpuidEntry(0xD, 1, 1, 0xF, 0, 0, 0),
    CpuidEntry(0x8000_0001, 0, 0, 0, 0, ALL, ALL),
    CpuidEntry(0x8000_0008, 0, 0, 0, ALL & ~(1 << 2), 0, 0),
]


@pytest.mark.parametrize(
    ("text", "size", "said", "value"),
    [
        ("0b1", 32, 1, 1),
        ("0bx_0", 32, 1, 0),
        ("0b10xx_01xx", 64, 0b1100_1100, 0b1000_0100),
        ("1x", 32, 2, 2),
        ("", 32, 0, 0),
        ("0x1", 32, 0b101, 0b001),
        ("0b" + "1" * 32, 32, ALL, ALL),
        ("0b" + "x" * 31 + "0", 32, 1, 0),
    ],
)
def test_a_bit_map_says_which_bits_become_what(text: str, size: int, said: int, value: int) -> None:
    assert bits(text, size) == (said, value)


@pytest.mark.parametrize(
    ("text", "size", "words"),
    [
        ("0b2", 32, "unknown character: '2'"),
        ("0b" + "x" * 33, 32, "too long for 32 bits"),
        ("0b" + "0" * 65, 64, "too long for 64 bits"),
    ],
)
def test_what_is_no_bit_map_is_refused(text: str, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bits(text, size)


@pytest.mark.parametrize("text", ["1", "", "0x", "0xg", "0b2", "0x1ffffffff", "0x-1", "0b1_0", "0x ٣"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        number(text)
    with pytest.raises(msgspec.ValidationError, match="number"):
        msgspec.convert({"msr_modifiers": [{"addr": text, "bitmap": ""}]}, CpuConfig)


@pytest.mark.parametrize("text", ["x", "-1", "!", "", "1!", "4294967296", "٣"])
def test_what_is_no_capability_is_refused(text: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="as a kvm capability"):
        msgspec.convert({"kvm_capabilities": [text]}, CpuConfig)


@pytest.mark.parametrize("name", ["reg_modifiers", "vcpu_features"])
def test_what_is_for_aarch64_is_refused(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"unknown field `{name}`.*aarch64"):
        msgspec.convert({name: []}, CpuConfig)


def test_a_custom_template_changes_its_bits_in_the_order_given_and_no_others() -> None:
    leaf = {"leaf": "0x7", "subleaf": "0b0", "flags": 1}
    described: dict[str, Any] = {
        "kvm_capabilities": ["7", "!8", "9", "!9"],
        "cpuid_modifiers": [
            leaf | {"modifiers": [{"register": "ebx", "bitmap": "0b0xx1"}]},
            leaf | {"modifiers": [{"register": "ebx", "bitmap": "0b1xx0"}]},
        ],
        "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b10"}],
    }
    template = custom(msgspec.convert(described, CpuConfig))
    assert template.capabilities == (7,)
    assert template.msrs == ((0x10A, 3, 2),)
    after = changed(template, MILAN)
    assert after[2].ebx == ALL & ~1
    assert [entry for entry in after if entry.function != 7] == [
        entry for entry in MILAN if entry.function != 7
    ]


def test_what_kvm_does_not_have_is_told_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"CPUID entry not supported by KVM: Leaf: 1f, Subleaf: 2$"):
        changed(Template((Change(0x1F, 2, 0, ()),)), MILAN)


class Vcpu:
    """Takes what it is given."""

    def __init__(self, msrs: dict[int, int]) -> None:
        self.msrs = msrs
        self.cpuid: list[CpuidEntry] = []

    def set_cpuid2(self, entries: list[CpuidEntry]) -> None:
        self.cpuid = entries

    def get_msrs(self, indices: list[int]) -> dict[int, int]:
        assert self.cpuid, "CPUID decides which there are"
        return {index: self.msrs[index] for index in indices if index in self.msrs}

    def set_msrs(self, values: dict[int, int]) -> None:
        self.msrs |= values


class Kvm:
    def supported_cpuid(self) -> list[CpuidEntry]:
        return MILAN

    def msr_index_list(self) -> list[int]:
        return [0x10A, 0x1A0]

    def check_extension(self, number: int) -> int:
        return number < 1000


def applied(template: Template, count: int = 2) -> list[Vcpu]:
    vcpus = [Vcpu({0x10A: 0xF0, 0x1A0: 1, 0x9999: 5}) for _ in range(count)]
    kvm: Any = Kvm()
    apply(template, kvm, vcpus, smt=False)  # type: ignore[arg-type]
    return vcpus


def test_every_vcpu_gets_it_and_what_a_kernel_expects_at_its_start_stays() -> None:
    template = Template(
        (Change(1, 0, None, (("ecx", 1 << 12, 0),)),), ((0x10A, 0xFF, 0x0F), (0x1A0, ALL, ALL))
    )
    for index, vcpu in enumerate(applied(template)):
        (leaf,) = [entry for entry in vcpu.cpuid if entry.function == 1]
        assert not leaf.ecx >> 12 & 1
        assert leaf.ebx >> 24 == index, "each is still one of these"
        assert vcpu.msrs[0x10A] == 0x0F
        assert vcpu.msrs[0x1A0] == 1


def test_a_register_that_a_snapshot_would_not_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Failed to get KVM vcpu msr: 0x9999$"):
        applied(Template((), ((0x9999, 1, 1),)))


def test_a_capability_that_is_not_there_is_told() -> None:
    applied(Template((), (), (999,)))
    with pytest.raises(ConfigError, match=r"Missing KVM capabilities: 0x3e8$"):
        applied(Template((), (), (1000,)))


@pytest.mark.parametrize("name", ["C3", "T2", "T2S", "T2CL"])
def test_a_static_template_is_for_its_vendor(name: str) -> None:
    with pytest.raises(ConfigError, match=f"vendor mismatched.*{name} is for GenuineIntel"):
        static_templates.named(name, MILAN)


def test_a_static_template_is_for_its_models() -> None:
    assert static_templates.named("T2A", MILAN) == static_templates.made("T2A")
    other = [MILAN[0], MILAN[1]._replace(eax=0x80_0F12), *MILAN[2:]]
    with pytest.raises(ConfigError, match=r"not permitted.*0x800f12 here; T2A is for 0xa00f11"):
        static_templates.named("T2A", other)


@pytest.mark.parametrize("name", ["C3", "T2", "T2S", "T2CL", "T2A"])
def test_a_static_template_hides_vectors_of_512_bits_and_keeps_what_kernels_need(name: str) -> None:
    after = {(e.function, e.index): e for e in changed(static_templates.made(name), MILAN)}
    assert after[1, 0].eax & 0x0FFF_3FFF in (0x3_06E4, 0x3_06F2)
    assert not after[7, 0].ebx >> 16 & 1, "avx512f"
    assert after[0xD, 0].eax == 0b111, "x87, SSE and AVX alone"
    assert after[1, 0].edx >> 12 & 1, "mtrr"
    assert after[0x8000_0001, 0].edx >> 29 & 1, "64-bit mode"


def test_t2a_and_t2cl_have_the_same_instructions() -> None:
    """But those that AMD's processors tell in another place."""
    amd, intel = (changed(static_templates.made(name), MILAN) for name in ("T2A", "T2CL"))
    for one, other in zip(amd[:5], intel[:5], strict=True):
        assert one == other


def test_a_file_that_is_no_template_is_told(tmp_path: Any) -> None:
    path = tmp_path / "template"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_template(str(path))
    path.write_text('{"cpuid_modifiers": 1}')
    with pytest.raises(ConfigError, match="is no CPU template: Expected `array`"):
        read_template(str(path))
    path.write_text('{"kvm_capabilities": ["56"]}')
    assert read_template(str(path)) == CpuConfig(kvm_capabilities=["56"])
