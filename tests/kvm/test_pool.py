"""Pools of clones: ready before they are wanted, never more than there may be, and told when there are none."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crackle import CapacityError, ConfigError, CrackleError, MicroVM, Pool, Snapshot, StateError
from support.network import Namespace

from .conftest import PATIENCE
from .test_own_process import gone, program


@pytest.fixture(params=[False, True])
def in_process(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def pool(echoing: Path, in_process: bool) -> Iterator[Pool]:
    with Pool(echoing, 3, instance_id="vm-{index}", in_process=in_process) as pool:
        pool.wait_ready(timeout=PATIENCE)
        yield pool


def answers(vm: MicroVM, word: str) -> None:
    vm.console.write(f"{word}\n")
    vm.console.expect(f"^{word}\n$", PATIENCE)


def test_one_that_is_taken_goes_on_and_another_takes_its_place(pool: Pool) -> None:
    assert repr(pool) == "<Pool: 3 of 3 ready>"
    taken = [pool.take() for _ in range(3)]
    for number, vm in enumerate(taken):
        assert vm.state == "Running"
        answers(vm, f"number{number}")
    pool.wait_ready(timeout=PATIENCE)
    assert pool.ready == 3
    names = {vm._controller.instance_id for vm in taken}
    assert names == {"vm-0", "vm-1", "vm-2"}
    for vm in taken:
        vm.stop()
    # Their numbers are somebody else's now.
    again = [pool.take(PATIENCE) for _ in range(3)]
    assert {vm._controller.instance_id for vm in again} == {"vm-3", "vm-4", "vm-5"}
    pool.wait_ready(timeout=PATIENCE)
    assert {vm._controller.instance_id for vm in pool.take_many(3)} == names
    assert pool.ready < 3


def test_several_are_taken_together(pool: Pool) -> None:
    vms = pool.take_many(3)
    for number, vm in enumerate(vms):
        answers(vm, f"number{number}")
    vms += pool.take_many(2, PATIENCE)
    for vm in vms:
        vm.stop()
    with pytest.raises(ConfigError, match="a pool of 3 cannot give 4 at a time"):
        pool.take_many(4)


def test_without_capacity_it_says_so(echoing: Path, in_process: bool) -> None:
    with Pool(echoing, 2, limit=2, in_process=in_process) as pool:
        pool.wait_ready(timeout=PATIENCE)
        first, second = pool.take(), pool.take()
        with pytest.raises(
            CapacityError, match="no capacity: 0 are ready, 0 being made, 2 in use of 2 at most"
        ):
            pool.take()
        with pytest.raises(CapacityError):
            pool.take(0.01)
        taken: list[MicroVM] = []
        thread = threading.Thread(target=lambda: taken.append(pool.take(PATIENCE)))
        thread.start()
        first.stop()
        thread.join(PATIENCE)
        answers(taken[0], "third")
        second.stop()
        taken[0].stop()


def test_what_it_made_and_nobody_took_ends_with_it(echoing: Path, in_process: bool) -> None:
    with Snapshot(echoing) as snapshot:
        pool = Pool(snapshot, 2, in_process=in_process)
        pool.wait_ready(timeout=PATIENCE)
        vm = pool.take()
        pool.wait_ready(timeout=PATIENCE)
        waiting = [each.pid for each in pool._ready]
        pool.close()
        pool.close()
        assert in_process or all(map(gone, waiting))
        with pytest.raises(StateError, match="this pool has been closed"):
            pool.take()
        answers(vm, "still")
        vm.stop()
        # The snapshot is its owner's.
        with snapshot.clone(in_process=in_process)[0] as other:
            answers(other, "other")


def test_one_that_was_killed_is_not_given_away(echoing: Path) -> None:
    with Pool(echoing, 2) as pool:
        pool.wait_ready(timeout=PATIENCE)
        pid = pool._ready[0].pid
        os.kill(pid, signal.SIGKILL)
        assert gone(pid)
        with pool.take() as vm:
            assert vm.pid != pid
            answers(vm, "alive")
        pool.wait_ready(timeout=PATIENCE)


def test_what_cannot_be_made_is_told_and_tried_again(guests: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with MicroVM(guests / "echo.elf", boot_args="", memory=32, drives=[disk]) as vm:
        vm.console.expect("echo\n", PATIENCE)
        vm.snapshot(tmp_path / "s")
    drives: Any = {"drive0": str(tmp_path / "disk{index}")}
    with Pool(tmp_path / "s", 1, limit=1, drives=drives) as pool:
        with pytest.raises(CrackleError, match="No such file or directory"):
            pool.wait_ready(timeout=PATIENCE)
        with pytest.raises(CapacityError, match=r"the last could not be made: .*No such file or directory"):
            pool.take()
        disk.rename(tmp_path / "disk0")
        with pool.take(PATIENCE) as vm:
            answers(vm, "made")


def test_a_callable_that_fails_is_told(echoing: Path) -> None:
    with Pool(echoing, 2, instance_id=lambda index: ["first", "second"][index]) as pool:
        pool.wait_ready(timeout=PATIENCE)
        first, second = pool.take_many(2)
        with pytest.raises(CrackleError, match="IndexError: list index out of range"):
            pool.wait_ready(timeout=PATIENCE)
        with pytest.raises(CapacityError, match="the last could not be made: IndexError"):
            pool.take()
        first.stop()
        with pool.take(PATIENCE) as again:
            assert again.instance_id == "first"
        second.stop()


def test_taps_are_used_again(namespace: Namespace, guests: Path, tmp_path: Path) -> None:
    taps = [namespace.tap(mtu=1500) for _ in range(2)]
    with namespace.entered():
        with MicroVM(
            guests / "echo.elf", boot_args="", memory=32, interfaces=[taps[0]], metadata={"at": "first"}
        ) as vm:
            vm.console.expect("echo\n", PATIENCE)
            vm.snapshot(tmp_path)
        with pytest.raises(ConfigError, match="two clones would have the TAP device"):
            Pool(tmp_path, 2, interfaces={"eth0": taps[0]})
    # Its thread is where it was made.
    with namespace.entered():
        pool = Pool(tmp_path, 2, limit=2, interfaces={"eth0": lambda index: taps[index]})
    with pool:
        pool.wait_ready(timeout=PATIENCE)
        for number in range(4):
            with pool.take(PATIENCE, metadata={"number": number}) as vm:
                assert vm.metadata == {"number": number}
                answers(vm, f"number{number}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 0}, "size of a pool is a number from 1 on, not 0"),
        ({"size": 2, "limit": 1}, "a pool with a limit of 1 cannot keep 2 ready"),
        ({"size": 2, "vsock": "v"}, "vsock: the snapshot has no vsock device"),
        ({"size": 2, "instance_id": "x"}, "two clones would have the id 'x'"),
    ],
)
def test_what_cannot_be_a_pool_is_refused(echoing: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Pool(echoing, **arguments)


def test_a_program_that_ends_with_a_pool_leaves_nothing(echoing: Path) -> None:
    done = program(
        """
        import os, sys
        from crackle import Pool
        pool = Pool(sys.argv[1], 3)
        pool.wait_ready(2, 30)
        print(*(vm.pid for vm in pool._ready), flush=True)
        child = os.fork()
        if not child:
            try:
                pool.take()
            except Exception as error:
                print(type(error).__name__, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        """,
        echoing,
    )
    assert done.stderr == ""
    *pids, error = done.stdout.split()
    assert error == "StateError"
    assert all(gone(int(pid)) for pid in pids)
