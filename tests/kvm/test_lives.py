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

class Device(crackle.VirtioDevice):
    device_id = 42
    queue_sizes = (8,)
"""

Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def script(guests: Path) -> Script:
    """Runs a script in an interpreter of its own, which must end by itself."""

    def run(text: str, *prefix: str) -> subprocess.CompletedProcess[str]:
        command = [*prefix, sys.executable, "-X", "dev", "-c", f"GUESTS = {str(guests)!r}{PRELUDE}{text}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)

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


def test_a_script_that_ends_before_the_start_ends(script: Script) -> None:
    done = script("vm = crackle.MicroVM(f'{GUESTS}/idle.elf', memory=64)\nprint('ends')")
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr


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
