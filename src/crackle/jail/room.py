"""A jail without a folder on the host: its root is a small file system in memory, with devices and some of its files.

For microVMs of a program, which names files by the paths that they have: each is seen at the same one. Nothing of it
outlives the process.
"""

from __future__ import annotations

import os
import stat
import time

from crackle.errors import ConfigError, step
from crackle.jail.cgroups import check_parent, plan
from crackle.jail.devices import make_devices
from crackle.jail.namespaces import enter_root, join_network, leave_mounts
from crackle.jail.privileges import drop, open_proc, set_limits
from crackle.jail.undo import Undo
from crackle.runtime.system import attach_tree, clone_tree, load_unwinder, make_tmpfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from crackle.schema.jail import Jail

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# It holds names only, and nobody but root may write to it.
_OPTIONS = {b"mode": b"0755", b"size": b"256k", b"nr_inodes": b"4096"}
_ITS_OWN = ("/", "/dev", "/dev/net", "/dev/kvm", "/dev/net/tun", "/dev/urandom", "/dev/userfaultfd")


def enter(jail: Jail, name: str, directory: str) -> None:
    """Be in the jail of the microVM `name`, with an empty folder as working directory unless it sees that one.

    For a process with everything imported, and no threads. Raises ConfigError, with nothing left behind.
    """
    check_parent(jail.parent_cgroup)
    cgroups = plan(str(jail.cgroup_version), jail.cgroups, jail.parent_cgroup, name)
    undo = Undo()
    try:
        load_unwinder()
        leave_mounts()
        root = _furnish(jail, directory, undo)
        if jail.netns is not None:
            join_network(jail.netns)
        if cgroups is not None:
            cgroups.join(undo)
        proc = open_proc(undo)
        enter_root(root)
        with step(f"Failed to change current directory to {directory}"):
            os.chdir(directory)
        time.tzset()
        set_limits(jail.file_size, jail.no_file)
        drop(jail.uid, jail.gid, proc)
    except BaseException:
        undo.run()
        raise
    undo.close()


def _furnish(jail: Jail, directory: str, undo: Undo) -> int:
    with step("Failed to make the jail's root"):
        made = undo.hold(make_tmpfs(_OPTIONS))
        # Above the present one, where nobody looks.
        attach_tree(made, undo.hold(os.open("/", _FOLDER)))
        root = undo.hold(os.open(".", _FOLDER, dir_fd=made))
    # The outer ones first: they hide what is in them.
    for path in sorted({os.path.abspath(path) for path in jail.paths}):
        if path in _ITS_OWN:
            raise ConfigError(f"{path} cannot be shown in a jail, which has its own")
        _show(root, path, undo)
    with step(f"Failed to create directory {directory}"):
        _descend(root, directory, undo)
        dev = _descend(root, "/dev", undo)
        net = _descend(dev, "net", undo)
    make_devices(dev, net, jail.uid, jail.gid, undo)
    return root


def _show(root: int, path: str, undo: Undo) -> None:
    """Have it there as it is here, with what is mounted in it."""
    with step(f"Failed to show {path} in the jail"):
        source = undo.hold(os.open(path, os.O_PATH | os.O_CLOEXEC))
        above, name = os.path.split(path)
        parent = _descend(root, above, undo)
        if stat.S_ISDIR(os.fstat(source).st_mode):
            target = _descend(parent, name, undo)
        else:
            if name not in os.listdir(parent):
                os.mknod(name, stat.S_IFREG | 0o600, dir_fd=parent)
            target = undo.hold(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent))
            if os.path.samestat(os.fstat(target), os.fstat(source)):
                return  # the folder that it is in is seen
        attach_tree(undo.hold(clone_tree(source)), target)


def _descend(folder: int, path: str, undo: Undo) -> int:
    """The folder at `path` in `folder`, made as far as it is not there."""
    for name in _names(path):
        if name not in os.listdir(folder):
            os.mkdir(name, 0o755, dir_fd=folder)
        folder = undo.hold(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder))
    return folder


def _names(path: str) -> Iterable[str]:
    return filter(None, path.split("/"))
