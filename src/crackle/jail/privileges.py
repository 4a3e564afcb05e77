"""What a process may: resource limits, and then no privileges at all (capabilities(7), credentials(7), prctl(2))."""

from __future__ import annotations

import os

from crackle.errors import step
from crackle.runtime.system import drop_capabilities, empty_bounding_set, forbid_dumps, set_no_new_privs


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


def drop(uid: int, gid: int) -> None:
    """Be that user, in that group and no other, without capabilities and any way to get one. Raises ConfigError."""
    with step("Failed to drop privileges"):
        empty_bounding_set()
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        drop_capabilities()
        set_no_new_privs()
        forbid_dumps()
