"""Live forks in jails: the clones are where their parent is, and may no more than that."""

from __future__ import annotations

import json
import os
import select
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crackle import ConfigError, Jail, MicroVM
from crackle.vmm.clones import stop_all
from support.jails import DEVICES, Jailed, check_confined, files, status, tree, until_gone
from support.launcher import ZygoteProcess

from .conftest import PATIENCE, Client
from .test_jail_clones import CGROUPS, parent_cgroup, stopped  # noqa: F401 - fixtures
from .test_jailer import boot
from .test_jailer_launched import LAUNCHER_OF_JAILS
from .test_own_process import gone

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes jails: needs root")

USER, GROUP = 63_700, 64_700


def counts(vm: MicroVM, more: int = 3) -> None:
    for _ in range(more):
        vm.console.expect(r"count \d+\n", PATIENCE)


def place(pid: int) -> tuple[Any, ...]:
    """Where it is: its root, its cgroups and its namespaces."""
    root = os.stat(f"/proc/{pid}/root")
    spaces = [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("mnt", "net", "pid", "user", "ipc", "uts")]
    return root.st_dev, root.st_ino, Path(f"/proc/{pid}/cgroup").read_text(), spaces


def test_clones_of_a_programs_microvm_live_in_its_jail(
    guests: Path,
    parent_cgroup: str,  # noqa: F811
    stopped: list[MicroVM],  # noqa: F811
) -> None:
    jail = Jail(uid=USER, gid=GROUP, cgroups=("pids.max=60",), parent_cgroup=parent_cgroup)
    kernel = guests / "count.elf"
    source = MicroVM(kernel, boot_args="touch=2", memory=32, jail=jail, instance_id="source")
    stopped.append(source)
    source.start()
    counts(source)
    with pytest.raises(ConfigError, match="jail: a clone of a running microVM is in this as the microVM is"):
        source.fork(1, jail=jail)
    stopped += source.fork(2, instance_id="n{index}")
    stopped += stopped[1].fork(1)
    for vm in stopped:
        counts(vm)
        check_confined(vm.pid, USER, GROUP)
        assert place(vm.pid) == place(source.pid)
        assert files(vm.pid) == {**DEVICES, str(kernel)[1:]: kernel.stat().st_mode}
    line = Path(f"/proc/{stopped[1].pid}/cmdline").read_bytes()
    assert line.rstrip(b"\0") == b"crackle-vmm --id n0"
    # They go on without it, and its cgroup stays as long as they do.
    group = CGROUPS / parent_cgroup / "source"
    source.stop()
    for vm in stopped[1:]:
        counts(vm)
    inside = {int(pid) for pid in (group / "cgroup.procs").read_text().split()}
    assert inside >= {vm.pid for vm in stopped[1:]}
    stop_all(stopped)
    until_gone(group.parent)


def fork(jailed: Jailed, *clones: dict[str, Any]) -> list[dict[str, Any]]:
    """By the API: what it answers of each."""
    api = Client(jailed.root / "api.sock")
    answer = api.ask("PUT", "/vm/fork", {"clones": list(clones)}, expect=200)
    api.close()
    return list(answer["clones"])


def clone(jailed: Jailed, name: str) -> Client:
    return Client(jailed.root / f"{name}.sock")


def counted(path: Path, least: int = 3) -> None:
    """Until so many lines are in a console's file."""
    for _ in range(int(PATIENCE * 100)):
        if path.exists() and path.read_text().count("\n") > least:
            return
        select.select([], [], [], 0.01)
    raise AssertionError(path.read_text() if path.exists() else f"no {path}")


def test_clones_of_a_jailers_monitor_live_in_its_jail(jailed: Jailed, guests: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    jailed.give(guests / "count.elf", disk)
    jailed.start("--", "--no-drive-locks")
    drive = {
        "drive_id": "d",
        "is_root_device": False,
        "path_on_host": "disk",
        "overlay": {"path": "0.overlay"},
    }
    boot(jailed, "count.elf", drives__d=drive)
    jailed.wait_for("count 3")
    overlay = {"drive_id": "d", "overlay": {"path": "left.overlay"}}
    found = fork(
        jailed,
        {"id": "left", "drive_overrides": [overlay], "serial_out_path": "left.out", "log_path": "left.log"},
        {"id": "right", "serial_out_path": "right.out", "metrics_path": "right.metrics"},
        {"id": "mute"},
    )
    pids = [each["pid"] for each in found]
    try:
        assert [each["api_sock"] for each in found] == ["left.sock", "right.sock", "mute.sock"]
        for name, pid in zip(("left", "right", "mute"), pids, strict=True):
            api = clone(jailed, name)
            assert api.ask("GET", "/", expect=200)["id"] == name
            # It answers when its threads are there.
            check_confined(pid, jailed.user, jailed.user + 1000)
            assert place(pid) == place(jailed.pid)
            # It is asked as any other, and has what it needs for that.
            api.ask("PATCH", "/vm", {"state": "Paused"})
            api.ask("PUT", "/snapshot/create", {"snapshot_path": f"{name}.s", "mem_file_path": f"{name}.m"})
            api.ask("PATCH", "/vm", {"state": "Resumed"})
            api.close()
        counted(jailed.root / "left.out")
        counted(jailed.root / "right.out")
        assert {"left.overlay", "left.log", "right.d.overlay", "right.metrics", "left.s"} <= tree(
            jailed.root
        ).keys()
        # One of them forks again, when the first is gone.
        jailed.end()
        api = clone(jailed, "right")
        (again,) = api.ask(
            "PUT", "/vm/fork", {"clones": [{"id": "again", "serial_out_path": "again.out"}]}, expect=200
        )["clones"]
        api.close()
        pids.append(again["pid"])
        counted(jailed.root / "again.out")
        check_confined(again["pid"], jailed.user, jailed.user + 1000)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert all(map(gone, pids))
    assert "SIGSYS" not in jailed.text


def test_a_clone_that_cannot_be_leaves_nothing_in_the_jail(jailed: Jailed, guests: Path) -> None:
    jailed.give(guests / "count.elf")
    jailed.start()
    boot(jailed, "count.elf")
    jailed.wait_for("count 3")
    before = tree(jailed.root)
    api = Client(jailed.root / "api.sock")
    clones = [{"id": "one"}, {"id": "two", "serial_out_path": "/no/such"}]
    answer = api.ask("PUT", "/vm/fork", {"clones": clones}, expect=400)
    assert "the clone 'two' cannot be" in answer["fault_message"]
    assert tree(jailed.root) == before
    seen = len(jailed.read())
    assert len(jailed.wait_for("count")) >= seen


def test_clones_of_what_a_zygote_has_launched_outlive_launcher_and_zygote(
    jailed: Jailed, guests: Path, tmp_path: Path
) -> None:
    zygote = ZygoteProcess(tmp_path / "zygote")
    try:
        jailed.give(guests / "count.elf")
        jailed.start(command=[*zygote.command[:-1], str(LAUNCHER_OF_JAILS)])
        boot(jailed, "count.elf")
        jailed.wait_for("count 3")
        assert jailed.pid in zygote.children()
        (found,) = fork(jailed, {"id": "one", "serial_out_path": "one.out"})
        jailed.end()
    finally:
        assert zygote.end() == ""
    pid = found["pid"]
    try:
        counted(jailed.root / "one.out", (jailed.root / "one.out").read_text().count("\n") + 3)
        check_confined(pid, jailed.user, jailed.user + 1000)
        assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"crackle-vmm --id one --api-sock")
    finally:
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)


def test_in_a_process_namespace_clones_end_with_process_1(jailed: Jailed, guests: Path) -> None:
    jailed.give(guests / "count.elf")
    jailed.start("--new-pid-ns")
    boot(jailed, "count.elf")
    jailed.wait_for("count 3")
    command = [
        sys.executable,
        "-m",
        "crackle.cli.main",
        "fork",
        str(jailed.root / "api.sock"),
        "-n",
        "2",
        "--json",
    ]
    done = subprocess.run(
        [*command, "--name", "n{index}", "--console", str(jailed.root / "{id}.out")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    clones = json.loads(done.stdout)["clones"]
    # As they are seen from where the command is.
    assert [each["api_sock"] for each in clones] == [
        str(jailed.root / f"n{index}.sock") for index in range(2)
    ]
    for index, each in enumerate(clones):
        assert stat.S_ISSOCK(os.stat(each["api_sock"]).st_mode)
        assert status(each["pid"], "NSpid")[0] == str(each["pid"])
        assert len(status(each["pid"], "NSpid")) == 2
        counted(jailed.root / f"n{index}.out")
        check_confined(each["pid"], jailed.user, jailed.user + 1000)
        assert place(each["pid"]) == place(jailed.pid)
    # Those that end leave nothing.
    os.kill(clones[0]["pid"], signal.SIGKILL)
    assert gone(clones[0]["pid"])
    for _ in range(int(PATIENCE * 100)):
        if not os.path.exists(f"/proc/{clones[0]['pid']}"):
            break
        select.select([], [], [], 0.01)
    else:
        raise AssertionError("a zombie")
    os.kill(jailed.pid, signal.SIGKILL)
    assert gone(jailed.pid)
    assert gone(clones[1]["pid"])


def test_crackle_fork_says_what_a_jail_does_not_see(jailed: Jailed, guests: Path) -> None:
    jailed.start()
    command = [sys.executable, "-m", "crackle.cli.main", "fork", str(jailed.root / "api.sock")]
    done = subprocess.run(
        [*command, "--console", "/tmp/out"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"crackle: /tmp/out is not in the jail of the microVM, which sees what is in {jailed.root.resolve()}\n"
    )
