"""The zygote's memory as a file: a child gives back what is as it was, and nothing else is lost."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Whether the interpreter has objects whose references it does not count.
IMMORTAL = sys.version_info >= (3, 12)

PARENT = """
import gc, mmap, os, struct, sys
from crackle.runtime import image
from crackle.runtime.pages import written_pages
from crackle.runtime.threads import Thread

PAGE = mmap.PAGESIZE

def own_kib():
    return sum(size for _, size in struct.iter_unpack("=2Q", written_pages(os.getpid()))) >> 10

def owns(addresses):
    pages = {
        page for start, size in struct.iter_unpack("=2Q", written_pages(os.getpid()))
        for page in range(start, start + size, PAGE)
    }
    return sum(address & -PAGE in pages for address in addresses)

def lines():
    return sum("memfd:crackle-zygote" in line and " rw-p " in line for line in open("/proc/self/maps"))

kept = bytearray(b"as it was" * 200_000)        # a mapping of its own
before = bytes(kept)
things = [str(number) for number in range(20_000)]
unhashed = ["never asked for its hash: %d" % number for number in range(2_000)]
class Slot:
    __slots__ = ("held",)
slots = [Slot() for _ in range(2_000)]
for slot in slots:
    slot.held = things
uncalled = [eval(compile("lambda: %d" % number, "", "eval")) for number in range(2_000)]
size = image.take()
"""


def in_a_child(does: str, before: str = "") -> None:
    """Have a process put itself into a file, and a child of it do that."""
    script = f"{PARENT}{before}\nif (child := os.fork()):\n    status = os.waitpid(child, 0)[1]\n"
    script += "    sys.exit(os.waitstatus_to_exitcode(status))\n" + does
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module", autouse=True)
def there_is_an_image() -> None:
    """Everything here is about Linux on machines with pages of 4 KiB, and an interpreter with a GIL."""
    done = subprocess.run(
        [sys.executable, "-c", f"{PARENT}\nprint(size, lines())"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    size, mappings = map(int, done.stdout.split())
    assert size > 2 << 20
    assert mappings


def test_pages_that_are_again_as_they_were_are_given_back_and_those_that_are_not_are_kept() -> None:
    in_a_child("""
for place in range(0, len(kept), PAGE):
    kept[place] = 0
written = own_kib()
assert written > 1700
for place in range(0, len(kept), PAGE):
    kept[place] = before[place]
kept[5 * PAGE] = 7
given = image.give_back()
assert given > 1600 << 10, given
assert own_kib() < written - 1500
assert kept[5 * PAGE] == 7 and kept[: 5 * PAGE] == before[: 5 * PAGE] and kept[5 * PAGE + 1 :] == before[5 * PAGE + 1 :]
""")


# The kernel is asked for a mapping from 6.11 on; before, there is only the text of all of them.
LISTED = pytest.mark.parametrize(
    "listed", ["", "from crackle.runtime import mappings; mappings.as_before_6_11()"], ids=["asked", "read"]
)


@LISTED
def test_what_takes_long_is_done_in_parts(listed: str) -> None:
    in_a_child(f"""{listed}
for place in range(0, len(kept), PAGE):
    kept[place] = 0
    kept[place] = before[place]
given, parts = image.give_back([], 1), 1
while image.unfinished():
    given += image.give_back([], 1)
    parts += 1
assert given > 1600 << 10 and parts > 10, (given, parts)
image.give_back([], 60_000_000)
assert not image.unfinished() and kept == before
""")


def test_pages_in_which_only_references_were_counted_are_given_back_and_the_objects_live() -> None:
    in_a_child("""
image.give_back()
own = own_kib()
again = list(things)
image.give_back()
assert own_kib() < own + 400            # the list, and not the 1,000 KiB of its strings
del again
gc.collect()
image.give_back()
assert things == [str(number) for number in range(20_000)]
""")


def test_whoever_looks_at_an_object_writes_to_it_where_python_has_no_immortal_ones() -> None:
    in_a_child(f"""
places = [id(each) for each in things]
image.give_back()
again = list(things)
assert (owns(places) < 1000) is {IMMORTAL}
""")


def test_an_object_outlives_more_references_lost_than_it_had() -> None:
    in_a_child("""
for _ in range(100):
    again = [things[77]] * 1000
    image.give_back()
    del again
assert things[77] == "77" and sys.getrefcount(things[77]) > 1 << 30
""")


# From 3.12 on, code counts for each of its instructions.
CALLED = pytest.param(
    "uncalled, lambda function: function()", marks=pytest.mark.skipif(IMMORTAL, reason="Python 3.11's")
)


@pytest.mark.parametrize("done", ["unhashed, hash", CALLED])
def test_what_is_hashed_or_called_for_the_first_time_is_as_it_was(done: str) -> None:
    in_a_child(f"""
which, does = {done}
places = [id(getattr(each, "__code__", each)) for each in which]
for each in which:
    does(each)
del each
image.give_back()
assert owns(places) < 200
""")


@LISTED
def test_memory_that_has_come_in_the_place_of_the_image_is_left_alone(listed: str) -> None:
    in_a_child(f"""{listed}
grown = kept
grown += bytes(range(256)) * (1 << 14)      # mapped anew, or elsewhere
for place in range(len(before), len(grown), PAGE):
    grown[place] = 9
expected = bytes(grown)
image.give_back()
assert grown == expected
del grown, kept
fresh = [bytearray(1 << 20) for _ in range(4)]      # where the other was, among other places
image.give_back()
assert not any(map(any, fresh))
""")


def test_what_a_worker_waits_on_is_left_alone() -> None:
    in_a_child("""
place = id(slots[100])
slots[100].held = None
slots[100].held = things
image.give_back([slots[100]])
assert owns([place])
image.give_back()
assert not owns([place])
""")


def test_the_file_cannot_be_changed_and_is_open_nowhere() -> None:
    in_a_child("""
for fd in range(3, 64):
    try:
        assert "memfd" not in os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        pass
for line in open("/proc/self/maps"):
    assert "memfd:crackle-zygote" not in line or line.split()[1] in ("rw-p", "r--p")
""")


def test_a_process_with_threads_is_not_put_into_a_file() -> None:
    script = PARENT.replace(
        "size =",
        "from _thread import allocate_lock\nlock = allocate_lock()\nlock.acquire()\n"
        "thread = Thread('python', lock.acquire)\nsize =",
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\nprint(size, lines())\nlock.release()\nthread.join()"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["0", "0"]


def test_grandchildren_share_what_is_given_back() -> None:
    in_a_child("""
kept[0] = 1
if (child := os.fork()):
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
kept[0] = before[0]
kept[3 * PAGE] = 5
assert image.give_back() > 0
assert kept[0] == before[0] and kept[3 * PAGE] == 5
os._exit(0)
""")
