"""`python -m crackle.seccomp.build`: compiles the policy of this architecture, which the build of the package does."""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec

from crackle.seccomp import ENDS, FAILS, compiled_path, numbers, policy
from crackle.seccomp.compiler import TRAP, compile_filter, error_action

# The kinds of threads that have a filter: sections of the policy, and those of them that run in programs of others',
# where a forbidden call fails. There a vCPU's thread may have to do what a collection of garbage finds.
KINDS = {
    ENDS: {kind: kind for kind in ("main", "vcpu", "io", "mmds", "shell", "faults", "reaper")},
    FAILS: {"vcpu": "library-vcpu", "io": "io"},
}
DEFAULTS = {ENDS: TRAP, FAILS: error_action(errno.EPERM)}


def names() -> dict[str, int]:
    """The numbers that a policy has names for."""
    return {name: value for name, value in vars(numbers).items() if isinstance(value, int) and name.isupper()}


def read_policy() -> policy.Policy:
    """The policy file of this architecture."""
    return policy.parse(policy.path().read_text(), names())


def compile_policy() -> dict[str, dict[str, tuple[bytes, ...]]]:
    """The programs of all kinds of threads."""
    lists = read_policy()
    return {
        section: {
            kind: (compile_filter(DEFAULTS[section], [line.rule for line in lists.lines(name)]),)
            for kind, name in kinds.items()
        }
        for section, kinds in KINDS.items()
    }


if __name__ == "__main__":
    Path(compiled_path()).write_bytes(msgspec.msgpack.encode(compile_policy()))
