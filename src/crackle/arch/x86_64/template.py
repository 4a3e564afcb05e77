"""A CPU template: which bits of CPUID and of MSRs are set and cleared before a guest sees them.

It changes what KVM supports; after it comes what makes the vCPUs those of one machine (`cpuid.normalise`), and the
registers that a kernel expects at its start (`msr.boot_msrs`), which a template does not change. A guest that was saved
has all of that in its state.
"""

from __future__ import annotations

import msgspec

from crackle.arch.x86_64.cpuid import normalise
from crackle.arch.x86_64.msr import boot_msrs, saved_msrs
from crackle.errors import ConfigError
from crackle.schema.cpu import CpuConfig, bits, capability, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from crackle.kvm import CpuidEntry, Kvm, Vcpu


class Change(msgspec.Struct, frozen=True):
    """What becomes of one entry of CPUID. registers: of each its name, which bits change, and what they become.

    flags: of the entry from now on; None leaves them.
    """

    function: int
    index: int
    flags: int | None
    registers: tuple[tuple[str, int, int], ...]


class Template(msgspec.Struct, frozen=True):
    """cpuid: in this order. msrs: of each its number, which bits change, and what they become.

    capabilities: numbers of what KVM must be able to do.
    """

    cpuid: tuple[Change, ...]
    msrs: tuple[tuple[int, int, int], ...] = ()
    capabilities: tuple[int, ...] = ()


def custom(config: CpuConfig) -> Template:
    """The template that a configuration describes."""
    asked = dict(capability(text) for text in config.kvm_capabilities)
    return Template(
        tuple(
            Change(
                number(leaf.leaf),
                number(leaf.subleaf),
                leaf.flags,
                tuple((each.register, *bits(each.bitmap, 32)) for each in leaf.modifiers),
            )
            for leaf in config.cpuid_modifiers
        ),
        tuple((number(each.addr), *bits(each.bitmap, 64)) for each in config.msr_modifiers),
        tuple(each for each, wanted in asked.items() if wanted),
    )


def apply(template: Template, kvm: Kvm, vcpus: Sequence[Vcpu], *, smt: bool) -> None:
    """Change vCPUs that are prepared and have not run. ConfigError, with its place, for what this KVM does not have."""
    for each in template.capabilities:
        if not kvm.check_extension(each):
            raise ConfigError(f"Kvm error: Missing KVM capabilities: {each:#x}")
    entries = changed(template, kvm.supported_cpuid())
    for index, vcpu in enumerate(vcpus):
        vcpu.set_cpuid2(normalise(entries, index, len(vcpus), smt))
    listed = kvm.msr_index_list()
    # CPUID first, which decides what they are.
    msrs = _changed_msrs(template, vcpus[0], frozenset(saved_msrs(listed)))
    if msrs:
        at_boot = boot_msrs(frozenset(listed))
        for vcpu in vcpus:
            vcpu.set_msrs({**msrs, **at_boot})


_NO_CONFIG = "System configuration error: Failed to create guest config"


def changed(template: Template, supported: Sequence[CpuidEntry]) -> list[CpuidEntry]:
    """The entries of CPUID, changed. ConfigError for one that is not there."""
    entries = {(entry.function, entry.index): entry for entry in supported}
    for change in template.cpuid:
        place = change.function, change.index
        entry = entries.get(place)
        if entry is None:
            raise ConfigError(
                f"{_NO_CONFIG}: Template changes a CPUID entry not supported by KVM: "
                f"Leaf: {change.function:x}, Subleaf: {change.index:x}"
            )
        if change.flags is not None:
            entry = entry._replace(flags=change.flags)
        for register, mask, value in change.registers:
            entry = entry._replace(**{register: getattr(entry, register) & ~mask | value})
        entries[place] = entry
    return list(entries.values())


def _changed_msrs(template: Template, vcpu: Vcpu, saved: frozenset[int]) -> dict[int, int]:
    values = vcpu.get_msrs([index for index, _, _ in template.msrs if index in saved])
    for index, mask, value in template.msrs:
        if index not in values:
            # Nor one that a snapshot would not hold.
            raise ConfigError(f"{_NO_CONFIG}: KVM vcpu ioctl failed: Failed to get KVM vcpu msr: {index:#x}")
        values[index] = values[index] & ~mask | value
    return values
