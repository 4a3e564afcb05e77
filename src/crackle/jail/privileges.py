"""What a process may: resource limits, and then no privileges at all (capabilities(7), credentials(7), prctl(2))."""

from __future__ import annotations

import os

from crackle.errors import step
from crackle.runtime.mappings import keep_open
from crackle.runtime.system import (
    CAP_SETGID,
    CAP_SETUID,
    drop_capabilities,
    empty_bounding_set,
    forbid_dumps,
    set_no_new_privs,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.jail.undo import Undo


def set_limits(file_size: int | None, no_file: int) -> None:
    """Soft and hard ones. file_size: bytes, None for as it is. Raises ConfigError."""
    import resource

    for number, limit, what in (
        (resource.RLIMIT_FSIZE, file_size, "size of file"),
        (resource.RLIMIT_NOFILE, no_file, "number of file descriptors"),
    ):
        if limit is not None:
            with step(f"Failed to set limit for resource: {what}"):
                resource.setrlimit(number, (limit, limit))


def open_proc(undo: Undo) -> int:
    """A descriptor of /proc while it can be had, for `drop`; -1 where there is none."""
    try:
        return undo.hold(os.open("/proc", os.O_PATH | os.O_CLOEXEC))
    except OSError:
        return -1


def drop(uid: int, gid: int, proc: int) -> None:
    """Be that user, in that group and no other, without capabilities and any way to get one. Raises ConfigError.

    proc: of `open_proc`; what the process may know of itself afterwards is opened in it.
    """
    with step("Failed to drop privileges"):
        empty_bounding_set()
        # Administrators are shown more there, and a process that was another user's may not open it.
        drop_capabilities([CAP_SETGID, CAP_SETUID])
        keep_open(proc)
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        drop_capabilities()
        set_no_new_privs()
        forbid_dumps()
