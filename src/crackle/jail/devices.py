"""The device files of a jail."""

from __future__ import annotations

import os
import stat

from crackle.errors import step
from crackle.jail.undo import Undo

# Documentation/admin-guide/devices.txt; that of userfaultfd is given out at run time.
_MISC = 10
_KVM, _TUN = (_MISC, 232), (_MISC, 200)
_URANDOM = (1, 9)


def make_devices(dev: int, net: int, uid: int, gid: int, undo: Undo) -> None:
    """Make what a monitor opens, in the folders /dev and /dev/net, which nobody else may write to. ConfigError."""

    def make(parent: int, path: str, number: tuple[int, int]) -> None:
        name = os.path.basename(path)
        with step(f"Failed to create {path} via mknod inside the jail"):
            os.mknod(name, stat.S_IFCHR | 0o600, os.makedev(*number), dir_fd=parent)
        undo.push(lambda: os.unlink(name, dir_fd=parent))
        with step(f"Failed to change owner for {path}"):
            os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)

    make(net, "/dev/net/tun", _TUN)
    make(dev, "/dev/kvm", _KVM)
    make(dev, "/dev/urandom", _URANDOM)
    minor = _userfault_minor()
    if minor is not None:
        make(dev, "/dev/userfaultfd", (_MISC, minor))


def _userfault_minor() -> int | None:
    """None where the host's kernel has no such device."""
    try:
        with open("/proc/misc", "rb", buffering=0) as file:
            lines = file.readall().splitlines()
    except OSError:
        return None
    for line in lines:
        minor, _, name = line.strip().partition(b" ")
        if name == b"userfaultfd":
            return int(minor)
    return None
