"""`python -m bench [--firecracker PATH] [--quick] [AREA...]`: a table, and build/bench.json."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from bench.rows import BUILD, GUESTS, ROOT, Bench, Row

AREAS = (
    "exits",
    "boot",
    "start",
    "launch",
    "jail",
    "seccomp",
    "peers",
    "api",
    "memory",
    "block",
    "overlay",
    "net",
    "drivers",
    "vsock",
    "balloon",
    "pause",
    "snapshot",
    "fork",
    "clone",
    "growth",
    "linux",
)


def reference_name(path: str) -> str:
    """What the other monitor calls itself: the first line of its --version."""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    return (done.stdout.splitlines() or [Path(path).name])[0].strip()


def measure(area: str, bench: Bench) -> list[Row]:
    """Rows of one area. An area that fails is reported and gives none."""
    try:
        module = importlib.import_module(f"bench.{area}")
    except ModuleNotFoundError as error:
        if error.name != f"bench.{area}":
            raise
        return []
    started = time.perf_counter()
    print(f"{area} ...", end="", flush=True, file=sys.stderr)
    try:
        rows = list(module.rows(bench))
    except Exception:
        print(" failed", file=sys.stderr)
        traceback.print_exc()
        return []
    print(f" {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return rows


def show(rows: list[Row]) -> None:
    """The table on standard output."""
    cells = [("", "value", "", "against", "ratio", "goal", "met")]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        met = "" if row.met is None else "yes" if row.met else "NO"
        cells.append((row.name, f"{row.value:.4g}", row.unit, row.against, ratio, row.goal or "", met))
    widths = [max(len(cell[column]) for cell in cells) for column in range(len(cells[0]))]
    for cell in cells:
        print("  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip())


def main() -> int:
    """0 whether or not goals are met; 2 when nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Speed and memory of Crackle.")
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"of {', '.join(AREAS)} (all)")
    parser.add_argument("--firecracker", default=os.environ.get("FIRECRACKER") or None, metavar="PATH")
    parser.add_argument("--ours", default=str(ROOT / ".venv" / "bin" / "crackle-vmm"), metavar="PATH")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    given = parser.parse_args()
    unknown = set(given.areas) - set(AREAS)
    if unknown:
        parser.error(f"no area {', '.join(sorted(unknown))}; there are {', '.join(AREAS)}")
    for path in filter(None, (given.ours, given.firecracker)):
        if not os.access(path, os.X_OK):
            parser.error(f"{path} is not an executable file")
    subprocess.run(["make", "-s", "-C", str(ROOT / "guest" / "bare"), f"OUT={GUESTS}"], check=True)

    name = reference_name(given.firecracker) if given.firecracker else "the reference"
    with tempfile.TemporaryDirectory(prefix="crackle-bench-") as scratch:
        reference = [given.firecracker] if given.firecracker else None
        bench = Bench([given.ours], reference, name, Path(scratch), given.quick)
        rows = [row for area in given.areas or AREAS for row in measure(area, bench)]
    show(rows)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "bench.json").write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
