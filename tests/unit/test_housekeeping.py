"""Pages that only the start needed are given back, and nothing that was changed is lost."""

from __future__ import annotations

import subprocess
import sys

from crackle.runtime import mappings

MAPS = b"""\
00400000-00401000 r-xp 00000000 08:01 1    /usr/bin/program
00500000-00502000 r--p 00001000 08:01 1    /usr/bin/program
00600000-00601000 rw-p 00002000 08:01 1    /usr/bin/program
00700000-00703000 r-xp 00003000 08:01 1    /usr/lib/with a caf\xe9.so
00780000-00781000 rwxp 00003000 08:01 1    /usr/lib/patched.so
00800000-00801000 r-xp 00000000 00:00 0    [vdso]
00900000-00901000 r-xp 00000000 00:00 0
00a00000-00a01000 rw-p 00000000 00:00 0
"""


def test_only_code_of_files_that_cannot_be_written_is_taken() -> None:
    assert mappings.code_in(MAPS) == [(0x400000, 0x1000), (0x700000, 0x3000)]


def test_the_kernel_says_of_each_mapping_what_its_text_says() -> None:
    script = (
        "from crackle.runtime.mappings import as_before_6_11, list_all\n"
        "asked = list_all(); as_before_6_11(); read = list_all()\n"
        "assert len(read) > 20 and {access for _, _, access, *_ in read} >= {b'rw-p', b'r-xp', b'r--p'}\n"
        # But not of the text itself, nor of what the list of results is in.
        "assert len(set(read) & set(asked)) > len(read) - 8, set(read) ^ set(asked)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_of_proc_that_are_kept_open_say_the_same_and_nothing_of_a_forked_process() -> None:
    script = """
import mmap, os
from crackle.runtime import mappings
proc = os.open("/proc", os.O_PATH)
named = mappings.list_all()
mappings.keep_open(proc)
os.close(proc)
assert [os.readlink(f"/proc/self/fd/{fd}") for fd in mappings.kept_open()] == [
    f"/proc/{os.getpid()}/{name}" for name in ("maps", "pagemap")
]
asked = mappings.list_all()
mappings.as_before_6_11()
lists = [named, asked, mappings.list_all(), mappings.list_all()]
for each in lists:
    assert len(each) > 20 and len(set(each) & set(named)) > len(each) - 8, set(each) ^ set(named)
pid = os.fork()
if not pid:
    more = mmap.mmap(-1, 123 << 20)
    assert mappings.kept_open() == []
    assert 123 << 20 in [end - start for start, end, *_ in mappings.list_all()]
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_is_smaller_afterwards_and_still_works() -> None:
    script = (
        "import json, decimal; from crackle.runtime.mappings import trim_heap, unmap_code\n"
        "def rss(): return int(open('/proc/self/statm').read().split()[1])\n"
        "before = rss(); trim_heap(); unmap_code(); after = rss()\n"
        "assert json.loads('[1.5]') == [1.5] and decimal.Decimal(2).sqrt() > 1\n"
        "print(before, after)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30
    )
    before, after = map(int, done.stdout.split())
    assert after < before
