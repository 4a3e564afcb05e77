"""What is called is installed: the programs that sources, tests and tools start, against the set-up's list of them."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from hostkit import debian, packages  # noqa: E402

PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
# Functions and methods whose first argument is a command line or a program.
CALLS = {"run", "popen", "Popen", "call", "check_call", "check_output", "which", "execvp", "execv", "_run"}
# What looks like a command line and is none, or is a program of the guest or of the project.
OTHERS = {"crackle", "crackle-vmm", "no-such-command", *(path.stem for path in ROOT.glob("guest/bare/*.c"))}


def sources() -> Iterator[Path]:
    for top in ("src", "tests", "tools", "bench", "guest", "examples"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix == ".py" or (
                path.is_file()
                and path.suffix == ""
                and path.read_bytes().startswith(b"#!/usr/bin/env python3")
            ):
                yield path


LISTED = packages.programs()


def started(path: Path) -> set[str]:
    """Programs that a source starts: the first word of the list, or of the string, that is given to such a call."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first: ast.expr = node.args[0]
        if isinstance(first, ast.List | ast.Tuple) and first.elts:
            first = first.elts[0]
        elif name in ("run", "call"):  # a Namespace's take a program by itself; others mean something else
            name = name if len(node.args) > 1 else ""
        if name in CALLS and isinstance(first, ast.Constant) and isinstance(first.value, str):
            found.add(first.value.rpartition("/")[2])
    return {word for word in found if re.fullmatch(r"[a-z][a-z0-9_.+-]+", word)}


def test_every_program_that_is_started_is_listed_or_in_every_debian() -> None:
    known = set(LISTED) | packages.BASE | OTHERS
    unknown = {f"{word} ({path.relative_to(ROOT)})" for path in sources() for word in started(path) - known}
    assert not unknown, "list them in tools/hostkit/packages.py"


def test_no_program_is_listed_that_nothing_calls() -> None:
    text = "\n".join(
        path.read_text() for path in sources() if path.name not in ("packages.py", "test_setup.py")
    )
    text += (
        "\n".join(path.read_text() for path in ROOT.rglob("guest/**/Makefile"))
        + (ROOT / "Makefile").read_text()
    )
    through_others = {
        *packages.KERNEL["flex"].programs,
        "bison",
        "bc",
        "lz4",
        "xz",
        "clang",
        "llvm-symbolizer",
    }
    assert not {program for program in LISTED if program not in through_others and f'"{program}' not in text}


@pytest.mark.skipif(not shutil.which("dpkg-query"), reason="no Debian")
def test_what_is_listed_is_installed_and_has_the_programs_it_is_listed_for() -> None:
    wanted = list(packages.NEEDED)
    assert debian.missing(wanted) == []
    for name, package in packages.NEEDED.items():
        for program in package.programs:
            path = shutil.which(program, path=PATH)
            assert path is not None, program
            real = os.path.realpath(path)
            owner = subprocess.run(
                ["dpkg-query", "--search", real, real.removeprefix("/usr"), path.removeprefix("/usr")],
                capture_output=True,
                text=True,
            ).stdout
            assert name in owner or "wireshark-common" in owner, (
                f"{program} is in {owner.strip()!r}, not {name}"
            )


def test_programs_of_every_debian_are_here() -> None:
    missing = {each for each in packages.BASE if not shutil.which(each, path=PATH)}
    assert not missing


def test_kernel_settings_are_written_to_proc_and_not_by_a_program() -> None:
    pattern = re.compile(r"""["'`$#] ?sysctl\b(?! kernel| vm)""")
    shell = [*ROOT.rglob("tools/**/*.sh"), *ROOT.rglob("docs/*.md"), ROOT / "README.md", ROOT / "Makefile"]
    for path in [*sources(), *shell]:
        if path.name != "test_setup.py":
            assert not pattern.search(path.read_text()), path
