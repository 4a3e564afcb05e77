"""Many microVMs from one snapshot: each is its own, and nothing of them collides."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import crackle
from crackle import ConfigError, Drive, MicroVM, NetworkInterface, Overlay, Snapshot, StateError
from crackle.memory import GuestMemory
from crackle.vmm.clones import stop_all
from support.network import Namespace

from .conftest import PATIENCE
from .test_bare_vsock import ECHO, connected


@pytest.fixture
def stopped() -> Iterator[list[MicroVM]]:
    """What is in the list is stopped in the end."""
    vms: list[MicroVM] = []
    yield vms
    stop_all(vms)


@pytest.mark.parametrize("in_process", [False, True])
def test_twenty_run_at_a_time_each_for_itself(
    echoing: Path, stopped: list[MicroVM], in_process: bool
) -> None:
    gc.collect()  # what earlier tests have left to it
    before = set(os.listdir("/proc/self/fd"))
    with Snapshot(echoing) as snapshot:
        stopped += snapshot.clone(20, in_process=in_process)
        names = {vm.console.write(f"I am {number}\n") or number for number, vm in enumerate(stopped)}
        assert len(names) == 20
        for number, vm in enumerate(stopped):
            vm.console.expect(f"^I am {number}\n$", PATIENCE)
            assert vm.state == "Running"
        assert len({vm.pid for vm in stopped}) == (1 if in_process else 20)
        # What one does is not seen by another.
        stopped[3].console.write("end\n")
        assert stopped[3].wait(PATIENCE).reason == "reset"
        assert {vm.state for vm in stopped if vm is not stopped[3]} == {"Running"}
        stop_all(stopped)
        assert {vm.state for vm in stopped} == {"Stopped"}
        stopped.clear()
    if in_process:
        assert set(os.listdir("/proc/self/fd")) == before


def test_ids_are_by_template_callable_or_default(echoing: Path, stopped: list[MicroVM]) -> None:
    with Snapshot(echoing) as snapshot:
        for options in ({}, {"instance_id": "vm-{index}"}, {"instance_id": lambda index: f"call{index}"}):
            stopped += snapshot.clone(2, first=5, **options)  # type: ignore[arg-type]
        names = [vm._controller.instance_id for vm in stopped]
        assert len(set(names)) == 6
        assert names[2:] == ["vm-5", "vm-6", "call5", "call6"]
        with pytest.raises(ConfigError, match=r"two clones would have the id 'one': put \{index\} or \{id\}"):
            snapshot.clone(2, instance_id="one")
        with pytest.raises(ConfigError, match="a snapshot is cloned at least once, not 0 times"):
            snapshot.clone(0)
        with pytest.raises(TypeError, match="unexpected keyword arguments: tap"):
            snapshot.clone(1, tap="x")  # type: ignore[call-arg]
    with pytest.raises(StateError, match="this snapshot has been closed"):
        snapshot.clone()


def test_a_snapshot_that_is_replaced_is_still_the_one_that_was_read(
    guests: Path, tmp_path: Path, stopped: list[MicroVM]
) -> None:
    with MicroVM(guests / "count.elf", boot_args="", memory=32) as vm:
        vm.console.expect("count 2\n", PATIENCE)
        vm.snapshot(tmp_path)
        with Snapshot(tmp_path) as snapshot:
            vm.console.expect("count 20\n", PATIENCE)
            vm.snapshot(tmp_path)
            for in_process in (False, True):
                stopped += snapshot.clone(in_process=in_process)
                assert int(stopped[-1].console.expect(r"count (\d+)\n", PATIENCE)[1]) < 20
            stopped.append(snapshot.restore())
            assert int(stopped[-1].console.expect(r"count (\d+)\n", PATIENCE)[1]) >= 20


def test_vsock_paths_are_their_own(guests: Path, tmp_path: Path, stopped: list[MicroVM]) -> None:
    path = str(tmp_path / "v")
    with MicroVM(guests / "vsock.elf", boot_args="t=echo,9", memory=32, vsock=path) as vm:
        vm.console.expect("vsock echo ready", PATIENCE)
        vm.snapshot(tmp_path / "s")
    with Snapshot(tmp_path / "s") as snapshot:
        stopped += snapshot.clone(2)
        stopped += snapshot.clone(2, vsock=str(tmp_path / "w{index}"), cid=lambda index: 40 + index)
        sockets = [vm.config.vsock for vm in stopped]
        paths = [socket.uds_path for socket in sockets if socket is not None]
        assert paths[:2] == [f"{path}.{vm._controller.instance_id}" for vm in stopped[:2]]
        assert paths[2:] == [str(tmp_path / "w0"), str(tmp_path / "w1")]
        assert [socket.guest_cid for socket in sockets if socket is not None] == [3, 3, 40, 41]
        # This guest does not look at its CID again.
        for number, each in enumerate(paths[:2]):
            with connected(each, ECHO) as program:
                program.sendall(b"%d" % number)
                assert program.recv(1) == b"%d" % number
        with pytest.raises(ConfigError, match="two clones would have the vsock path 'x'"):
            snapshot.clone(2, vsock="x")


def test_network_interfaces_have_to_be_given(
    namespace: Namespace, guests: Path, tmp_path: Path, stopped: list[MicroVM]
) -> None:
    taps = [namespace.tap(mtu=1500) for _ in range(3)]
    card = NetworkInterface("eth0", taps[0], guest_mac="06:00:00:00:00:01")
    with namespace.entered():
        with MicroVM(guests / "count.elf", boot_args="", memory=32, interfaces=[card]) as vm:
            vm.console.expect("count 2\n", PATIENCE)
            vm.snapshot(tmp_path)
        with Snapshot(tmp_path) as snapshot:
            with pytest.raises(
                ConfigError, match=r"cannot share the TAP device of 'eth0': say what each clone gets, as in "
            ):
                snapshot.clone(2)
            with pytest.raises(ConfigError, match="two clones would have the TAP device 'tap'"):
                snapshot.clone(2, interfaces={"eth0": "tap"})
            with pytest.raises(ConfigError, match="interfaces: the snapshot has no 'eth1', only eth0"):
                snapshot.clone(2, interfaces={"eth1": "tap"})
            with pytest.raises(ConfigError, match="The provided MAC address is invalid"):
                snapshot.clone(interfaces={"eth0": taps[1]}, macs={"eth0": "06"})
            stopped += snapshot.clone(
                2,
                interfaces={"eth0": lambda index: taps[1 + index]},
                macs={"eth0": "06:00:00:00:01:0{index}"},
            )
            cards = [vm.config.network_interfaces[0] for vm in stopped]
            assert [each.host_dev_name for each in cards] == taps[1:]
            assert [each.guest_mac for each in cards] == ["06:00:00:00:01:00", "06:00:00:00:01:01"]
            # One that cannot be had lets none stay.
            with pytest.raises(ConfigError, match="Device or resource busy"):
                snapshot.clone(2, interfaces={"eth0": lambda index: taps[index]})
            stopped += snapshot.clone(interfaces={"eth0": taps[0]}, in_process=True)


def test_drives_are_shared_if_nobody_writes_to_them(
    guests: Path, tmp_path: Path, stopped: list[MicroVM]
) -> None:
    for name in ("shared", "own", "own0", "own1"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    drives = [
        Drive("shared", False, path_on_host=str(tmp_path / "shared"), is_read_only=True),
        Drive("own", False, path_on_host=str(tmp_path / "own"), is_read_only=False),
    ]
    with MicroVM(guests / "count.elf", boot_args="", memory=32, drives=drives) as vm:
        vm.console.expect("count 2\n", PATIENCE)
        vm.snapshot(tmp_path / "s")
    with Snapshot(tmp_path / "s") as snapshot:
        with pytest.raises(
            ConfigError, match="cannot write to the file of the drive 'own': say what each clone"
        ):
            snapshot.clone(2)
        stopped += snapshot.clone(2, drives={"own": str(tmp_path / "own{index}")})
        paths = [[drive.path_on_host for drive in vm.config.drives] for vm in stopped]
        assert paths == [[str(tmp_path / "shared"), str(tmp_path / f"own{n}")] for n in range(2)]


def test_each_may_have_an_overlay_of_its_own(guests: Path, tmp_path: Path, stopped: list[MicroVM]) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    drives = [Drive("d", False, path_on_host=str(tmp_path / "disk"))]
    with MicroVM(guests / "count.elf", boot_args="", memory=32, drives=drives) as vm:
        vm.console.expect("count 2\n", PATIENCE)
        vm.snapshot(tmp_path / "s")
    with Snapshot(tmp_path / "s") as snapshot:
        for in_process in (False, True):
            place = f"{in_process}{{index}}"
            stopped += snapshot.clone(2, overlays={"d": str(tmp_path / place)}, in_process=in_process)
        stopped += snapshot.clone(2, overlays={"d": Overlay(memory=True)})
        with pytest.raises(ConfigError, match="two clones would have the overlay"):
            snapshot.clone(2, overlays={"d": str(tmp_path / "same")})
    names = [vm.config.drives[0].overlay.path for vm in stopped]  # type: ignore[union-attr]
    assert names[:4] == [str(tmp_path / f"{where}{index}") for where in (False, True) for index in range(2)]
    assert all((tmp_path / name).exists() for name in names[:4] if name)
    assert names[4:] == [None, None]


def test_each_has_a_metadata_document(
    namespace: Namespace, guests: Path, tmp_path: Path, stopped: list[MicroVM]
) -> None:
    taps = [namespace.tap(mtu=1500) for _ in range(2)]
    with namespace.entered():
        with MicroVM(
            guests / "count.elf", boot_args="", memory=32, interfaces=[taps[0]], metadata={"name": "source"}
        ) as vm:
            vm.console.expect("count 2\n", PATIENCE)
            vm.snapshot(tmp_path)
        with Snapshot(tmp_path) as snapshot:
            stopped += snapshot.clone(
                2,
                interfaces={"eth0": lambda index: taps[index]},
                metadata=lambda index: {"name": f"c{index}"},
            )
            assert [vm.metadata for vm in stopped] == [{"name": "c0"}, {"name": "c1"}]


def test_one_that_waits_before_it_goes_on_has_not_aged(guests: Path, tmp_path: Path) -> None:
    """Its kvmclock, that is. Not every KVM lets a TSC be set."""
    with MicroVM(guests / "count.elf", boot_args="", memory=32) as vm:
        vm.console.expect("count 2\n", PATIENCE)
        vm.snapshot(tmp_path)
    with Snapshot(tmp_path) as snapshot:
        state = snapshot.template.snapshot.machine
        with MicroVM.restore(tmp_path, resume=False) as vm:
            machine: Any = vm._machine()
            time.sleep(1.5)
            machine._rewind()
            assert 0 <= machine.vm.get_clock()[0] - state.vm.clock_ns < 1_000_000_000
            vm.resume()
            last = int(vm.console.expect(r"count (\d+)\n", PATIENCE)[1])
            vm.console.expect(f"count {last + 1}\n", PATIENCE)


def test_a_bad_snapshot_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        crackle.Snapshot(tmp_path)
    (tmp_path / "state").write_bytes(b"nonsense")
    with GuestMemory([(0, 1 << 20)]), pytest.raises(ConfigError, match="no state file of Crackle's"):
        crackle.Snapshot(tmp_path)
