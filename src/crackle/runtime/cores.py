"""Core scheduling: two threads of one core never run two microVMs at a time (prctl(2), PR_SCHED_CORE; Linux 5.14)."""

from __future__ import annotations

import errno

from crackle.errors import ConfigError, os_reason
from crackle.runtime.system import separate_cores

_SMT = "/sys/devices/system/cpu/smt/active"

# As it was found once: a child of this process may be in a jail, where it cannot be looked up.
_shared: bool | None = None


def share_no_core() -> None:
    """For this process, and all threads that it has and will have. Nothing is to be done where cores have one thread.

    ConfigError where the kernel cannot do it.
    """
    try:
        separate_cores()
    except OSError as error:
        # ENODEV says the same, of a kernel that could.
        if _threads_share_cores() and error.errno != errno.ENODEV:
            raise ConfigError(
                f"Cannot keep others from the microVM's cores: {os_reason(error)}. "
                "That needs Linux 5.14 with CONFIG_SCHED_CORE."
            ) from None


def _threads_share_cores() -> bool:
    global _shared
    if _shared is None:
        try:
            with open(_SMT, "rb", buffering=0) as file:
                _shared = file.readall().strip() == b"1"
        except OSError:
            return True
    return _shared
