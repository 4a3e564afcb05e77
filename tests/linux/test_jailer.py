"""crackle-jailer with a complete cgroup version 2, which the emulated host has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.jails import Jailed

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
