"""Custom CPU templates (``/cpu-config``).

Numbers and bit maps are strings: ``0x...``, and ``0b...`` with ``x`` for the bits that stay untouched.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from crackle.schema._base import U32, Resource


class CpuidRegisterModifier(Resource):
    """Which bits of a CPUID register to set and clear."""

    register: Literal["eax", "ebx", "ecx", "edx"]
    bitmap: str


class CpuidLeafModifier(Resource):
    """The modified registers of one CPUID leaf and subleaf."""

    leaf: str
    subleaf: str
    flags: U32
    modifiers: list[CpuidRegisterModifier]


class RegisterModifier(Resource):
    """Which bits of an MSR (or, on aarch64, of a system register) to set and clear."""

    addr: str
    bitmap: str


class VcpuFeatures(Resource):
    """Which bits of an aarch64 vCPU feature word to set and clear."""

    index: U32
    bitmap: str


class CpuConfig(Resource):
    """Changes to what the guest sees of its processor."""

    kvm_capabilities: list[str] = msgspec.field(default_factory=list)
    cpuid_modifiers: list[CpuidLeafModifier] = msgspec.field(default_factory=list)
    msr_modifiers: list[RegisterModifier] = msgspec.field(default_factory=list)
    reg_modifiers: list[RegisterModifier] = msgspec.field(default_factory=list)
    vcpu_features: list[VcpuFeatures] = msgspec.field(default_factory=list)
