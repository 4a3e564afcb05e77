"""Threads: each kind is started in one place, with a stack that Python's recursion ends on before C's does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from crackle.runtime.filters import use_filters
from crackle.runtime.threads import STACK_SIZES, Thread


@pytest.fixture(autouse=True)
def unfiltered() -> None:
    """What runs here is no microVM's, and another test may have had one in this process."""
    use_filters(None)


# Ways to recurse without end through C, as a device written in Python may by mistake.
RECURSIONS = {
    "a class": "class N:\n  def __init__(self, n): self.c = N(n + 1)\nN(0)",
    "getattr": "class G:\n  def __getattr__(self, name): return getattr(self, name + 'x')\nG().a",
    "map": "def f(n): return list(map(f, [n + 1]))\nf(0)",
    "a sort": "def f(n): return sorted([1], key=lambda x: f(n + 1))\nf(0)",
    "repr": "a = []\nfor _ in range(100000): a = [a]\nrepr(a)",
    "json": "import json; json.loads('[' * 100000)",
    "deepcopy": "import copy\na = []\nfor _ in range(5000): a = [a]\ncopy.deepcopy(a)",
    "pickle": "import pickle\na = []\nfor _ in range(5000): a = [a]\npickle.dumps(a)",
    "re": "import re; re.compile('(' * 5000 + ')' * 5000)",
    "format": "class F:\n  def __format__(self, s): return f'{self}'\nf'{F()}'",
    "eq": "class E:\n  def __eq__(self, o): return o == self\nE() == E()",
    "a property": "class P:\n  @property\n  def x(self): return self.x\nP().x",
    "sum": "class S:\n  def __radd__(self, o): return sum([self])\nsum([S()])",
    "reduce": "import functools\ndef f(a, b): return functools.reduce(f, [1, 2])\nf(1, 2)",
}

ON_A_THREAD = """
import sys
from crackle.runtime.threads import Thread
source = sys.argv[2]
def run():
    try:
        exec(source, {})
        print("returned")
    except BaseException as error:
        print(type(error).__name__)
Thread(sys.argv[1], run).join()
"""

ON_A_VCPU = """
import sys
from crackle.kvm.bus import Bus
from crackle.runtime.threads import Thread
source = sys.argv[2]
class Device:
    def read(self, offset, size):
        try:
            exec(source, {})
            print("returned")
        except BaseException as error:
            print(type(error).__name__)
        return 0
bus = Bus("pio")
bus.attach_python(0, 1, Device())
Thread("vcpu", lambda: bus.read(0, 1)).join()
"""


@pytest.mark.parametrize("how", RECURSIONS)
@pytest.mark.parametrize("place", ["a device on a bus", "a virtio device's thread"])
def test_a_recursion_through_c_ends_in_an_exception(place: str, how: str) -> None:
    script, kind = (ON_A_VCPU, "vcpu") if place == "a device on a bus" else (ON_A_THREAD, "python")
    command = [sys.executable, "-c", script, kind, RECURSIONS[how]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "RecursionError"), done.stderr[-500:]


@pytest.mark.parametrize("kind", sorted(STACK_SIZES))
def test_a_thread_runs_what_it_is_given_under_its_kinds_name_and_leaves_signals_to_others(kind: str) -> None:
    seen: list[object] = []

    def run() -> None:
        with open("/proc/thread-self/comm") as comm:
            seen.append(comm.read().strip())
        seen.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    thread = Thread(kind, run)
    thread.join()
    name, blocked = seen
    assert name == kind
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM, signal.SIGPIPE} <= blocked  # type: ignore[operator]
    assert not {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL} & blocked  # type: ignore[operator]


def test_a_thread_nobody_waits_for_ends_and_lets_go_of_what_it_ran() -> None:
    done = threading.Event()
    before = len(os.listdir("/proc/self/task"))
    for _ in range(50):
        done.clear()
        Thread("shell", done.set)
        assert done.wait(20)
    deadline = threading.Event()
    for _ in range(200):
        if len(os.listdir("/proc/self/task")) <= before:
            break
        deadline.wait(0.05)
    assert len(os.listdir("/proc/self/task")) <= before


def test_those_that_are_there_are_counted_until_the_kernel_has_none_of_them() -> None:
    script = """
import _thread, os, time
from crackle.runtime.census import living
from crackle.runtime.threads import Thread

def start(count):
    gate = _thread.allocate_lock()
    gate.acquire()
    def wait():
        with gate:
            pass
    return gate, [Thread("python", wait) for _ in range(count)]

def end(gate, threads):
    gate.release()
    for thread in threads:
        thread.join()

assert living() == 0
few = start(5)
assert living() == 5 == len(os.listdir("/proc/self/task")) - 1
pid = os.fork()
if not pid:
    # The threads are not here.
    assert living() == 0
    start(2)
    assert living() == 2
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0 and living() == 5
end(*few)
until = time.monotonic() + 30
while living():
    assert time.monotonic() < until
few = start(7)
assert living() == 7
many = start(125)
assert living() > 128
end(*few)
end(*many)
assert living() > 128       # nobody can say any more
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_thread_that_cannot_be_had_is_an_error_with_a_reason() -> None:
    script = """
import resource
from crackle.errors import KvmError
from crackle.runtime.threads import Thread
resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
threads = []
import time
try:
    for _ in range(100):
        threads.append(Thread("python", lambda: time.sleep(5)))
except KvmError as error:
    print(error, flush=True)
import os
os._exit(0)
"""
    # One arena of malloc's for each thread would take the room first.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment
    )
    assert "cannot start the thread 'python'" in done.stdout, done.stderr


def test_an_unknown_kind_has_no_thread() -> None:
    with pytest.raises(KeyError):
        Thread("nobody", print)
