"""`MicroVM`, from the first call to the last, and what may be called when."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crackle import CrackleError, Drive, GuestError, MicroVM, StateError
from crackle.vmm import probe
from crackle.vmm.commands import Command
from crackle.vmm.silence import Silence


@pytest.fixture
def make(guests: Path):
    """Makes a machine with the guest of that name; stopped at the end."""
    made: list[MicroVM] = []

    def make(guest: str, boot_args: str = "", **options: object) -> MicroVM:
        made.append(MicroVM(guests / f"{guest}.elf", boot_args=boot_args, memory=64, **options))
        return made[-1]

    yield make
    for vm in made:
        vm.stop()


Make = Callable[..., MicroVM]


def test_guest_talks_and_ends(make: Make) -> None:
    with make("echo") as vm:
        vm.console.expect("echo\n", timeout=20)
        vm.console.write("ping\nend\n")
        vm.console.expect("ping", timeout=20)
        assert vm.wait(20).reason == "reset"
        assert vm.wait(20).reason == "reset"
        vm.console.expect("interrupts", timeout=20)
    assert vm.state == "Stopped"
    assert "ping" in vm.console.text


@pytest.mark.parametrize("engine", ["Sync", "Async"])
def test_a_drive_is_free_at_once_for_the_next(make: Make, tmp_path: Path, engine: str) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(bytes(1 << 20))
    for _ in range(5):
        drive = Drive("d", False, path_on_host=str(paths[0]), is_read_only=False, io_engine=engine)
        with make("idle", drives=[drive]) as vm:
            for path in (paths[1], paths[0], paths[1], paths[0]):
                vm.update_drive("d", path)


def test_wait_gives_up_in_time(make: Make) -> None:
    vm = make("idle")
    vm.start()
    for timeout in (0.05, 0, -1):
        with pytest.raises(TimeoutError, match="still runs"):
            vm.wait(timeout)


def test_a_guest_that_fails_says_where(make: Make) -> None:
    vm = make("faults", "f=triple")
    vm.start()
    for _ in range(2):
        with pytest.raises(GuestError, match=r"triple fault.*rip=0x"):
            vm.wait(20)


def test_pause_and_resume_may_be_repeated_while_the_guest_sleeps(make: Make) -> None:
    vm = make("idle")
    vm.start()
    vm.console.expect("idle", timeout=20)
    states = []
    for order in (vm.resume, vm.pause, vm.pause, vm.resume, vm.resume):
        order()
        states.append(vm.state)
    assert states == ["Running", "Paused", "Paused", "Running", "Running"]


def test_what_is_not_allowed_now_says_so(make: Make) -> None:
    vm = make("idle")
    for call in (vm.pause, vm.resume, vm.send_ctrl_alt_del, vm.metrics, vm.wait):
        with pytest.raises(StateError):
            call()
    vm.start()
    with pytest.raises(StateError, match="not supported after starting"):
        vm.start()
    vm.stop()
    vm.stop()
    for call in (vm.start, vm.pause, vm.resume, vm.send_ctrl_alt_del, vm.press_power_button, vm.metrics):
        with pytest.raises(StateError, match=r"stopped|not running"):
            call()


# -- the end ---------------------------------------------------------------------------------------------------------


def test_every_waiter_returns_when_the_microvm_is_stopped(make: Make) -> None:
    vm = make("idle")
    vm.start()
    with ThreadPoolExecutor(4) as pool:
        waiters = [pool.submit(vm.wait) for _ in range(4)]
        vm.stop()
        assert {waiter.result(timeout=20).reason for waiter in waiters} == {"stopped"}
    assert vm.wait().reason == "stopped"
    assert vm.wait(0).reason == "stopped"


def test_asyncio_ends_with_a_waiter(make: Make) -> None:
    vm = make("idle")

    async def main() -> str:
        vm.start()
        waiter = asyncio.create_task(asyncio.to_thread(vm.wait))
        await asyncio.sleep(0)
        await asyncio.to_thread(vm.stop)
        return (await waiter).reason

    assert asyncio.run(main()) == "stopped"


def test_the_exit_status_is_known_without_waiting(make: Make) -> None:
    vm = make("echo")
    assert vm.exit_status is None
    vm.start()
    vm.console.expect("echo\n", timeout=20)
    assert vm.exit_status is None
    vm.console.write("end\n")
    vm.wait(20)
    assert vm.exit_status is not None
    assert vm.exit_status.reason == "reset"
    vm.stop()
    assert vm.exit_status.reason == "reset"


def test_a_guest_that_has_ended_is_stopped(make: Make, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    vm = make("faults", "f=triple", drives=[disk])
    vm.start()
    with pytest.raises(GuestError, match="rip="):
        vm.wait(20)
    assert vm.state == "Stopped"
    # The API's `GET /` asks the same one.
    assert vm._controller.execute(Command("get_instance")).state == "Stopped"
    for call in (
        vm.pause,
        vm.resume,
        vm.send_ctrl_alt_del,
        vm.press_power_button,
        lambda: vm.update_drive("drive0", disk),
        lambda: vm.console.write("x"),
    ):
        with pytest.raises(StateError, match=r"triple fault.*rip=0x"):
            call()
    with pytest.raises(GuestError, match=r"triple fault.*rip=0x"):
        vm.console.expect("never")
    assert vm.metrics()["vcpu"]["failures"] == 1
    vm.stop()
    with pytest.raises(GuestError, match=r"triple fault.*rip=0x"):
        vm.wait()


@pytest.mark.parametrize(
    ("heeds", "reason", "step"),
    [("power", "shutdown", "power button"), ("keys", "reset", "Ctrl-Alt-Del"), ("", "stopped", "stop")],
)
def test_shutdown_asks_before_it_stops(make: Make, heeds: str, reason: str, step: str) -> None:
    vm = make("heed", heeds)
    vm.start()
    vm.console.expect("heed\n", timeout=20)
    status = vm.shutdown(2 if heeds != "power" else 60)
    assert (status.reason, status.step, status.exit_code) == (reason, step, 0)
    assert "power button\n" in vm.console.text
    assert ("keys\n" in vm.console.text) is (heeds != "power")
    assert vm.state == "Stopped"
    assert vm.shutdown().reason == reason


def test_shutdown_wakes_a_paused_guest(make: Make) -> None:
    vm = make("heed", "power")
    vm.start()
    vm.console.expect("heed\n", timeout=20)
    vm.pause()
    assert vm.shutdown(60).step == "power button"


def test_shutdown_of_one_that_has_ended_says_how(make: Make) -> None:
    vm = make("hello")
    vm.start()
    vm.wait(20)
    status = vm.shutdown()
    assert (status.reason, status.step) == ("reset", None)


def test_stop_waits_for_what_another_thread_has_begun(make: Make) -> None:
    """Threads that pause, resume, ask and stop at once: each call succeeds whole or says that it is too late."""
    for _ in range(10):
        vm = make("idle", "tick=1000 beats=100")
        vm.start()
        strange: list[BaseException] = []

        def run(call: Callable[[], object], vm: MicroVM = vm, strange: list[BaseException] = strange) -> None:
            try:
                while vm.state != "Stopped":
                    call()
            except StateError:
                pass
            except BaseException as error:
                strange.append(error)

        calls = (vm.pause, vm.resume, vm.metrics, lambda vm=vm: vm.config)
        threads = [threading.Thread(target=run, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        vm.console.expect("beat", timeout=20)
        vm.stop()
        for thread in threads:
            thread.join(20)
        assert not strange
        assert not any(thread.is_alive() for thread in threads)


def test_the_console_outlives_the_guest(make: Make) -> None:
    with make("hello") as vm:
        vm.wait(20)
        vm.console.expect("hello", timeout=20)
    assert vm.console.output == b">hello\n"
    with pytest.raises(CrackleError, match="the guest ended"):
        vm.console.expect("more")
    with pytest.raises(StateError, match="stopped"):
        vm.console.write("more")


def test_expecting_ends_at_once_when_the_guest_fails(make: Make) -> None:
    with make("faults", "f=triple") as vm:
        with pytest.raises(GuestError, match=r"did not show 'login': .*triple fault.*rip=0x"):
            vm.console.expect("login", timeout=3600)
        with pytest.raises(StateError, match=r"nobody reads the guest's console: .*triple fault"):
            vm.console.write("root\n")
    with pytest.raises(GuestError, match=r"triple fault.*rip=0x"):
        vm.console.expect("login", timeout=3600)


def test_expecting_ends_at_once_when_the_guest_resets(make: Make) -> None:
    with (
        make("hello") as vm,
        pytest.raises(CrackleError, match="the guest ended: the guest asked for a reset"),
    ):
        vm.console.expect("login", timeout=3600)


def test_expecting_and_typing_end_when_the_machine_is_stopped(make: Make) -> None:
    vm = make("idle")
    vm.start()
    ends: list[object] = []

    def attempt(call: Callable[[], object]) -> None:
        with pytest.raises(StateError, match="stopped") as caught:
            call()
        ends.append(caught.value)

    calls = (lambda: vm.console.expect("login", timeout=3600), lambda: vm.console.write(bytes(1 << 20)))
    threads = [threading.Thread(target=attempt, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    vm.stop()
    for thread in threads:
        thread.join(20)
    assert len(ends) == 2


def test_console_output_is_kept_within_its_bound(make: Make) -> None:
    with make("idle", "tick=1000 beats=20", console_limit=100) as vm:
        match = vm.console.expect(r"beat 50\n", timeout=60)
        assert match[0] == b"beat 50\n"
        assert len(vm.console.output) <= 100
        assert vm.console.dropped > 0


def test_two_machines_at_once_keep_apart(make: Make) -> None:
    with make("idle", "tick=100 beats=5") as first, make("echo") as second:
        second.console.expect("echo\n", timeout=20)
        second.console.write("apart\nend\n")
        second.wait(20)
        first.console.expect("beat 2", timeout=20)
        assert first.state == "Running"
        assert "apart" in second.console.text
    assert "apart" not in first.console.text


def test_twenty_in_turn_leave_nothing(make: Make, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def once() -> None:
        with make("hello", drives=[disk]) as vm:
            vm.wait(20)

    once()
    gc.collect()  # what earlier tests have left to it
    before = held()
    for _ in range(20):
        once()
    deadline = time.monotonic() + 10
    # A thread of the first one may have been on its way out when they were counted.
    while any(now > was for now, was in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, (before, held())
        time.sleep(0.05)


def test_who_waits_for_a_guest_that_says_nothing_is_told_why_where_kvm_runs_no_linux(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Silence, "PERIOD_S", 0.2)
    monkeypatch.setattr(probe, "why_no_linux", lambda: "This host's KVM is to blame.")
    vm = make("idle")
    vm.start()
    vm.console.expect("idle", timeout=20)
    with (
        pytest.warns(RuntimeWarning, match=r"^The guest has said nothing for 0\.2 s\. This host's") as told,
        pytest.raises(TimeoutError),
    ):
        vm.wait(1.5)
    assert [warning.filename for warning in told] == [__file__]
    monkeypatch.setattr(probe, "why_no_linux", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TimeoutError):
            vm.wait(0.5)
