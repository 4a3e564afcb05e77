"""What a stock kernel sees of a processor through a template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.linux.conftest import Guest

from crackle import CpuConfig
from crackle.arch.x86_64.features import FEATURES, bit_of
from crackle.arch.x86_64.static_templates import made

# Linux takes it to be there on an AMD processor with 64-bit mode, whatever CPUID says (arch/x86/kernel/cpu/amd.c).
IMPLIED = {"3dnowprefetch"}


def as_custom(name: str) -> tuple[CpuConfig, set[str], set[str]]:
    """The features of a static template for any processor; which it hides, and which it shows."""
    leaves = []
    hidden: set[str] = set()
    shown: set[str] = set()
    for change in made(name).cpuid:
        for register, mask, value in change.registers:
            place = change.function, change.index, register
            if place not in FEATURES:
                # Model and stepping.
                continue
            text = "".join(
                "x" if not mask >> bit & 1 else str(value >> bit & 1) for bit in reversed(range(32))
            )
            modifier = {"register": register, "bitmap": f"0b{text}"}
            flags = 1 if change.function in (7, 0xD) else 0
            leaves.append(
                {
                    "leaf": hex(change.function),
                    "subleaf": hex(change.index),
                    "flags": flags,
                    "modifiers": [modifier],
                }
            )
            for each in FEATURES[place].split():
                if each != "-" and mask & bit_of(*place, each):
                    (shown if value & bit_of(*place, each) else hidden).add(each)
    return CpuConfig(cpuid_modifiers=leaves), hidden, shown  # type: ignore[arg-type]


def test_a_stock_kernel_sees_the_features_of_a_template_and_no_others(
    boot: Callable[..., Guest], stock: dict[str, Path]
) -> None:
    seen = []
    template, hidden, shown = as_custom("T2A")
    for each in (None, template):
        guest = boot(stock["vmlinux"], initrd=stock["initrd"], cpus=2, cpu_template=each).wait_shell()
        flags = guest.sh("grep ^flags /proc/cpuinfo | sort -u").splitlines()
        assert len(flags) == 1, "each processor shows the same"
        seen.append(set(flags[0].partition(":")[2].split()))
        guest.vm.stop()
    plain, templated = seen
    assert plain & hidden, "this host has features that it hides"
    assert templated & hidden <= IMPLIED
    assert plain - templated == plain & hidden - IMPLIED
    assert templated - plain <= shown
