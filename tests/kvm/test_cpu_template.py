"""CPU templates on this host's KVM: what its vCPUs have after them, at the start and after a snapshot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crackle import ConfigError, CpuConfig, MicroVM
from crackle.arch.x86_64.features import bit_of

# In leaves 1 and 7 there are KVMs that show what the host has, whatever they are told; a Linux guest looks at those.
HIDDEN = {(0x8000_0001, 0, "ecx"): ("abm", "lahf_lm"), (0x8000_0001, 0, "edx"): ("pdpe1gb",)}


def modifier(function: int, index: int, register: str, names: tuple[str, ...]) -> dict[str, Any]:
    bits = sum(bit_of(function, index, register, name) for name in names)
    text = "".join("0" if bits >> bit & 1 else "x" for bit in reversed(range(32)))
    return {
        "leaf": hex(function),
        "subleaf": hex(index),
        "flags": 0,
        "modifiers": [{"register": register, "bitmap": f"0b{text}"}],
    }


TEMPLATE = {"cpuid_modifiers": [modifier(*place, names) for place, names in HIDDEN.items()]}


def seen(vm: MicroVM) -> list[dict[tuple[int, int], Any]]:
    """Of each vCPU, the entries of its CPUID. KVM does not tell while it runs."""
    machine: Any = vm._controller.machine  # type: ignore[union-attr]
    vm.pause()
    try:
        return [
            {(entry.function, entry.index): entry for entry in vcpu.get_cpuid2()} for vcpu in machine.vcpus
        ]
    finally:
        vm.resume()


def guest(guests: Path, template: Any, **options: Any) -> MicroVM:
    return MicroVM(guests / "count.elf", boot_args="", memory=64, cpus=2, cpu_template=template, **options)


@pytest.fixture(params=["file", "object"])
def template(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    if request.param == "file":
        (tmp_path / "template.json").write_text(json.dumps(TEMPLATE))
        return tmp_path / "template.json"
    return CpuConfig(cpuid_modifiers=TEMPLATE["cpuid_modifiers"])  # type: ignore[arg-type]


def test_a_template_hides_its_features_on_every_vcpu_and_no_others(guests: Path, template: object) -> None:
    with guest(guests, None) as plain, guest(guests, template) as vm:
        for before, after in zip(seen(plain), seen(vm), strict=True):
            for (function, index, register), names in HIDDEN.items():
                bits = sum(bit_of(function, index, register, name) for name in names)
                entry = before[function, index]
                before[function, index] = entry._replace(**{register: getattr(entry, register) & ~bits})
            assert after == before
        vm.console.expect("count 2\n", timeout=20)


def test_a_guest_sees_the_same_after_a_snapshot_of_a_snapshot(guests: Path, tmp_path: Path) -> None:
    """The template is not applied again, and need not fit the host where it goes on."""
    custom = CpuConfig(cpuid_modifiers=TEMPLATE["cpuid_modifiers"])  # type: ignore[arg-type]
    with guest(guests, custom) as vm:
        vm.console.expect("count 2\n", timeout=20)
        at_first = seen(vm)
        vm.pause()
        vm.snapshot(tmp_path / "one")
    with MicroVM.restore(tmp_path / "one") as vm:
        vm.console.expect("count", timeout=20)
        assert seen(vm) == at_first
        vm.pause()
        vm.snapshot(tmp_path / "two")
    with MicroVM.restore(tmp_path / "two") as vm:
        assert seen(vm) == at_first


def test_a_template_reaches_a_process_of_its_own(guests: Path) -> None:
    custom = CpuConfig(kvm_capabilities=["9999"])
    with (
        pytest.raises(ConfigError, match="Missing KVM capabilities: 0x270f"),
        guest(guests, custom, own_process=True),
    ):
        pass
    with guest(guests, CpuConfig(kvm_capabilities=["!9999"]), own_process=True) as vm:
        vm.console.expect("count 1\n", timeout=20)


def test_a_refused_template_leaves_a_microvm_that_can_be_told_again(guests: Path) -> None:
    """A leaf that no KVM has; the one that comes then is used."""
    wrong = CpuConfig(cpuid_modifiers=[modifier(0x99, 0, "eax", ())])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="not supported by KVM: Leaf: 99, Subleaf: 0"), guest(guests, wrong):
        pass


def test_what_is_no_template_is_told(guests: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The CPU template cannot be read: No such file"):
        guest(guests, tmp_path / "none")
    with pytest.raises(ConfigError, match="cpu_template must be a path, not 5"):
        guest(guests, 5)
    with pytest.raises(ConfigError, match="CPU template error: Expected `str`, got `int`"):
        guest(guests, CpuConfig(cpuid_modifiers=[modifier(1, 0, "eax", ()) | {"leaf": 1}]))  # type: ignore[list-item]
