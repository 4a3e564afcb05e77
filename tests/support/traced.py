"""Which lines of the seccomp policy are made use of by what pytest does, as strace(1) sees it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from crackle.seccomp.policy import Line, Policy

# Raw numbers for all that is asked for, but for prctl, whose argument may be a name.
_STRACE = ("strace", "-f", "-qq", "-s", "16", "-e", "signal=none", "-e", "raw=!prctl", "-o")
_CALL = re.compile(r"(\d+) +(\w+)\((.*)")
_RESULT = re.compile(r"\) += (0x[0-9a-f]+)")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (?:clone|clone3|fork|vfork) resumed>.* = (0x[0-9a-f]+)")
_SET_FILTER = 1  # <linux/seccomp.h>, SECCOMP_SET_MODE_FILTER

# Threads are named for their kinds, but for those of vCPUs and the main thread.
_KINDS = {
    "fc_vcpu": "vcpu",
    "io": "io",
    "mmds": "mmds",
    "shell": "shell",
    "faults": "faults",
    "reaper": "reaper",
}


class Made(NamedTuple):
    """A call that a thread of this kind made under its filter."""

    kind: str
    call: str
    arguments: tuple[int, ...]


def trace(tests: Sequence[str], output: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run those tests with all their processes traced; they have to pass."""
    command = [
        *_STRACE,
        str(output),
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(environment or {})}, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def calls(output: Path, names: Mapping[str, int]) -> Iterator[Made]:
    """Those of threads that have a filter, from then on."""
    kinds: dict[str, str] = {}
    filtered: set[str] = set()
    with output.open(errors="replace") as lines:
        for line in lines:
            born = _RESUMED.match(line)
            if born is not None:
                _inherit(born[1], str(int(born[2], 16)), kinds, filtered)
                continue
            found = _CALL.match(line)
            if found is None:
                continue
            thread, call, rest = found.groups()
            if call in ("clone", "clone3", "fork", "vfork") and (result := _RESULT.search(rest)) is not None:
                _inherit(thread, str(int(result[1], 16)), kinds, filtered)
            arguments = tuple(_numbers(rest, names))
            if call == "prctl" and rest.startswith("PR_SET_NAME"):
                name = rest.split('"')[1].split(" ")[0]
                kinds[thread] = _KINDS.get(name, "main")
            if thread in filtered:
                yield Made(kinds.get(thread, "main"), call, arguments)
            if call == "seccomp" and arguments[:1] == (_SET_FILTER,):
                filtered.add(thread)


def _inherit(parent: str, child: str, kinds: dict[str, str], filtered: set[str]) -> None:
    # The child may have been seen before its maker was told of it.
    kinds.setdefault(child, "main")
    if parent in filtered:
        filtered.add(child)


def _numbers(text: str, names: Mapping[str, int]) -> Iterator[int]:
    for part in re.split(r", ", text.partition(")")[0].partition(" <unfinished")[0])[:6]:
        word = part.strip()
        if word in names:
            yield names[word]
        else:
            try:
                yield int(word, 0)
            except ValueError:
                yield 0


def unneeded(policy: Policy, made: Iterator[Made]) -> list[tuple[str, Line]]:
    """The lines, each with its section, that no thread of the section's own kind has made use of."""
    left = {(section, line.number): line for section, lines in policy.own.items() for line in lines}
    # What a section has from others is theirs: only its own threads show that it needs its own lines.
    own = {
        kind: [(section, line) for section in sections for line in policy.own[section]]
        for kind, sections in _SECTIONS.items()
    }
    seen: set[tuple[str, str, tuple[int, ...]]] = set()
    for kind, call, arguments in made:
        checked = arguments[:3]
        if (kind, call, checked) in seen:
            continue
        seen.add((kind, call, checked))
        for section, line in own[kind]:
            if line.call == call and all(
                len(arguments) > index and arguments[index] & mask == value
                for index, mask, value, _ in line.conditions
            ):
                left.pop((section, line.number), None)
    return [(section, line) for (section, _), line in left.items()]


_SECTIONS = {
    "main": ("every", "python", "birth", "state", "main"),
    "vcpu": ("every", "python", "birth", "vcpu"),
    "io": ("every", "birth", "io"),
    **{kind: ("every", "python", "birth", kind) for kind in ("mmds", "shell", "faults", "reaper")},
}
