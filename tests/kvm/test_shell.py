"""A shell that was made for another configuration: what fits of it is used again, and nothing is left of the rest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.kvm.conftest import Process

from crackle.errors import ConfigError
from crackle.schema.machine import MachineConfig
from crackle.vmm.shell import Parts, Shell


def machine(mib: int = 64, vcpus: int = 1, *, track: bool = False) -> MachineConfig:
    return MachineConfig(vcpu_count=vcpus, mem_size_mib=mib, track_dirty_pages=track)


def kvm_descriptors() -> int:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return sum("kvm" in link for link in links)


def parts_of(shell: Shell) -> tuple[Parts, int]:
    """The parts, and the descriptor of the virtual machine."""
    parts = shell.take()
    assert parts.vm is not None
    return parts, parts.vm.fd


@pytest.mark.parametrize(
    ("wanted", "shared"),
    [(machine(256), False), (machine(64, 4), False), (machine(64, track=True), False), (machine(32), True)],
    ids=["memory", "more vCPUs", "dirty pages", "shared memory"],
)
def test_the_virtual_machine_is_used_again(wanted: MachineConfig, shared: bool) -> None:
    before = kvm_descriptors()
    base = Shell(machine(), on_thread=False)
    first = sorted(base.fds)
    parts, vm = parts_of(Shell(wanted, shared, base))
    assert vm in first
    assert parts.memory is not None
    assert parts.slots is not None
    assert sum(region.size for region in parts.memory.regions) == wanted.mem_size_mib << 20
    assert [parts.slots.slot(region) for region in parts.memory.regions] == [0]
    assert len(parts.vcpus) == wanted.vcpu_count
    assert kvm_descriptors() == before + 2 + wanted.vcpu_count
    parts.close()
    assert kvm_descriptors() == before
    # It owns nothing any more.
    base.close()


def test_one_with_too_many_vcpus_is_made_anew() -> None:
    before = kvm_descriptors()
    parts, _ = parts_of(Shell(machine(64, 1), False, Shell(machine(64, 2))))
    assert len(parts.vcpus) == 1
    assert kvm_descriptors() == before + 3
    parts.close()
    assert kvm_descriptors() == before


def test_one_that_failed_is_made_anew_and_one_that_fails_owns_what_it_was_made_of() -> None:
    before = kvm_descriptors()
    failed = Shell(MachineConfig(1, 4096, huge_pages="2M"))
    parts, _ = parts_of(Shell(machine(), False, failed))
    parts.close()
    again = Shell(MachineConfig(1, 4096, huge_pages="2M"), False, Shell(machine()))
    with pytest.raises((ConfigError, OSError, MemoryError)):
        again.take()
    assert kvm_descriptors() == before


def test_a_guest_runs_in_one_that_was_changed_three_times(guests: Path, tmp_path: Path) -> None:
    process = Process(tmp_path)
    try:
        for mib, vcpus in ((512, 1), (64, 1), (96, 2)):
            process.api.ask("PUT", "/machine-config", {"vcpu_count": vcpus, "mem_size_mib": mib})
        process.boot(guests / "count.elf", "cpus=2 tick=1", vcpu_count=2, mem_size_mib=96)
        assert process.counted(20) >= 20
    finally:
        process.kill()
