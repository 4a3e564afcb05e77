"""Which system calls each kind of thread may make: the policy, its compiler, and what a process finds compiled.

`x86_64.policy` is the list, which `policy.py` reads and `compiler.pyx` makes programs of (seccomp(2)) with libseccomp.
The build does that once and leaves `x86_64.bpf` beside it, so that a microVM reads a file, and neither library nor
compiler. `custom.py` reads the policies of users. `runtime/filters.pyx` puts programs on threads.
"""

from __future__ import annotations

import os

from crackle.errors import ConfigError, os_reason
from crackle.runtime.filters import possible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    # Programs by kind of thread; each of them has to allow a call.
    Filters = Mapping[str, tuple[bytes, ...]]

# The sections of the compiled file: a forbidden call ends the process, and it fails (EPERM) in a program of others'.
ENDS, FAILS = "ends", "fails"

_found: dict[str, Filters] = {}


def compiled_path() -> str:
    """Where the build leaves the compiled policy of this machine's architecture."""
    return os.path.join(os.path.dirname(__file__), f"{os.uname().machine}.bpf")


def default_filters(section: str = ENDS) -> Filters:
    """The policy's programs by kind of thread. ConfigError when the build has left none where it should have."""
    if not possible():
        return {}
    if section not in _found:
        from msgspec import MsgspecError, json

        path = compiled_path()
        try:
            with open(path, "rb", buffering=0) as file:
                _found.update(json.decode(file.read(), type=dict[str, dict[str, tuple[bytes, ...]]]))
        except OSError as error:
            raise ConfigError(
                f"cannot read the compiled seccomp policy: {os_reason(error)}: {path}; "
                "build the package again, or do without (--no-seccomp)"
            ) from None
        except MsgspecError as error:
            raise ConfigError(f"{path} is no compiled seccomp policy: {error}") from None
    return _found[section]
