"""`python -m bench.pages`: of what a microVM from a zygote has private pages, by mapping.

Child and zygote are compared page by page when the guest has run for a while; docs/performance.md has a result. Needs
root (proc(5), pagemap).
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from bench.launch import CROWD_MIB, SETTLED_S, first_output, launcher, zygote
from bench.monitor import Monitor

PAGE = os.sysconf("SC_PAGE_SIZE")
# Documentation/admin-guide/mm/pagemap.rst
PRESENT, OF_FILE, FRAME = 1 << 63, 1 << 61, (1 << 55) - 1
# A page with so few words changed has had its objects' reference counts touched, and little else.
FEW = 4
KINDS = ("as before", "few words changed", "changed", "new")


def entries(pid: int, start: int, end: int) -> list[int]:
    """Of the page map; 0 for what is not there."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        content = os.pread(file.fileno(), (end - start) // PAGE * 8, start // PAGE * 8)
    return [entry for (entry,) in struct.iter_unpack("=Q", content)]


def kind(before: bytes, after: bytes) -> str:
    """What has become of a page that the child has a copy of."""
    words = sum(before[place : place + 8] != after[place : place + 8] for place in range(0, PAGE, 8))
    return KINDS[0] if not words else KINDS[1] if words <= FEW else KINDS[2]


def account(parent: int, child: int) -> dict[str, Counter[str]]:
    """Private pages of `child` by the name of their mapping and what they are, guest memory left out."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    with (
        open(f"/proc/{parent}/mem", "rb", buffering=0) as old,
        open(f"/proc/{child}/mem", "rb", buffering=0) as new,
    ):
        for line in Path(f"/proc/{child}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            start, end = (int(place, 16) for place in fields[0].split("-"))
            if fields[1] != "rw-p" or end - start >= CROWD_MIB << 19:
                continue
            name = Path(fields[5]).name if len(fields) > 5 else "anonymous: arenas, stacks"
            for number, (theirs, own) in enumerate(
                zip(entries(parent, start, end), entries(child, start, end), strict=True)
            ):
                address = start + number * PAGE
                if not own & PRESENT or own & OF_FILE or (theirs & PRESENT and theirs & FRAME == own & FRAME):
                    continue
                if not theirs & PRESENT and not name.startswith("memfd:"):
                    found[name][KINDS[3]] += 1
                    continue
                what = kind(os.pread(old.fileno(), PAGE, address), os.pread(new.fileno(), PAGE, address))
                found[name][what] += 1
    return found


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="crackle-pages-") as directory,
        zygote(Path(directory)) as parent,
        Monitor([launcher()], Path(directory)) as monitor,
    ):
        first_output(monitor)
        time.sleep(SETTLED_S)
        (child,) = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
        found = account(parent, child)
    print("KiB".ljust(44), *(name.rjust(18) for name in KINDS))
    for name, pages in sorted(found.items(), key=lambda item: -item[1].total()):
        print(name.ljust(44), *(str(pages[what] * PAGE // 1024).rjust(18) for what in KINDS))


if __name__ == "__main__":
    main()
