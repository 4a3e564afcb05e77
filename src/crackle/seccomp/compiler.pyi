from collections.abc import Iterable
from typing import NamedTuple

ALLOW: int
LOG: int
TRAP: int
KILL_THREAD: int
KILL_PROCESS: int

def error_action(number: int) -> int: ...
def trace_action(number: int) -> int: ...

class Condition(NamedTuple):
    argument: int
    mask: int
    value: int
    comparison: str = "masked_eq"

class Rule(NamedTuple):
    call: str
    conditions: tuple[Condition, ...]
    action: int

COMPARISONS: dict[str, int]

def number_of(call: str) -> int: ...
def name_of(number: int) -> str | None: ...
def compile_filter(default: int, rules: Iterable[Rule]) -> bytes: ...
