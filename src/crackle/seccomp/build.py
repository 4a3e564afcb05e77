"""`python -m crackle.seccomp.build`: compiles the policy of this architecture, which the build of the package does.

With what Python has: a build has none of the libraries that the package wants.
"""

from __future__ import annotations

import base64
import errno
import json
from pathlib import Path

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
    compiled = {
        section: {kind: [base64.b64encode(code).decode() for code in codes] for kind, codes in kinds.items()}
        for section, kinds in compile_policy().items()
    }
    # Whole or not at all: a microVM may be starting.
    path = Path(compiled_path())
    new = path.with_suffix(".new")
    new.write_text(json.dumps(compiled, indent=1) + "\n")
    new.replace(path)
