"""The language of the policy files: which system calls a kind of thread may make, with which arguments, and why.

    [name: other, other]                            a section, and those whose lines it has too
    call  arg1 = NAME, arg2 & NAME = 0              # why
    call  arg2 & NAME = NAME -> EPERM               # it fails, in place of ending the process

Arguments are counted from 0 and compared in 32 bits, which is how the kernel sees a request, a flag or a family. A call
with several lines may be made if one of them fits. Names of numbers are those of the headers (`numbers.pyx`); `|` joins
them. A reason that begins with `rare:` is for what seldom happens: the test that looks for lines nobody needs says so,
and does not fail. It is used by the build and by tests, never by a microVM.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from crackle.errors import ConfigError
from crackle.seccomp.compiler import ALLOW, Condition, Rule, error_action

_SECTION = re.compile(r"\[(?P<name>[\w-]+)(?::\s*(?P<others>[\w-]+(?:,\s*[\w-]+)*))?\]\s*")
_LINE = re.compile(
    r"(?P<call>\w+)(?:\s+(?P<conditions>arg.*?))?(?:\s*->\s*(?P<error>E\w+))?\s*#\s*(?P<why>\S.*)"
)
_CONDITION = re.compile(r"arg(?P<index>[0-5])\s*(?:&\s*(?P<mask>[\w|]+)\s*)?=\s*(?P<value>[\w|]+)")

_ALL = 0xFFFFFFFF


class Line(NamedTuple):
    """A line of a policy file."""

    number: int
    call: str
    conditions: tuple[Condition, ...]
    error: str | None
    why: str

    @property
    def is_rare(self) -> bool:
        """Whether it is for what seldom happens."""
        return self.why.startswith("rare:")

    @property
    def rule(self) -> Rule:
        """As the compiler takes it."""
        action = ALLOW if self.error is None else error_action(getattr(errno, self.error))
        return Rule(self.call, self.conditions, action)


class Policy(NamedTuple):
    """The sections of a policy file, each with the lines of those that it names."""

    own: dict[str, list[Line]]
    others: dict[str, tuple[str, ...]]

    def lines(self, section: str) -> list[Line]:
        """What a section allows, each line once, in the file's order."""
        found = {line.number: line for line in self._walk(section)}
        return [found[number] for number in sorted(found)]

    def _walk(self, section: str) -> Iterator[Line]:
        yield from self.own[section]
        for other in self.others[section]:
            yield from self._walk(other)


def path() -> Path:
    """The policy file of this machine's architecture."""
    return Path(__file__).with_name(f"{os.uname().machine}.policy")


def parse(text: str, names: Mapping[str, int]) -> Policy:
    """A policy file's meaning. names: the numbers that it has names for. ConfigError with the line's number."""
    policy = Policy({}, {})
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        if (head := _SECTION.fullmatch(stripped)) is not None:
            section = head["name"]
            others = tuple(re.split(r",\s*", head["others"])) if head["others"] else ()
            if section in policy.own or (unknown := set(others) - set(policy.own)):
                raise ConfigError(
                    f"line {number}: [{section}] is there already, or names {unknown}, which is not"
                )
            policy.own[section], policy.others[section] = [], others
        elif section and (found := _LINE.fullmatch(stripped)) is not None:
            policy.own[section].append(
                Line(
                    number,
                    found["call"],
                    tuple(_conditions(number, found["conditions"] or "", names)),
                    found["error"],
                    found["why"],
                )
            )
        else:
            raise ConfigError(f"line {number} is neither a section nor a call with a reason: {stripped}")
    return policy


def _conditions(number: int, text: str, names: Mapping[str, int]) -> Iterator[Condition]:
    for part in filter(None, re.split(r",\s*", text)):
        found = _CONDITION.fullmatch(part.strip())
        if found is None:
            raise ConfigError(f"line {number}: this is no condition: {part}")
        try:
            mask = _number(found["mask"], names) if found["mask"] else _ALL
            yield Condition(int(found["index"]), mask, _number(found["value"], names))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"line {number}: {error} is no number that is known here") from None


def _number(text: str, names: Mapping[str, int]) -> int:
    value = 0
    for part in text.split("|"):
        value |= int(part, 0) if part[:1].isdigit() else names[part] & _ALL
    return value
