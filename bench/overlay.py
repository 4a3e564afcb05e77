"""overlay.*: virtio-block through an overlay, beside the same drive without one.

`new`: the overlay has nothing; reads go to the base, and writes to blocks that the overlay has not, until it has
them. `half`: it has every other 64 KiB. `scattered`: it has every other block of 4 KiB, the worst that there is for
long reads. `hole` compares writes to a new overlay with a plain drive that is as new: a sparse file, whose blocks
the file system has to find too.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from bench.block import ENGINES, FILE_MIB, TESTS, fill, guest_run
from bench.rows import Bench, Row, paired
from crackle.disk import make
from crackle.disk.overlay import BLOCK, MAP_AT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STATES = {"new": 0, "half": 64 << 10, "scattered": BLOCK}
"""And bytes of each piece that the overlay has, as many as it then has not; 0 for nothing at all."""


def prepare(base: Path, overlay: Path, piece: int) -> None:
    """Make the overlay anew, over the base as it is, with so much in it, all in the page cache."""
    overlay.unlink(missing_ok=True)
    header = make(str(overlay), base=str(base))
    if not piece:
        return
    blocks = piece // BLOCK
    with overlay.open("r+b") as file:
        for at in range(0, header.size, 2 * piece):
            file.seek(header.data_at + at)
            file.write(b"\x5a" * piece)
        file.seek(MAP_AT)
        pattern = b"\x55" if blocks == 1 else b"\xff" * (blocks // 8) + bytes(blocks // 8)
        file.write(pattern * (header.size // BLOCK // 8 // len(pattern)))


def rows(bench: Bench) -> Iterator[Row]:
    """MiB/s."""
    base, overlay = bench.scratch / "base.img", bench.scratch / "overlay"
    for engine in ENGINES:
        for test in TESTS:
            speed: dict[str, list[float]] = defaultdict(list)
            writes = "write" in test.operation
            for _ in range(bench.times(6)):
                base.touch()
                fill(base)
                speed["plain"].append(guest_run(bench.ours, bench.scratch, base, test, engine)[0])
                for state, piece in STATES.items():
                    prepare(base, overlay, piece)
                    found = guest_run(bench.ours, bench.scratch, base, test, engine, overlay)
                    speed[state].append(found[0])
                if writes:
                    base.unlink()
                    with base.open("wb") as file:
                        file.truncate(FILE_MIB << 20)
                    speed["hole"].append(guest_run(bench.ours, bench.scratch, base, test, engine)[0])
                overlay.unlink()
            row = f"overlay.{engine.lower()}.{test.name}"
            for state in STATES:
                goal = None if state == "scattered" else ">= 0.9"
                yield paired(f"{row}.{state}", "MiB/s", speed[state], speed["plain"], "plain", goal)
            if writes:
                yield paired(f"{row}.hole", "MiB/s", speed["new"], speed["hole"], "a plain hole", ">= 0.9")
