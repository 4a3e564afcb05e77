"""Jails with a complete cgroup version 2, which the emulated host has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crackle import Jail, MicroVM
from support.jails import Jailed, until_gone

CGROUPS = Path("/sys/fs/cgroup")


@pytest.mark.linux
@pytest.mark.timeout(400)
def test_its_cgroup_of_version_2_has_what_was_asked_for(tmp_path: Path) -> None:
    if not (CGROUPS / "cgroup.controllers").exists():
        pytest.skip("version 2 is not what this host has")
    base = tmp_path / "jails"
    base.mkdir()
    one = Jailed(base)
    parent = f"crackle-test-{os.getpid()}"
    try:
        one.start(
            *("--cgroup-version", "2", "--parent-cgroup", f"{parent}/inner"),
            *("--cgroup", "pids.max=60", "--cgroup", "memory.max=500000000", "--cgroup", "cpu.weight=50"),
        )
        group = CGROUPS / parent / "inner" / "one"
        assert (group / "pids.max").read_text() == "60\n"
        assert int((group / "memory.max").read_text()) == 500000000 // 4096 * 4096
        assert (group / "cpu.weight").read_text() == "50\n"
        assert (group / "cgroup.procs").read_text() == f"{one.pid}\n"
        enabled = (CGROUPS / parent / "inner" / "cgroup.subtree_control").read_text().split()
        assert {"cpu", "memory", "pids"} <= set(enabled)
    finally:
        one.end()


@pytest.mark.linux
@pytest.mark.timeout(400)
def test_the_cgroup_of_version_2_of_a_programs_jail_goes_with_it(tmp_path: Path) -> None:
    if not (CGROUPS / "cgroup.controllers").exists():
        pytest.skip("version 2 is not what this host has")
    kernel = tmp_path / "kernel"
    kernel.touch()
    parent = f"crackle-test-{os.getpid()}/inner"
    jail = Jail(
        uid=60_000,
        gid=60_000,
        cgroup_version=2,
        cgroups=("pids.max=60", "cpu.weight=50"),
        parent_cgroup=parent,
    )
    vms = [MicroVM(kernel, jail=jail, instance_id=name) for name in ("one", "two")]
    for vm in vms:
        group = CGROUPS / parent / vm.instance_id
        assert (group / "pids.max").read_text() == "60\n"
        assert (group / "cpu.weight").read_text() == "50\n"
        # KVM's own threads of that microVM are there, too.
        assert str(vm.pid) in (group / "cgroup.procs").read_text().split()
    vms[0].stop()
    until_gone(CGROUPS / parent / "one")
    assert (CGROUPS / parent / "two").is_dir()
    vms[1].stop()
    until_gone(CGROUPS / parent.partition("/")[0])
