"""`MicroVM(..., jail=Jail(...))` and `crackle run --jail`: a program's microVM sees what it needs, and no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crackle import ConfigError, GuestError, Jail, MicroVM
from support.jails import DEVICES, OWN, check_confined, descriptors, files, status, until_gone
from support.launcher import own_kib

from .conftest import PATIENCE, Client
from .test_own_process import gone

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes jails: needs root")

USER, GROUP = 60_700, 61_700
RUN = (sys.executable, "-c", "from crackle.cli.main import main; main()", "run")
JAIL = Jail(uid=USER, gid=GROUP)


def mounts(pid: int) -> list[str]:
    return [line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]


def test_it_sees_its_kernel_and_drives_and_devices_and_has_no_privileges(
    guests: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    os.chown(disk, USER, GROUP)
    kernel = guests / "count.elf"
    with MicroVM(kernel, boot_args="", memory=32, drives=[disk], jail=JAIL) as vm:
        vm.console.expect("count 3\n", PATIENCE)
        assert vm.pid != os.getpid()
        expected = {str(path)[1:]: path.stat().st_mode for path in (kernel, disk)}
        assert files(vm.pid) == {**DEVICES, **expected}
        assert sorted(mounts(vm.pid)) == sorted(["/", str(kernel), str(disk)])
        assert os.readlink(f"/proc/{vm.pid}/cwd") == os.getcwd()
        check_confined(vm.pid, USER, GROUP)
        assert os.stat(f"/proc/{vm.pid}/root").st_uid == 0
        # What the program names later is not there.
        with pytest.raises(ConfigError, match="No such file or directory"):
            vm.update_drive("drive0", "/etc/passwd")


def test_it_gives_back_what_only_its_start_needed_and_has_open_what_that_takes(guests: Path) -> None:
    free, jailed = (
        MicroVM(guests / "count.elf", boot_args="", memory=32, own_process=True, jail=jail)
        for jail in (None, JAIL)
    )
    waiting = own_kib(jailed.pid)
    with jailed, free:
        for vm in (free, jailed):
            vm.console.expect("count 2\n", PATIENCE)
        assert descriptors(jailed.pid) == sorted([*descriptors(free.pid), *OWN])
        deadline = time.monotonic() + PATIENCE
        while own_kib(jailed.pid) > 0.7 * waiting:
            assert time.monotonic() < deadline, (waiting, own_kib(jailed.pid))
            time.sleep(0.05)
        jailed.console.expect(r"count \d+\n", PATIENCE)


def test_relative_paths_are_the_programs(
    guests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kernel").write_bytes((guests / "count.elf").read_bytes())
    with MicroVM("kernel", boot_args="", memory=32, jail=JAIL) as vm:
        vm.console.expect("count 2\n", PATIENCE)
        assert str(tmp_path / "kernel")[1:] in files(vm.pid)


def test_snapshots_are_written_and_loaded_in_folders_that_it_sees(guests: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    folder.mkdir()
    os.chown(folder, USER, GROUP)
    seeing = Jail(uid=USER, gid=GROUP, paths=(str(folder),))
    with MicroVM(guests / "count.elf", boot_args="", memory=32, jail=seeing) as vm:
        vm.console.expect("count 3\n", PATIENCE)
        vm.pause()
        with pytest.raises(ConfigError, match="No such file or directory"):
            vm.snapshot(tmp_path / "elsewhere")
        for name in ("one", "two"):
            os.makedirs(folder / name)
            os.chown(folder / name, USER, GROUP)
        vm.snapshot(folder / "one")
    assert (folder / "one" / "state").stat().st_uid == USER
    with MicroVM.restore(folder / "one", jail=JAIL) as vm:
        vm.console.expect("count 6\n", PATIENCE)
        assert set(files(vm.pid)) - set(DEVICES) == {
            str(folder / "one" / name)[1:] for name in ("state", "memory")
        }
    with MicroVM.restore(folder / "one", jail=seeing) as vm:
        vm.console.expect("count 6\n", PATIENCE)
        # What is as it was loaded is known there, too, without tracking.
        vm.snapshot(folder / "two", differential=True)
    assert (folder / "two" / "memory").stat().st_blocks < (folder / "one" / "memory").stat().st_blocks


def test_network_namespace_cgroup_and_limits(guests: Path, namespace: Any) -> None:
    if not Path("/sys/fs/cgroup/pids/tasks").exists():
        pytest.skip("no cgroups of version 1")
    parent = f"crackle-jail-test-{os.getpid()}"
    place = Path("/sys/fs/cgroup/pids") / parent
    jail = Jail(
        uid=USER, gid=GROUP, netns=namespace.path, cgroups=("pids.max=60",), parent_cgroup=parent, no_file=500
    )
    try:
        with MicroVM(guests / "count.elf", boot_args="", memory=32, jail=jail, instance_id="one") as vm:
            vm.console.expect("count 2\n", PATIENCE)
            assert os.stat(f"/proc/{vm.pid}/ns/net").st_ino == os.fstat(namespace.fd).st_ino
            assert str(vm.pid) in (place / "one" / "tasks").read_text().split()
            limits = Path(f"/proc/{vm.pid}/limits").read_text().splitlines()
            assert next(line for line in limits if "open files" in line).split()[3:5] == ["500", "500"]
    finally:
        # Its process may still be ending.
        until_gone(place)


def test_it_is_process_1_of_a_namespace_of_its_own(guests: Path) -> None:
    jail = Jail(uid=USER, gid=GROUP, new_pid_ns=True)
    with MicroVM(guests / "count.elf", boot_args="", memory=32, jail=jail) as vm:
        vm.console.expect("count 3\n", PATIENCE)
        # Its number here is the one outside.
        assert status(vm.pid, "NSpid") == [str(vm.pid), "1"]
        check_confined(vm.pid, USER, GROUP)
        (clone,) = vm.fork(1)
        clone.console.expect(r"count \d+\n", PATIENCE)
        assert status(clone.pid, "NSpid")[0] == str(clone.pid)
        assert os.readlink(f"/proc/{clone.pid}/ns/pid") == os.readlink(f"/proc/{vm.pid}/ns/pid")
        check_confined(clone.pid, USER, GROUP)
        clone.stop()
        (clone,) = vm.fork(1)
        clone.console.expect(r"count \d+\n", PATIENCE)
        # The next microVM of this program is where the program is.
        with MicroVM(guests / "count.elf", boot_args="", memory=32, jail=JAIL) as other:
            other.console.expect("count 3\n", PATIENCE)
            assert status(other.pid, "NSpid") == [str(other.pid)]
    assert gone(vm.pid)
    # As the kernel has it.
    assert gone(clone.pid)
    assert clone.exit_status is not None
    clone.stop()


def test_one_that_is_process_1_can_be_killed_and_said_to_be(guests: Path) -> None:
    jail = Jail(uid=USER, gid=GROUP, new_pid_ns=True)
    with MicroVM(guests / "count.elf", boot_args="", memory=32, jail=jail) as vm:
        vm.console.expect("count 3\n", PATIENCE)
        os.kill(vm.pid, signal.SIGKILL)
        with pytest.raises(GuestError, match="killed by signal 9"):
            vm.wait(PATIENCE)


def test_its_api_is_served_from_the_jail(guests: Path, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with MicroVM(guests / "count.elf", boot_args="", memory=32, jail=JAIL, api_sock=path) as vm:
        vm.console.expect("count 3\n", PATIENCE)
        api = Client(path)
        assert api.ask("GET", "/", expect=200)["state"] == "Running"
        # Nobody sees that file in the jail, and who serves it is there.
        assert not any("api.sock" in name for name in files(vm.pid))
        check_confined(vm.pid, USER, GROUP)
        api.ask("PATCH", "/vm", {"state": "Paused"})
        assert vm.state == "Paused"
        refused = api.ask("PUT", "/vm/fork", {"clones": [{}]}, expect=400)
        assert "clones of a program's microVM are the program's to ask for" in refused["fault_message"]
        answer = api.ask("PUT", "/snapshot/create", {"snapshot_path": "s", "mem_file_path": "m"}, expect=400)
        assert "denied" in answer["fault_message"]
        vm.resume()
        assert api.ask("GET", "/", expect=200)["state"] == "Running"
        (clone,) = vm.fork(1)
        clone.console.expect(r"count \d+\n", PATIENCE)
        vm.stop()
        assert vm.state == "Stopped"
        assert not path.exists()
        # What was the source's is not open in a clone.
        assert not api.sock.recv(1)
        clone.stop()
        api.close()
    path.touch()
    with pytest.raises(ConfigError, match=r"Failed to open the API socket at: .* already used"):
        MicroVM(guests / "count.elf", boot_args="", memory=32, api_sock=path)
    assert path.exists()
    path.unlink()
    with pytest.raises(ConfigError, match="Failed to show /no/such"):
        MicroVM(
            guests / "count.elf", boot_args="", jail=Jail(uid=1, gid=1, paths=("/no/such",)), api_sock=path
        )
    assert not path.exists()


def test_crackle_run_serves_the_api_of_a_jailed_guest(guests: Path, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    process = subprocess.Popen(
        [*RUN, "--jail", str(USER), "--api-sock", str(path), str(guests / "count.elf")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "count 3" in line:
                break
        api = Client(path)
        assert api.ask("GET", "/", expect=200)["state"] == "Running"
        api.close()
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert not path.exists()


@pytest.mark.parametrize(
    ("jail", "why"),
    [
        ("jail", "jail must be a crackle.Jail, not 'jail'"),
        (Jail(uid=-1, gid=1), "Jail error: Expected `int` >= 0"),
        (Jail(uid=(1 << 32) - 1, gid=1), "Jail error: Expected `int` <= 4294967294"),
        (Jail(uid=1, gid=1, paths=("/no/such",)), "Failed to show /no/such in the jail: No such file"),
        (Jail(uid=1, gid=1, paths=("/",)), "/ cannot be shown in a jail, which has its own"),
        (Jail(uid=1, gid=1, paths=("/dev",)), "/dev cannot be shown in a jail, which has its own"),
        (Jail(uid=1, gid=1, netns="/dev/null"), "Failed to join network namespace: netns: Invalid argument"),
        (Jail(uid=1, gid=1, cgroups=("x",)), "Invalid format for cgroups: x"),
        (Jail(uid=1, gid=1, parent_cgroup="/x"), "Parent cgroup path is invalid"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_said_to_the_program(guests: Path, jail: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        MicroVM(guests / "count.elf", boot_args="", memory=32, jail=jail)


@pytest.fixture
def run_jailed(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*RUN, *arguments],
            input="",
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=tmp_path,
        )

    return run


def test_crackle_run_jails_its_guest(
    run_jailed: Callable[..., subprocess.CompletedProcess[str]], guests: Path
) -> None:
    done = run_jailed("--jail", f"{USER}:{GROUP}", str(guests / "hello.elf"))
    assert done.returncode == 0, done
    assert "hello" in done.stdout


def test_crackle_run_says_what_is_no_user(
    run_jailed: Callable[..., subprocess.CompletedProcess[str]], guests: Path
) -> None:
    done = run_jailed("--jail", "somebody", str(guests / "hello.elf"))
    assert done.returncode == 1
    assert "'somebody' is no user" in done.stderr
