"""Builds the core with AddressSanitizer, apart from the ordinary build, and runs pytest on it.

    python tests/fuzz/asan.py [pytest's arguments]

The build is kept in build/asan and made anew when a source of the core has changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "crackle"
HOME = ROOT / "build" / "asan"
LIBRARY = HOME / "lib"
STAMP = HOME / "stamp"
FOUND = 99
"""Exit status of a process in which AddressSanitizer found something."""


def _digest() -> str:
    """What the build depends on: the core's sources, how it is built, and with what."""
    state = hashlib.sha256(sys.version.encode())
    state.update(subprocess.check_output(["gcc", "--version"]))
    for path in sorted([ROOT / "setup.py", *PACKAGE.rglob("*.pyx"), *PACKAGE.rglob("*.pxd")]):
        state.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def build() -> Path:
    """Make the instrumented package, if it is not there already; returns the directory to import it from."""
    digest = _digest()
    if not STAMP.exists() or STAMP.read_text() != digest:
        shutil.rmtree(HOME, ignore_errors=True)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--parallel", "2"]
        command += ["--build-lib", str(LIBRARY), "--build-temp", str(HOME / "temp")]
        environment = os.environ | {"CRACKLE_SANITIZE": "address"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(HOME / "temp", ignore_errors=True)
        STAMP.write_text(digest)
    # The Python side is not part of the stamp: it is linked, as it is now.
    for path in LIBRARY.rglob("*.py"):
        path.unlink()
    for path in PACKAGE.rglob("*.py"):
        link = LIBRARY / path.relative_to(PACKAGE.parent)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return LIBRARY


def environment() -> dict[str, str]:
    """In which a Python process imports the instrumented package.

    Python's own objects come from malloc as well, so that what is written beyond one of them is seen.
    """
    library = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True).strip()
    return os.environ | {
        "LD_PRELOAD": os.path.realpath(library),
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND}:allocator_may_return_null=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(build()),
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
