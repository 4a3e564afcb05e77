"""Clones and pools in jails: each microVM has one of its own, and leaves nothing of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crackle import ConfigError, Jail, MicroVM, Overlay, PageHandler, Pmem, Pool, Snapshot
from crackle.cli.templates import options_of
from crackle.vmm.clones import stop_all
from support.jails import DEVICES, check_confined, files, status, until_gone

from .conftest import PATIENCE
from .test_clone_command import PoolClient, crackle, snapshot_of  # noqa: F401 - a fixture
from .test_own_process import gone

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes jails: needs root")

USER = 62_700
CGROUPS = Path("/sys/fs/cgroup/pids")


def own(index: int) -> Jail:
    """A user of each clone's own."""
    return Jail(uid=USER + index, gid=USER + 100 + index)


@pytest.fixture
def stopped() -> Iterator[list[MicroVM]]:
    """What is in the list is stopped in the end."""
    vms: list[MicroVM] = []
    yield vms
    stop_all(vms)


@pytest.fixture
def parent_cgroup() -> str:
    if not (CGROUPS / "tasks").exists():
        pytest.skip("no cgroups of version 1")
    return f"crackle-clones-test-{os.getpid()}"


def mounts() -> set[str]:
    """Those of this host, without the network namespaces that come and go."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if not line.split()[4].startswith("/run/netns")}


def answers(vm: MicroVM, word: str) -> None:
    vm.console.write(f"{word}\n")
    vm.console.expect(f"^{word}\n$", PATIENCE)


def test_each_clone_is_in_a_jail_of_its_own(echoing: Path, stopped: list[MicroVM]) -> None:
    with Snapshot(echoing) as snapshot:
        stopped += snapshot.clone(3, first=2, jail=own)
    for index, vm in enumerate(stopped, 2):
        answers(vm, f"number{index}")
        # The snapshot's files are no part of it.
        assert files(vm.pid) == DEVICES
        check_confined(vm.pid, USER + index, USER + 100 + index)
    assert len({os.readlink(f"/proc/{vm.pid}/ns/mnt") for vm in stopped}) == 3


def test_it_sees_its_own_disks_and_what_is_below_them(
    guests: Path, tmp_path: Path, stopped: list[MicroVM]
) -> None:
    base, first = tmp_path / "base", tmp_path / "first.overlay"
    base.write_bytes(bytes(1 << 20))
    with MicroVM(guests / "echo.elf", base, boot_args="", memory=32, overlay=first, own_process=True) as vm:
        vm.console.expect("echo\n", PATIENCE)
        vm.snapshot(tmp_path / "s")
    for index in range(2):
        folder = tmp_path / f"clone{index}"
        folder.mkdir(mode=0o700)
        os.chown(folder, USER + index, USER + 100 + index)
    with Snapshot(tmp_path / "s") as snapshot:
        stopped += snapshot.clone(
            2,
            jail=lambda index: Jail(
                uid=USER + index, gid=USER + 100 + index, paths=(f"{tmp_path}/clone{{index}}",)
            ),
            overlays={"rootfs": f"{tmp_path}/clone{{index}}/{{id}}.overlay"},
        )
        stopped += snapshot.clone(1, jail=own(2), overlays={"rootfs": Overlay(memory=True)})
        stopped.append(snapshot.restore(jail=own(3), overlays={"rootfs": Overlay(memory=True)}))
        with pytest.raises(ConfigError, match="Permission denied"):
            snapshot.clone(1, jail=own(3))
    below = {str(path)[1:] for path in (base, first)}
    for index, vm in enumerate(stopped):
        answers(vm, f"number{index}")
        seen = set(files(vm.pid)) - set(DEVICES)
        if index < 2:
            overlay = tmp_path / f"clone{index}" / f"{vm.instance_id}.overlay"
            assert overlay.stat().st_uid == USER + index
            assert seen == {*below, str(overlay)[1:]}
        elif index == 2:
            assert seen == below
        else:
            assert seen == {*below, *(str(tmp_path / "s" / name)[1:] for name in ("state", "memory"))}


def test_it_sees_the_files_that_are_in_its_address_space(
    guests: Path, tmp_path: Path, stopped: list[MicroVM]
) -> None:
    """And so does a microVM that is restored into a jail, from another file."""
    tmp_path.chmod(0o755)
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.write_bytes(bytes(4096))
    mapped = Pmem("p", str(shared), read_only=True)
    with MicroVM(guests / "echo.elf", boot_args="", memory=32, pmem=[mapped]) as vm:
        vm.console.expect("echo\n", PATIENCE)
        vm.snapshot(tmp_path / "s")
    with Snapshot(tmp_path / "s") as snapshot:
        stopped += snapshot.clone(2, jail=own)
    shared.rename(other)
    stopped.append(MicroVM.restore(tmp_path / "s", pmem={"p": other}, jail=own(9)))
    for index, vm in enumerate(stopped):
        answers(vm, f"number{index}")


def test_its_memory_comes_from_a_handler_and_its_vsock_socket_is_in_its_folder(
    guests: Path, tmp_path: Path, stopped: list[MicroVM]
) -> None:
    with MicroVM(guests / "vsock.elf", boot_args="t=echo,9", memory=32, vsock=tmp_path / "v") as vm:
        vm.console.expect("vsock echo ready", PATIENCE)
        vm.snapshot(tmp_path / "s")

    def jail(index: int) -> Jail:
        folder = tmp_path / str(index)
        folder.mkdir(mode=0o700, exist_ok=True)
        os.chown(folder, USER + index, -1)
        return Jail(uid=USER + index, gid=USER, paths=(f"{tmp_path}/{{index}}",))

    with Snapshot(tmp_path / "s") as snapshot, PageHandler(tmp_path / "s") as handler:
        stopped += snapshot.clone(2, jail=jail, vsock=f"{tmp_path}/{{index}}/v", handler=handler)
        for index, vm in enumerate(stopped):
            with socket.socket(socket.AF_UNIX) as host:
                host.settimeout(PATIENCE)
                host.connect(str(tmp_path / str(index) / "v"))
                host.sendall(b"CONNECT 9\n")
                assert host.recv(100).startswith(b"OK ")
            check_confined(vm.pid, USER + index, USER)


def test_what_a_pool_has_ready_is_in_its_jail_already(echoing: Path) -> None:
    with Pool(echoing, 2, jail=own) as pool:
        pool.wait_ready(timeout=PATIENCE)
        for index, vm in enumerate(pool._ready):
            check_confined(vm.pid, USER + index, USER + 100 + index, filtered=False)
        with pool.take() as vm:
            answers(vm, "taken")
            check_confined(vm.pid, USER, USER + 100)


def test_a_hundred_leave_no_mount_cgroup_or_process(echoing: Path, parent_cgroup: str) -> None:
    place = CGROUPS / parent_cgroup
    before = mounts()
    pids = set()

    def jail(index: int) -> Jail:
        return Jail(uid=USER + index, gid=USER + index, cgroups=("pids.max=60",), parent_cgroup=parent_cgroup)

    with Pool(echoing, 10, jail=jail) as pool:
        for _ in range(10):
            vms = pool.take_many(10, PATIENCE)
            for vm in vms:
                answers(vm, "here")
                assert str(vm.pid) in (place / vm.instance_id / "cgroup.procs").read_text().split()
                pids.add(vm.pid)
            # One is not asked.
            os.kill(vms[0].pid, signal.SIGKILL)
            stop_all(vms)
        pids |= {vm.pid for vm in pool._ready}
    assert len(pids) >= 100
    assert all(map(gone, pids))
    until_gone(place)
    assert mounts() <= before


def test_when_one_cannot_be_jailed_there_is_none(echoing: Path, parent_cgroup: str) -> None:
    def jail(index: int) -> Jail:
        paths = ("/no/such",) if index == 2 else ()
        return Jail(uid=USER, gid=USER, paths=paths, cgroups=("pids.max=60",), parent_cgroup=parent_cgroup)

    with Snapshot(echoing) as snapshot:
        with pytest.raises(ConfigError, match="Failed to show /no/such in the jail: No such file"):
            snapshot.clone(4, jail=jail)
        with pytest.raises(
            ConfigError, match="jail is for a microVM in a process of its own: leave out in_p"
        ):
            snapshot.clone(1, jail=own, in_process=True)
        with pytest.raises(ConfigError, match=r"jail must be a crackle\.Jail, not 'me'"):
            snapshot.clone(1, jail="me")  # type: ignore[arg-type]
        with (
            Pool(snapshot, 1, jail=lambda _index: jail(2)) as pool,
            pytest.raises(ConfigError, match="/no/such"),
        ):
            pool.wait_ready(timeout=PATIENCE)
    until_gone(CGROUPS / parent_cgroup)


def test_a_cgroup_that_was_there_before_stays(echoing: Path, parent_cgroup: str) -> None:
    place = CGROUPS / parent_cgroup
    (place / "mine").mkdir(parents=True)
    jail = Jail(uid=USER, gid=USER, cgroups=("pids.max=60",), parent_cgroup=parent_cgroup)
    try:
        with Snapshot(echoing) as snapshot:
            names = ["mine", "its"]
            for vm in snapshot.clone(2, instance_id=names.__getitem__, jail=jail):
                vm.stop()
        until_gone(place / "its")
        assert (place / "mine").is_dir()
    finally:
        (place / "mine").rmdir()
        place.rmdir()


PROGRAM = """
import sys
from crackle import Jail, Snapshot
jail = Jail(uid=int(sys.argv[2]), gid=int(sys.argv[2]), cgroups=("pids.max=60",), parent_cgroup=sys.argv[3])
vms = Snapshot(sys.argv[1]).clone(2, jail=jail)
print(*(vm.pid for vm in vms), flush=True)
input()
"""


def test_nothing_stays_of_a_program_that_is_killed(echoing: Path, parent_cgroup: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(echoing), str(USER), parent_cgroup],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(list((CGROUPS / parent_cgroup).glob("clone-*"))) == 2
    process.kill()
    process.communicate()
    assert all(map(gone, pids))
    until_gone(CGROUPS / parent_cgroup)


def test_crackle_clone_and_pool_have_jails(
    crackle: Callable[..., subprocess.Popen[str]],  # noqa: F811
    guests: Path,
    tmp_path: Path,
) -> None:
    path = snapshot_of(guests / "echo.elf", "", "echo\n", tmp_path / "s")
    address = tmp_path / "pool.sock"
    process = crackle(
        "pool", path, "--socket", address, "--size", 1, "--wait", 30, "--jail", f"{USER}:{USER + 100}"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"listening at {address}\n"
    client = PoolClient(address)
    pid = client.answer()["pid"]
    client.socket.sendall(b"hello\n")
    assert client.file.readline() == b"hello\n"
    check_confined(pid, USER, USER + 100)
    client.close()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE)[1] == ""
    process = crackle("clone", path, "-n", 2, "--jail", USER)
    assert process.stderr is not None
    pids = [int(re.findall(r"process (\d+)", process.stderr.readline())[0]) for _ in range(2)]
    assert [status(pid, "Uid")[0] for pid in pids] == [str(USER), str(USER + 1)]
    assert [status(pid, "Gid")[0] for pid in pids] == [str(USER), str(USER + 1)]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    with pytest.raises(ConfigError, match="'me' is no user that --jail knows"):
        options_of(jail="me")
    jails = options_of(jail="5", vsock="/run/{id}/v", overlay=["rootfs=/run/{index}/o", "d=memory"])["jail"]
    assert callable(jails)
    assert sorted(jails(7).paths) == ["/run/{id}", "/run/{index}"]
