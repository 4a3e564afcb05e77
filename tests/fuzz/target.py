"""Runs one target in this process, whose core is an instrumented build (`asan.environment`).

python tests/fuzz/target.py NAME [libFuzzer's options and directories]       fuzz, with atheris
python tests/fuzz/target.py NAME --replay [files or directories]             run inputs once, without it
python tests/fuzz/target.py NAME --lines [files or directories]              the same, and count lines of Python
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import CodeType, FrameType

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import targets  # noqa: E402
from targets.device import Target  # noqa: E402


def load(name: str) -> Target:
    """The target, made while only one CPU is there: then no device looks out for what may come next."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        return targets.make(name)
    finally:
        os.sched_setaffinity(0, cpus)


def replay(target: Target, places: list[str]) -> None:
    """Run each input once; prints how many there were, and the name of one that ends the process last."""
    count = 0
    for place in map(Path, places):
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                print(path, file=sys.stderr, flush=True)
                target.run(path.read_bytes())
                count += 1
    print(f"{count} inputs")


def lines(name: str, places: list[str]) -> None:
    """`replay`, and print how many lines of the functions in the target's modules ran."""
    target = load(name)
    modules = [importlib.import_module(f"crackle.{module}") for module in targets.NAMES[name].modules]
    files = {module.__file__ for module in modules}
    seen = set()

    def trace(frame: FrameType, event: str, argument: object) -> object:
        if frame.f_code.co_filename not in files:
            return None
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    replay(target, places)
    sys.settrace(None)
    there = set()
    for file in files:
        codes = [compile(Path(file).read_text(), file, "exec")]
        while codes:
            code = codes.pop()
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            if code.co_flags & 2:  # CO_NEWLOCALS: a function, neither a module nor a class
                there |= {(file, line) for _, _, line in code.co_lines() if line is not None}
    print(f"{len(seen & there)} of {len(there)} lines")


def fuzz(name: str, arguments: list[str]) -> None:
    """Until libFuzzer ends the process."""
    import atheris

    if targets.NAMES[name].python:
        with atheris.instrument_imports(
            include=[f"crackle.{module}" for module in targets.NAMES[name].modules]
        ):
            target = load(name)
    else:
        target = load(name)
    # libFuzzer begins itself again when it merges, with these words.
    atheris.Setup([f"{sys.executable} {__file__} {name}", *arguments], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if arguments[:1] == ["--replay"]:
        replay(load(name), arguments[1:])
    elif arguments[:1] == ["--lines"]:
        lines(name, arguments[1:])
    else:
        fuzz(name, arguments)
