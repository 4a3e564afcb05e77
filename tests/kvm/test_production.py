"""`crackle doctor --production`: hosts that are not fit for strangers' code, and microVMs that are not confined."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crackle import MicroVM
from crackle.cli import production
from crackle.cli.main import app
from crackle.cli.report import Row
from support.network import Namespace

DOCUMENT = Path(__file__).parents[2] / "docs" / "production.md"
VULNERABILITIES = "sys/devices/system/cpu/vulnerabilities"

GOOD = {
    "sys/devices/system/cpu/smt/active": "0",
    f"{VULNERABILITIES}/mds": "Mitigation: Clear CPU buffers; SMT disabled",
    f"{VULNERABILITIES}/l1tf": "Not affected",
    "proc/cmdline": "root=/dev/vda mitigations=auto,nosmt",
    "sys/module/kvm_intel/parameters/ept": "Y",
    "sys/module/kvm_intel/parameters/nested": "N",
    "dev/kvm": "",
    "sys/kernel/mm/ksm/run": "0",
    "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 1 0 1\n/dev/dm-1 partition 1 0 1",
    "sys/class/block/dm-1/dm/uuid": "CRYPT-LUKS2-0",
    "proc/sys/fs/suid_dumpable": "0",
    "proc/sys/vm/unprivileged_userfaultfd": "0",
    "proc/sys/kernel/kptr_restrict": "1",
    "proc/sys/kernel/dmesg_restrict": "1",
    "proc/sys/kernel/unprivileged_bpf_disabled": "2",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids",
    "sys/class/net/tap0/tun_flags": "0x5002",
    "sys/class/net/tap0/owner": "1001",
    "sys/class/net/tap0/group": "-1",
    "sys/class/net/tun0/tun_flags": "0x1001",
    "sys/class/net/tun0/owner": "-1",
    "sys/class/net/tun0/group": "-1",
}

# What is changed; the row that tells of it, its state, and words of its advice.
BAD = [
    ("sys/devices/system/cpu/smt/active", "1", "SMT", "problem", "nosmt"),
    (f"{VULNERABILITIES}/mds", "Vulnerable: no microcode", "mds", "problem", "microcode"),
    (
        f"{VULNERABILITIES}/mds",
        "Mitigation: Clear CPU buffers; SMT vulnerable",
        "mds",
        "problem",
        "microcode",
    ),
    ("proc/cmdline", "root=/dev/vda mitigations=off", "mitigations", "problem", "command line"),
    ("proc/cmdline", "nopti quiet", "mitigations", "problem", "command line"),
    ("sys/module/kvm_intel/parameters/ept", "N", "ept", "problem", "ept=1"),
    ("sys/module/kvm_intel/parameters/nested", "Y", "nested", "missing", "nested=0"),
    ("sys/kernel/mm/ksm/run", "1", "same-page merging", "problem", "echo 2"),
    ("proc/swaps", "Filename Type\n/dev/sda2 partition 1 0 1", "swap", "problem", "swapoff"),
    ("sys/class/block/dm-1/dm/uuid", "LVM-x", "swap", "problem", "swapoff"),
    ("proc/sys/fs/suid_dumpable", "1", "core dumps", "missing", "echo 0 > /proc/sys/fs/suid_dumpable"),
    (
        "proc/sys/vm/unprivileged_userfaultfd",
        "1",
        "userfaultfd",
        "missing",
        "> /proc/sys/vm/unprivileged_userfaultfd",
    ),
    (
        "proc/sys/kernel/kptr_restrict",
        "0",
        "kernel.kptr_restrict",
        "missing",
        "echo 1 > /proc/sys/kernel/kptr_restrict",
    ),
    (
        "proc/sys/kernel/dmesg_restrict",
        "0",
        "kernel.dmesg_restrict",
        "missing",
        "echo 1 > /proc/sys/kernel/dmesg_restrict",
    ),
    (
        "proc/sys/kernel/unprivileged_bpf_disabled",
        "0",
        "kernel.unprivileged_bpf_disabled",
        "missing",
        "echo 1 >",
    ),
    ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io", "cgroup controllers", "missing", "bound"),
    ("sys/class/net/tap0/owner", "-1", "tap0", "problem", "ip tuntap add tap0 mode tap user UID"),
]


def host(root: Path, files: dict[str, str]) -> list[Row]:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (root / "dev/kvm").chmod(0o660)
    return [row for row in production.report(str(root)) if row.area != "microVMs"]


def test_a_host_as_it_should_be_has_nothing_to_be_better(tmp_path: Path) -> None:
    rows = host(tmp_path, GOOD)
    assert {row.state for row in rows} == {"ok"}
    assert production.is_fit(rows)
    assert production.verdict(rows) == "Fit for strangers' code: yes: no problem, 0 to be better"
    assert not any(row.name == "tun0" for row in rows)


@pytest.mark.parametrize(("path", "content", "name", "state", "advice"), BAD)
def test_each_fault_is_told_with_what_to_do_and_explained(
    tmp_path: Path, path: str, content: str, name: str, state: str, advice: str
) -> None:
    rows = host(tmp_path, {**GOOD, path: content})
    (found,) = [row for row in rows if row.state != "ok"]
    assert (found.name, found.state) == (name, state)
    assert advice in found.advice
    assert production.is_fit(rows) == (state != "problem")
    explained = {"tap0": "TAP", "mds": "vulnerabilities", "ept": "EPT"}.get(name, name)
    assert explained in DOCUMENT.read_text()


def test_a_kvm_for_everybody_and_none_at_all(tmp_path: Path) -> None:
    host(tmp_path, GOOD)
    (tmp_path / "dev/kvm").chmod(0o666)
    (row,) = [row for row in production.report(str(tmp_path)) if row.name == "/dev/kvm"]
    assert row.state == "missing"
    (tmp_path / "dev/kvm").unlink()
    (row,) = [row for row in production.report(str(tmp_path)) if row.name == "/dev/kvm"]
    assert row.state == "problem"


def test_a_first_version_of_control_groups_that_lacks_one(tmp_path: Path) -> None:
    files = {**GOOD, "proc/cgroups": "#subsys_name hierarchy\ncpu 1 1 1\nmemory 2 1 1\nblkio 3 1 1"}
    del files["sys/fs/cgroup/cgroup.controllers"]
    (found,) = [row for row in host(tmp_path, files) if row.state != "ok"]
    assert found.value == "version 1, without pids"


def test_a_real_tap_that_anybody_may_have(namespace: Namespace) -> None:
    name = namespace.tap()
    namespace.ip("tuntap add own mode tap user 1234")
    script = "from crackle.cli.production import report; print([(row.name, row.state) for row in report()])"
    entered = 'mount -t sysfs sysfs /sys && exec "$@"'  # which shows the devices of whoever mounts it
    command = namespace.command("unshare", "-m", "sh", "-c", entered, "sh", sys.executable, "-c", script)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert str((name, "problem")) in done.stdout
    assert str(("own", "ok")) in done.stdout


def test_microvms_without_confinement_are_found_with_what_they_lack(guests: Path) -> None:
    with (
        MicroVM(guests / "idle.elf", memory=64, own_process=True) as first,
        MicroVM(guests / "idle.elf", memory=64, own_process=True) as second,
    ):
        rows = {row.name.split()[-1]: row for row in production.report() if row.area == "microVMs"}
        for vm in (first, second):
            row = rows[str(vm.pid)]
            assert row.state == "problem"
            assert "it is root" in row.value
            assert "it sees this host's files" in row.value
            assert f"its user {os.geteuid()} is that of" in row.value
            assert "crackle-jailer" in row.advice
    assert str(first.pid) not in {
        row.name.split()[-1] for row in production.report() if row.area == "microVMs"
    }


def test_the_command_is_a_table_or_for_programs() -> None:
    table = CliRunner().invoke(app, ["doctor", "--production"])
    last = table.stdout.splitlines()[-1]
    assert last.startswith("Fit for strangers' code: " + ("no" if table.exit_code else "yes"))
    told = CliRunner().invoke(app, ["doctor", "--production", "--json"])
    report = json.loads(told.stdout)
    assert report["fit"] == (told.exit_code == 0)
    assert report["verdict"] == production.verdict([Row(**row) for row in report["rows"]])
