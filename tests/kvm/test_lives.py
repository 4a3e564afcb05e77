"""How a microVM's objects live and die: with the script that made them, by reference counting, and across a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PATIENCE = 60.0

# What every script begins with: `guest(name, options...)` is a started microVM.
PRELUDE = """
import gc, os, sys, threading, time
import crackle

def guest(name, boot_args="", **options):
    vm = crackle.MicroVM(f"{GUESTS}/{name}.elf", boot_args=boot_args, memory=64, **options)
    vm.start()
    vm.console.expect(name, 20)
    return vm

def threads():
    "The names of this process's threads."
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as file:
                names.append(file.read().strip())
        except OSError:
            pass  # it has just ended
    return sorted(names)

class Device(crackle.VirtioDevice):
    device_id = 42
    queue_sizes = (8,)

def drive(vm):
    "What a driver does until the device is its own; afterwards the device's methods run."
    from support.driver import F_VERSION_1, Registers, Ring
    machine = vm._machine()
    registers = Registers(machine.mmio, list(machine.plugs.transports.values())[-1].address)
    assert registers.negotiate(F_VERSION_1) and registers.set_up_queue(0, Ring(machine.memory, 0x2000000, 8))
    registers.drive()
"""

Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def script(guests: Path) -> Script:
    """Runs a script in an interpreter of its own, which must end by itself."""

    def run(text: str, *prefix: str) -> subprocess.CompletedProcess[str]:
        command = [*prefix, sys.executable, "-X", "dev", "-c", f"GUESTS = {str(guests)!r}{PRELUDE}{text}"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)

    return run


# -- the script's end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["", "keep = [vm, vm._machine()]\n"])
@pytest.mark.parametrize("name", ["idle", "hammer"])
def test_a_script_that_ends_without_stop_ends(script: Script, name: str, kept: str) -> None:
    done = script(f"vm = guest({name!r}, devices=[Device()])\n{kept}print('ends')")
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr


def test_a_script_that_fails_ends_with_its_own_error(script: Script) -> None:
    done = script("vm = guest('hammer')\nraise RuntimeError('the script failed')")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: the script failed")


def test_a_script_that_ends_before_the_start_ends(script: Script) -> None:
    done = script("vm = crackle.MicroVM(f'{GUESTS}/idle.elf', memory=64)\nprint('ends')")
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace")
def test_a_script_with_metadata_ends(script: Script) -> None:
    done = script("vm = guest('idle', interfaces=['t0'], metadata={'a': 1})\nprint('ends')", "unshare", "-n")
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr


# -- a fork --------------------------------------------------------------------------------------------------------

FORK = """
vm = guest("idle", "tick=100 beats=10", devices=[Device()], vsock=f"/tmp/crackle-lives-{os.getpid()}")
machine = vm._machine()
before = machine.vcpus[0].exits["interrupted"]
child = os.fork()
if child == 0:
    CHILD
pid, status = os.waitpid(child, 0)
print("child", os.waitstatus_to_exitcode(status))
print("interrupted", machine.vcpus[0].exits["interrupted"] - before)
print("socket", os.path.exists(machine.devices["vsock", "vsock"].uds_path))
vm.console.expect("beat")
print(vm.state)
vm.stop()
"""


@pytest.mark.parametrize(
    "child",
    [
        "del machine, vm; gc.collect(); os._exit(0)",
        "machine.stop(); os._exit(0)",
        "sys.exit()",
        "threading.Thread(target=gc.collect).start(); sys.exit()",
    ],
)
def test_a_forked_child_ends_and_leaves_the_guest_alone(script: Script, child: str) -> None:
    done = script(FORK.replace("CHILD", child))
    lines = done.stdout.splitlines()
    assert lines == ["child 0", "interrupted 0", "socket True", "Running"], (done.stdout, done.stderr)


def test_a_forked_child_keeps_no_descriptor(script: Script) -> None:
    done = script(
        """
def held():
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
before = held()
vm = guest("idle", devices=[Device()], vsock=f"/tmp/crackle-lives-{os.getpid()}")
if (child := os.fork()) == 0:
    print(held() - before, flush=True)
    os._exit(0)
os.waitpid(child, 0)
vm.stop()
"""
    )
    assert done.stdout == "set()\n", done.stderr


def test_a_forked_childs_object_says_whose_it_is(script: Script) -> None:
    done = script(
        """
vm = guest("idle", "tick=100 beats=10")
console, parent = vm.console, os.getpid()
if (child := os.fork()) == 0:
    calls = (vm.start, vm.stop, vm.pause, vm.resume, vm.wait, vm.shutdown, vm.metrics, vm.send_ctrl_alt_del)
    properties = ("state", "exit_status", "console", "config", "metadata")
    for call in (*calls, *(lambda name=name: getattr(vm, name) for name in properties)):
        try:
            call()
        except crackle.StateError as error:
            assert f"belongs to process {parent}," in str(error), error
        else:
            raise AssertionError(call)
    assert repr(vm) == f"<MicroVM 'anonymous-instance' of process {parent}>", vm
    for call in (lambda: console.write("x"), lambda: console.expect("beat 99")):
        try:
            call()
        except crackle.CrackleError:
            pass
        else:
            raise AssertionError(call)
    with vm_of_child() as own:
        own.console.expect("hello", 20)
    sys.exit()
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
vm.console.expect("beat", 20)
vm.stop()
""".replace("vm_of_child()", 'crackle.MicroVM(f"{GUESTS}/hello.elf", memory=64)')
    )
    assert done.stdout == "child 0\n", done.stderr


def test_leaving_the_block_in_a_child_leaves_the_guest_alone(script: Script) -> None:
    done = script(
        """
with guest("idle", "tick=100 beats=10") as vm:
    if (child := os.fork()) == 0:
        sys.exit(3)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    vm.console.expect("beat", 20)
"""
    )
    assert done.stdout == "child 3\n", done.stderr


def test_multiprocessing_forks_beside_a_microvm(script: Script) -> None:
    done = script(
        """
import multiprocessing
vm = guest("idle", "tick=100 beats=10")
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(abs, [-1, -2, -3]))
    vm.console.expect("beat", 20)
print(vm.state)
"""
    )
    assert done.stdout == "[1, 2, 3]\nRunning\n", done.stderr


def test_a_device_may_fork(script: Script) -> None:
    done = script(
        """
children = []
class Forks(Device):
    def activated(self, features):
        child = os.fork()
        if child == 0:
            os._exit(7)
        children.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        done.set()
done = threading.Event()
vm = guest("idle", "tick=100 beats=10", devices=[Forks()])
drive(vm)
assert done.wait(20)
print(children)
vm.console.expect("beat", 20)
vm.stop()
"""
    )
    assert done.stdout == "[7]\n", done.stderr


# -- the last reference --------------------------------------------------------------------------------------------


def test_one_that_is_dropped_goes_at_once(script: Script) -> None:
    done = script(
        """
gc.disable()
before, held = threads(), len(os.listdir("/proc/self/fd"))
vm = guest("idle", devices=[Device()])
del vm
print(len(os.listdir("/proc/self/fd")) == held)
while threads() != before:
    time.sleep(0.01)  # one that has been joined may be listed for a moment
"""
    )
    assert done.stdout == "True\n", done.stderr
    assert "ResourceWarning: unclosed MicroVM <MicroVM 'anonymous-instance': Running" in done.stderr


@pytest.mark.parametrize("end", ["vm.stop()", "vm.wait(20)", "pass"])
def test_one_that_does_not_run_goes_without_a_warning(script: Script, end: str) -> None:
    start = "vm.start()" if end != "pass" else ""
    done = script(f"vm = crackle.MicroVM(f'{{GUESTS}}/hello.elf', memory=64)\n{start}\n{end}\ndel vm")
    assert (done.returncode, done.stderr) == (0, "")


COLLECT = """
def collect_on_vcpu():
    machine = vm._machine()
    def read(offset, size, orig=machine.board.i8042.read, once=[]):
        if dropped.is_set() and not once:
            once.append(1)
            drop()
            gc.collect()
            print("collected", flush=True)
            collected.set()
        return orig(offset, size)
    machine.board.i8042.read = read
def ended():
    return not [name for name in threads() if name.startswith("vcpu")]
gc.disable()
dropped, collected = threading.Event(), threading.Event()
vm = guest("hammer")
collect_on_vcpu()
DROP
dropped.set()
assert collected.wait(20)
while not ended():
    time.sleep(0.01)
print("ended")
"""


@pytest.mark.parametrize(
    "drop",
    [
        "vm.cycle = vm; drop = int; del vm",
        "held = [vm]; drop = held.clear; del vm",
    ],
    ids=["cycle", "reference"],
)
def test_a_collection_on_its_own_vcpu_does_not_wait_for_itself(script: Script, drop: str) -> None:
    done = script(COLLECT.replace("DROP", drop))
    assert done.stdout == "collected\nended\n", done.stderr


# -- its own threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", ["stop()", "pause()", "resume()", "start()", "wait(1)", "shutdown()", "_machine().stop()"]
)
def test_a_device_that_would_wait_for_itself_is_told(script: Script, call: str) -> None:
    done = script(
        f"""
class Calls(Device):
    def activated(self, features):
        try:
            vm.{call}
        except crackle.StateError as error:
            print(error)
        done.set()
done = threading.Event()
vm = guest("idle", devices=[Calls()])
drive(vm)
assert done.wait(20)
print(vm.state)
vm.stop()
"""
    )
    lines = done.stdout.splitlines()
    assert "cannot wait for its" in lines[0], (lines, done.stderr)
    assert lines[1] == "Running"


def test_a_device_may_press_the_power_button(script: Script) -> None:
    done = script(
        """
class Presses(Device):
    def activated(self, features):
        vm.press_power_button()
vm = guest("heed", "power", devices=[Presses()])
drive(vm)
print(vm.wait(20).reason)
"""
    )
    assert done.stdout == "shutdown\n", done.stderr


def test_a_thread_that_waits_keeps_the_program_until_the_guest_ends(script: Script) -> None:
    done = script(
        """
vm = guest("idle", "tick=100 ticks=30")
threading.Thread(target=lambda: print(vm.wait(20).reason)).start()
"""
    )
    assert done.stdout == "reset\n", done.stderr
