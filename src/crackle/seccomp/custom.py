"""Policies of users: Firecracker's JSON, as its docs/seccompiler.md describes it, compiled when the process starts.

Its threads are not ours. `vmm` and `api` together are our main thread, and what else runs Python; `vmm` alone is the
threads of devices, `vcpu` that of a vCPU. The two of the main thread are one list if they say the same of what is on
it and of what is not; else it has both filters, and a call has to pass each.
"""

from __future__ import annotations

import msgspec

from crackle.errors import ConfigError, os_reason
from crackle.seccomp.compiler import (
    ALLOW,
    COMPARISONS,
    KILL_PROCESS,
    KILL_THREAD,
    LOG,
    TRAP,
    Condition,
    Rule,
    compile_filter,
    error_action,
    trace_action,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from crackle.seccomp import Filters

_CATEGORIES = ("vmm", "api", "vcpu")

# By kind of thread. Those that make a virtual machine ahead of time are no concern of such a policy, which is for the
# time from the start of the guest on.
_SERVED_BY = {
    "main": ("vmm", "api"),
    "vcpu": ("vcpu",),
    "io": ("vmm",),
    "mmds": ("vmm",),
    "faults": ("vmm", "api"),
    "reaper": ("vmm", "api"),
}

_ACTIONS = {
    "allow": ALLOW,
    "kill_process": KILL_PROCESS,
    "kill_thread": KILL_THREAD,
    "log": LOG,
    "trap": TRAP,
}
_NUMBERED = {"errno": error_action, "trace": trace_action}

# What a register's lower half is compared in.
_DWORD = 0xFFFFFFFF


class _Condition(msgspec.Struct):
    index: int
    type: str
    op: str | dict[str, int]
    val: int


class _Rule(msgspec.Struct):
    syscall: str
    args: list[_Condition] | None = None


class _Filter(msgspec.Struct):
    default_action: str | dict[str, int]
    filter_action: str | dict[str, int]
    filter: list[_Rule]


def read_filters(path: str) -> Filters:
    """The programs by kind of thread. ConfigError when the file cannot be read, or means nothing."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.readall()
    except (OSError, ValueError) as error:
        raise ConfigError(f"Filter file open error: {os_reason(error)}: {path}") from None
    if not data.lstrip().startswith(b"{"):
        raise ConfigError(
            f"Filter deserialization failed: {path} is no JSON. A policy is given as seccompiler-bin's input; what "
            "that compiles it to cannot be read here."
        )
    try:
        return compile_filters(msgspec.json.decode(data, type=dict[str, _Filter]))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"Filter deserialization failed: {error}: {path}") from None


def compile_filters(given: dict[str, _Filter]) -> Filters:
    """By kind of thread. ConfigError."""
    unknown = [name for name in given if name.lower() not in _CATEGORIES]
    if unknown:
        raise ConfigError(f"Invalid thread categories: {','.join(unknown)}")
    filters = {name.lower(): value for name, value in given.items()}
    for name in _CATEGORIES:
        if name not in filters:
            raise ConfigError(f"Missing thread category: {name}")
    compiled: dict[tuple[str, ...], tuple[bytes, ...]] = {}
    for names in set(_SERVED_BY.values()):
        lists = [filters[name] for name in names]
        if len({msgspec.json.encode((one.default_action, one.filter_action)) for one in lists}) == 1:
            lists = [
                _Filter(
                    lists[0].default_action,
                    lists[0].filter_action,
                    [rule for one in lists for rule in one.filter],
                )
            ]
        compiled[names] = tuple(_compile(one) for one in lists)
    return {kind: compiled[names] for kind, names in _SERVED_BY.items()}


def _compile(given: _Filter) -> bytes:
    action = _action(given.filter_action)
    return compile_filter(
        _action(given.default_action),
        (Rule(rule.syscall, tuple(map(_condition, rule.args or ())), action) for rule in given.filter),
    )


def _action(given: str | dict[str, int]) -> int:
    if isinstance(given, str) and given in _ACTIONS:
        return _ACTIONS[given]
    if isinstance(given, dict) and len(given) == 1:
        ((name, number),) = given.items()
        if name in _NUMBERED and 0 <= number <= 0xFFFF:
            return _NUMBERED[name](number)
    raise ConfigError(f"Filter deserialization failed: {given!r} is no action")


def _condition(given: _Condition) -> Condition:
    operation: Any = given.op
    if not 0 <= given.val < 1 << 64:
        raise ConfigError(f"Filter deserialization failed: {given.val} has more than 64 bits, or a sign")
    if isinstance(operation, dict) and list(operation) == ["masked_eq"]:
        return Condition(given.index, operation["masked_eq"], given.val)
    if operation not in COMPARISONS or operation == "masked_eq" or given.type not in ("dword", "qword"):
        raise ConfigError(
            f"Filter deserialization failed: {operation!r} is no comparison, or {given.type!r} no size"
        )
    if operation == "eq" and given.type == "dword":
        return Condition(given.index, _DWORD, given.val)
    return Condition(given.index, 0, given.val, operation)
