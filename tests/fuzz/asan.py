"""Builds the core with a sanitizer, apart from the ordinary build, and runs pytest on it (AddressSanitizer).

    python tests/fuzz/asan.py [pytest's arguments]

The build is kept in build/asan; what has changed of the core is compiled anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "src" / "crackle"
FOUND = 99
"""Exit status of a process in which AddressSanitizer found something."""


class Build(NamedTuple):
    """A way to build the core, kept in build/`name`; `library`: what goes into a process before it starts."""

    name: str
    compiler: str
    sanitize: str
    library: Callable[[], str]
    flags: Callable[[Path], list[str]] = lambda _: []

    @property
    def home(self) -> Path:
        return ROOT / "build" / self.name


def _gcc_library(name: str) -> str:
    return subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()


ASAN = Build("asan", "gcc", "address", lambda: _gcc_library("libasan.so"))
TSAN = Build("tsan", "gcc", "thread", lambda: _gcc_library("libtsan.so"))


def _digest(*things: Path | bytes) -> str:
    state = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Path):
            thing = str(thing.relative_to(ROOT)).encode() + b"\0" + thing.read_bytes()
        state.update(len(thing).to_bytes(8, "little") + thing)
    return state.hexdigest()


def build(kind: Build = ASAN) -> Path:
    """Make the instrumented package, if it is not there already; returns the directory to import it from."""
    lock = ROOT / "build" / f"{kind.name}.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        return _build(kind)


def _build(kind: Build) -> Path:
    library, stamp = kind.home / "lib", kind.home / "stamp"
    version = subprocess.check_output([kind.compiler, "--version"])
    how = _digest(sys.version.encode(), version, ROOT / "setup.py", Path(__file__))
    what = _digest(*sorted([*PACKAGE.rglob("*.pyx"), *PACKAGE.rglob("*.pxd")]))
    before = stamp.read_text().split() if stamp.exists() else ["", ""]
    if before != [how, what]:
        if before[0] != how:
            shutil.rmtree(kind.home, ignore_errors=True)
        kind.home.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--parallel", "2"]
        command += ["--build-lib", str(library), "--build-temp", str(kind.home / "temp")]
        variables = os.environ | {"CRACKLE_SANITIZE": kind.sanitize, "CC": kind.compiler}
        variables["CFLAGS"] = " ".join(kind.flags(kind.home))
        subprocess.run(command, cwd=ROOT, env=variables, check=True, stdout=subprocess.DEVNULL)
        stamp.write_text(f"{how} {what}")
    # The Python side is not part of the stamp: it is linked, as it is now.
    wanted = {library / path.relative_to(PACKAGE.parent): path for path in PACKAGE.rglob("*.py")}
    # What is as it should be stays: other processes may be at work with it.
    there = {
        link for link in library.rglob("*.py") if link.is_symlink() and link.readlink() == wanted.get(link)
    }
    for link in library.rglob("*.py"):
        if link not in there:
            link.unlink()
    for link in wanted.keys() - there:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(wanted[link])
    return library


def environment(kind: Build = ASAN) -> dict[str, str]:
    """In which a Python process imports the instrumented package.

    Python's own objects come from malloc as well, so that what is written beyond one of them is seen.
    """
    return os.environ | {
        "LD_PRELOAD": os.path.realpath(kind.library()),
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND}:allocator_may_return_null=1",
        "TSAN_OPTIONS": f"exitcode={FOUND}:suppressions={HERE / 'tsan.supp'}:second_deadlock_stack=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(build(kind)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CRACKLE_ASAN": "1",
    }


def main() -> int:
    """Run pytest; its exit status, or FOUND. What AddressSanitizer has to say goes to standard error."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        *sys.argv[1:],
    ]
    variables = environment()
    # pytest captures the output, and would take the report with it when the process ends.
    with tempfile.TemporaryDirectory() as reports:
        variables["ASAN_OPTIONS"] += f":log_path={reports}/report"
        status = subprocess.run(command, cwd=ROOT, env=variables).returncode
        for path in sorted(Path(reports).iterdir()):
            print(path.read_text(errors="replace"), file=sys.stderr)
            status = FOUND
    return status


if __name__ == "__main__":
    sys.exit(main())
