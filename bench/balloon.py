"""balloon.*: a gibibyte that a bare-metal guest gives back, beside one madvise(2) over as much by a plain program."""

from __future__ import annotations

import ctypes
import mmap
import re
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from bench.monitor import Monitor, alternate
from bench.rows import Bench, Row, paired

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MIB = 1024
GUEST_MIB = MIB + 64
BALLOON = {"amount_mib": 0, "deflate_on_oom": False, "free_page_reporting": True}

# Its row, and the guest's options.
TESTS = {
    "balloon.inflate_1g": f"do=i,{MIB}",
    "balloon.inflate_1g_down": f"order=down do=i,{MIB}",
    "balloon.report_1g": f"do=r,{MIB}",
}


def given_back(command: Sequence[str], bench: Bench, options: str) -> float:
    """Microseconds until the host has all of it, as the guest sees it."""
    with Monitor(command, bench.scratch) as monitor:
        monitor.configure("balloon", f"free={MIB} {options}", memory_mib=GUEST_MIB, balloon=BALLOON)
        monitor.start()
        printed = monitor.wait_output("us=", 60)
        while not (found := re.search(r" us=(\d+)\n", printed)):
            monitor.read_output()
            printed = monitor.output.decode(errors="replace")
        return float(found[1])


def plain() -> float:
    """Microseconds of one call over as many pages, each of them written to."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, MIB << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        ctypes.memset(address, 1, MIB << 20)
        size, advice = ctypes.c_size_t(MIB << 20), mmap.MADV_DONTNEED
        begun = time.perf_counter()
        failed = libc.madvise(ctypes.c_void_p(address), size, advice)
        taken = time.perf_counter() - begun
        if failed:
            raise OSError(ctypes.get_errno(), "madvise")
    return taken * 1e6


def rows(bench: Bench) -> Iterator[Row]:
    """Both monitors and the plain program in turn."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, command in alternate(bench.contestants, bench.times(10)):
        for test, options in TESTS.items():
            found[name, test].append(given_back(command, bench, options))
            if name == "ours":
                found["plain", test].append(plain())
    for test in TESTS:
        ours = found["ours", test]
        yield paired(test, "us", ours, found["plain", test], "one madvise by a plain program", "<= 1.5")
        yield paired(f"{test}.monitor", "us", ours, found["reference", test], bench.reference_name, "<= 1.0")
