"""Custom CPU templates (``/cpu-config``): which bits a guest sees of its processor are set and cleared.

Numbers and bit maps are strings: ``0x...`` or ``0b...``; a bit map has ``x`` for each bit that stays as it is, as do
those in front of it that it does not mention, and ``_`` where its reader wants one.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from crackle.schema._base import U32, Resource

_PREFIXES = {"0x": (16, "0123456789abcdefABCDEF"), "0b": (2, "01")}


class CpuidRegisterModifier(Resource):
    """Which bits of a CPUID register to set and clear."""

    register: Literal["eax", "ebx", "ecx", "edx"]
    bitmap: str

    def __post_init__(self) -> None:
        bits(self.bitmap, 32)


class CpuidLeafModifier(Resource):
    """The modified registers of one CPUID leaf and subleaf. flags: of the entry, as KVM has them (KVM_SET_CPUID2)."""

    leaf: str
    subleaf: str
    flags: U32
    modifiers: list[CpuidRegisterModifier]

    def __post_init__(self) -> None:
        number(self.leaf)
        number(self.subleaf)


class RegisterModifier(Resource):
    """Which bits of an MSR (or, on aarch64, of a system register) to set and clear."""

    addr: str
    bitmap: str

    def __post_init__(self) -> None:
        number(self.addr)
        bits(self.bitmap, 64)


class VcpuFeatures(Resource):
    """Which bits of an aarch64 vCPU feature word to set and clear."""

    index: U32
    bitmap: str


class CpuConfig(Resource, omit_defaults=True):
    """Changes to what the guest sees of its processor, and numbers of capabilities that KVM must have.

    A capability with ``!`` in front is not asked for on the template's account. What is only for aarch64 is refused.
    ValueError for texts that mean nothing.
    """

    kvm_capabilities: list[str] = msgspec.field(default_factory=list)
    cpuid_modifiers: list[CpuidLeafModifier] = msgspec.field(default_factory=list)
    msr_modifiers: list[RegisterModifier] = msgspec.field(default_factory=list)
    reg_modifiers: list[RegisterModifier] | msgspec.UnsetType = msgspec.UNSET
    vcpu_features: list[VcpuFeatures] | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        for name in ("reg_modifiers", "vcpu_features"):
            if getattr(self, name) is not msgspec.UNSET:
                raise ValueError(
                    f"unknown field `{name}`, expected one of `kvm_capabilities`, `cpuid_modifiers`, `msr_modifiers`: "
                    "it is for aarch64"
                )
        for text in self.kvm_capabilities:
            capability(text)


def number(text: str) -> int:
    """Of 32 bits. ValueError, which msgspec gives a place in the JSON, where it is none."""
    base, digits = _PREFIXES.get(text[:2], (0, ""))
    if not base:
        raise ValueError(
            f"No supported number system prefix found in value [{text}]. Make sure to prefix the number with '0x' for "
            "hexadecimal numbers or '0b' for binary numbers."
        )
    value = text[2:]
    if not value or value.strip(digits):
        raise ValueError(f"Failed to parse string [{text}] as a number for CPU template - it is none")
    if int(value, base) >> 32:
        raise ValueError(
            f"Failed to parse string [{text}] as a number for CPU template - it has more than 32 bits"
        )
    return int(value, base)


def bits(text: str, size: int) -> tuple[int, int]:
    """Which of `size` bits a bit map says something about, and those of them that it sets. ValueError as `number`."""
    said = value = length = 0
    for character in reversed(text.removeprefix("0b")):
        if character == "_":
            continue
        if length == size:
            raise ValueError(
                f"Failed to parse string [{text}] as a bitmap - string is too long for {size} bits"
            )
        if character not in "01x":
            raise ValueError(
                f"Failed to parse string [{text}] as a bitmap - unknown character: {character!r}"
            )
        said |= (character != "x") << length
        value |= (character == "1") << length
        length += 1
    return said, value


def capability(text: str) -> tuple[int, bool]:
    """The number of a capability, and whether it is asked for. ValueError as `number`."""
    digits = text.removeprefix("!")
    if not (digits.isascii() and digits.isdecimal()) or int(digits) >> 32:
        raise ValueError(
            f"Failed to parse string [{text}] as a kvm capability - can not convert to numeric: "
            "it is no number of 32 bits"
        )
    return int(digits), digits == text
