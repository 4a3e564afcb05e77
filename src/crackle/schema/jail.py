"""The jail of a microVM that a program has in a process of its own (``MicroVM(..., jail=Jail(...))``)."""

from __future__ import annotations

from typing import Annotated

import msgspec

from crackle.schema._base import U64

# The largest one means to the kernel: as it is.
Id = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFE)]


class Jail(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Who the microVM's process is, and what of the host it sees. To make one the program has to be root.

    uid, gid: numbers of a user and a group, which should be no other microVM's.
    paths: files and folders that it sees, at the paths that they have; kernel, initrd and drives are seen in any case.
    netns: file of the network namespace that it joins.
    cgroups: what files of its cgroup are to say, each "FILE=VALUE", in the hierarchies of `cgroup_version`, 1 or 2;
    its cgroup is `parent_cgroup`/<instance_id>. file_size: most bytes of a file that it writes. no_file: most
    descriptors that it has open. new_pid_ns: it is process 1 of a process namespace of its own, and its live forks,
    which are in it too, end with it.
    """

    uid: Id
    gid: Id
    paths: tuple[str, ...] = ()
    netns: str | None = None
    cgroups: tuple[str, ...] = ()
    cgroup_version: int = 1
    parent_cgroup: str = "crackle"
    file_size: U64 | None = None
    no_file: U64 = 2048
    new_pid_ns: bool = False
