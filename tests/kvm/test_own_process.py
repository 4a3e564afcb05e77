"""MicroVMs with processes of their own: the same object, and nothing of them left when either process ends."""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crackle import ConfigError, CrackleError, GuestError, Logger, MicroVM, StateError, VirtioDevice

from .conftest import PATIENCE
from .test_bare_vsock import ECHO, connected


def gone(pid: int) -> bool:
    """Whether a process ends, soon."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            poll = select.poll()
            poll.register(process, select.POLLIN)
            if poll.poll(PATIENCE * 1000):
                return True
        finally:
            os.close(process)
    return False


@pytest.fixture
def counting(guests: Path) -> Iterator[MicroVM]:
    """A guest that counts, in a process of its own."""
    with MicroVM(guests / "count.elf", boot_args="", memory=64, own_process=True) as vm:
        vm.console.expect("count 2\n", PATIENCE)
        yield vm


def test_it_is_the_same_object(counting: MicroVM, tmp_path: Path) -> None:
    vm = counting
    assert vm.pid != os.getpid()
    assert f"Running, process {vm.pid}" in repr(vm)
    assert vm.config.machine_config is not None
    assert vm.config.machine_config.mem_size_mib == 64
    vm.pause()
    assert vm.state == "Paused"
    vm.snapshot(tmp_path / "s")
    vm.resume()
    assert vm.metrics()["uart"]["write_count"] > 0
    vm.press_power_button()
    vm.send_ctrl_alt_del()
    with pytest.raises(TimeoutError):
        vm.wait(0.01)
    assert not select.select([vm], [], [], 0)[0]
    last = int(vm.console.expect(r"count (\d+)\n", PATIENCE)[1])
    with MicroVM.restore(tmp_path / "s", own_process=True, instance_id="other") as other:
        assert other.pid not in (os.getpid(), vm.pid)
        assert "--id\0other" in Path(f"/proc/{other.pid}/cmdline").read_text().replace(" ", "\0")
        other.console.expect(r"count (\d+)\n", PATIENCE)
        vm.console.expect(f"count {last + 2}\n", PATIENCE)
    assert gone(other.pid)


def test_errors_have_their_class_and_words(counting: MicroVM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no drive 'none'"):
        counting.update_drive("none", "/dev/null")
    with pytest.raises(ConfigError, match=r"The MMDS data store is not initialized\."):
        counting.metadata = {}
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Create snapshot error: "):
        counting.snapshot(tmp_path / "file" / "s", tmp_path / "m")
    with pytest.raises(ConfigError, match=r"kernel file cannot be opened: .*: /none"):
        MicroVM("/none", own_process=True)
    with pytest.raises(ConfigError, match="Failed to open snapshot file"):
        MicroVM.restore(tmp_path / "none", own_process=True)
    with pytest.raises(ConfigError, match="a logger cannot be given to a microVM in a process of its own"):
        MicroVM("/none", own_process=True, logger=Logger())
    with pytest.raises(ConfigError, match="devices written in Python cannot be given"):
        MicroVM("/none", own_process=True, devices=[VirtioDevice()])


def test_a_guest_that_ends_and_one_that_fails_say_how(guests: Path) -> None:
    with MicroVM(guests / "hello.elf", boot_args="", memory=64, own_process=True) as vm:
        status = vm.wait(PATIENCE)
        assert status.reason == "reset"
        assert vm.state == "Stopped"
        assert select.select([vm], [], [], 0)[0]
        with pytest.raises(StateError, match="the microVM has stopped: the guest asked for a reset"):
            vm.pause()
        # It is there to be asked about it.
        assert vm.metrics()["uart"]["write_count"] > 0
    assert vm.exit_status == status
    assert vm.config.boot_source.kernel_image_path == str(guests / "hello.elf")
    with (
        MicroVM(guests / "faults.elf", boot_args="f=triple", memory=64, own_process=True) as vm,
        pytest.raises(GuestError, match=r"triple fault.*rip=0x"),
    ):
        vm.wait(PATIENCE)


def test_one_that_is_stopped_says_so(counting: MicroVM) -> None:
    waiting: list[object] = []
    thread = threading.Thread(target=lambda: waiting.append(counting.wait(PATIENCE).reason))
    thread.start()
    pid = counting.pid
    assert counting.shutdown(0.1).step == "stop"
    thread.join(PATIENCE)
    assert waiting == ["stopped"]
    assert counting.state == "Stopped"
    with pytest.raises(StateError):
        counting.resume()
    assert gone(pid)


def test_the_death_of_its_process_is_its_end(counting: MicroVM) -> None:
    os.kill(counting.pid, signal.SIGKILL)
    with pytest.raises(GuestError, match=r"the process of the microVM was killed by signal 9 \(Killed\)"):
        counting.wait(PATIENCE)
    assert counting.state == "Stopped"
    with pytest.raises(StateError, match="was killed by signal 9"):
        counting.pause()
    with pytest.raises(CrackleError, match="was killed"):
        counting.console.expect("never", PATIENCE)


def test_a_process_that_hangs_is_killed(counting: MicroVM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crackle.vmm.remote.STOP_TIMEOUT", 0.1)
    os.kill(counting.pid, signal.SIGSTOP)
    # It does not answer either.
    counting._controller._owed.clear()
    monkeypatch.setattr(counting._controller, "collect", lambda: None)
    pid = counting.pid
    counting.stop()
    assert gone(pid)


def test_nothing_stays_open(guests: Path) -> None:
    MicroVM(guests / "count.elf", boot_args="", memory=64, own_process=True).stop()
    gc.collect()  # what earlier tests have left to it
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with MicroVM(guests / "count.elf", boot_args="", memory=64, own_process=True) as vm:
            pid = vm.pid
            assert len(os.listdir(f"/proc/{pid}/fd")) < 40
        with pytest.raises(ConfigError):
            MicroVM("/none", own_process=True)
        assert gone(pid)
    assert set(os.listdir("/proc/self/fd")) == before


def test_paths_are_as_this_process_sees_them(
    guests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with MicroVM(guests / "vsock.elf", boot_args="t=echo,9", memory=64, vsock="v", own_process=True) as vm:
        vm.console.expect("vsock echo ready", PATIENCE)
        with connected(str(tmp_path / "v"), ECHO) as program:
            program.sendall(b"before")
            assert program.recv(6) == b"before"
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
        vm.snapshot("here")
        assert (tmp_path / "below" / "here" / "state").exists()
        monkeypatch.chdir(tmp_path)
    assert not (tmp_path / "v").exists()


def test_descriptors_for_the_console_are_handed_over(guests: Path) -> None:
    read, write = os.pipe()
    try:
        with MicroVM(
            guests / "count.elf", boot_args="", memory=64, console=(-1, write), own_process=True
        ) as vm:
            assert select.select([read], [], [], PATIENCE)[0]
            assert os.read(read, 5)
            with pytest.raises(StateError, match="console was given to somebody else"):
                vm.console  # noqa: B018
    finally:
        os.close(read)
        os.close(write)


def program(text: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


BEGIN = """
import os, signal, sys
from crackle import MicroVM
vm = MicroVM(sys.argv[1], boot_args="", memory=64, own_process=True)
vm.start()
vm.console.expect("count 2\\n", 30)
with open(f"/proc/{vm.pid}/stat") as stat:
    zygote = stat.read().rpartition(")")[2].split()[1]
print(vm.pid, zygote, flush=True)
"""


@pytest.mark.parametrize(
    "end", ["", "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)", "raise SystemExit(4)"]
)
def test_however_a_program_ends_its_microvms_do_too(guests: Path, end: str) -> None:
    done = program(BEGIN + end, guests / "count.elf")
    assert done.stderr == ""
    for pid in map(int, done.stdout.split()):
        assert gone(pid)


def test_a_forked_child_leaves_it_alone(guests: Path) -> None:
    done = program(
        BEGIN
        + textwrap.dedent("""
        child = os.fork()
        if not child:
            try:
                vm.pause()
            except Exception as error:
                print(type(error).__name__, flush=True)
            # One of its own, from a zygote of its own.
            with MicroVM(sys.argv[1], boot_args="", memory=64, own_process=True) as other:
                other.console.expect("count 2\\n", 30)
            os._exit(0)
        print(os.waitpid(child, 0)[1], vm.state)
        vm.console.expect(r"count \\d+\\n", 30)
        vm.stop()
        """),
        guests / "count.elf",
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == ["StateError", "0 Running"]


def test_a_zygote_that_is_killed_is_started_again(guests: Path) -> None:
    done = program(
        BEGIN
        + textwrap.dedent("""
        os.kill(int(zygote), signal.SIGKILL)
        os.waitpid(int(zygote), 0)
        with MicroVM(sys.argv[1], boot_args="", memory=64, own_process=True) as other:
            other.console.expect("count 2\\n", 30)
            print(vm.state)
        vm.stop()
        print(vm.exit_status.reason)
        """),
        guests / "count.elf",
    )
    assert done.stderr == ""
    assert done.stdout.split()[2:] == ["Running", "stopped"]
