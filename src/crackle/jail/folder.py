"""The folder that becomes the root: BASE/NAME OF THE EXECUTABLE/ID/root, with the devices that a monitor opens.

Every folder is held by a descriptor and what is in it reached from there, links never followed: whoever else may
write to one of them cannot have anything made or changed elsewhere. While devices are made the folders are root's, so
that the jail's user cannot exchange one.
"""

from __future__ import annotations

import os
import stat

from crackle.errors import ConfigError, step
from crackle.jail.devices import make_devices
from crackle.jail.undo import Undo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.jail.options import Wanted

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Folder:
    """Makes what is missing, and owns descriptors of all of it until the `Undo` is closed. Raises ConfigError."""

    def __init__(self, jail: Wanted, undo: Undo) -> None:
        self._jail = jail
        self._undo = undo
        self._pid = -1
        # Of the folders that are the jail's user's in the end, the innermost last.
        self._own: list[tuple[int, str]] = []
        with step(f"Failed to open directory {jail.base}"):
            base = undo.hold(os.open(jail.base, _FLAGS))
            self._owners = {os.geteuid(), jail.uid, os.fstat(base).st_uid}
        path = jail.base
        for name in (jail.exec_name, jail.id, "root"):
            path = f"{path}/{name}"
            base = self._descend(base, name, path)
        self.root = base
        self._path = path
        self._take(base, path)

    def furnish(self) -> None:
        """Make the devices and the place of the API's socket."""
        dev = self._descend(self.root, "dev", "/dev")
        self._take(dev, "/dev")
        net = self._descend(dev, "net", "/dev/net")
        self._take(net, "/dev/net")
        run = self._descend(self.root, "run", "/run")
        self._take(run, "/run")
        make_devices(dev, net, self._jail.uid, self._jail.gid, self._undo)

    def make_pid_file(self) -> None:
        """Without a number yet."""
        name = f"{self._jail.exec_name}.pid"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with step(f"Failed to open file /{name}"):
            self._pid = self._undo.hold(os.open(name, flags, 0o666, dir_fd=self.root))
        self._undo.push(lambda: os.unlink(name, dir_fd=self.root))

    def write_pid(self, pid: int) -> None:
        """Which process it is, as seen from where the jailer was started."""
        with step(f"Failed to write to /{self._jail.exec_name}.pid"):
            os.write(self._pid, str(pid).encode())

    def hand_over(self) -> None:
        """Make it all the jail's user's."""
        for fd, path in reversed(self._own):
            with step(f"Failed to change owner for {path}"):
                os.fchown(fd, self._jail.uid, self._jail.gid)

    def _descend(self, parent: int, name: str, path: str) -> int:
        """The folder `name` in `parent`, made if it is not there."""
        with step(f"Failed to create directory {path}"):
            try:
                os.mkdir(name, dir_fd=parent)
            except FileExistsError:
                pass
            else:
                self._undo.push(lambda: os.rmdir(name, dir_fd=parent))
            try:
                fd = self._undo.hold(os.open(name, _FLAGS, dir_fd=parent))
            except NotADirectoryError:
                raise ConfigError(
                    f"Failed to create directory {path}: something is there that is no directory, or a symbolic link"
                ) from None
            owner = os.fstat(fd).st_uid
        if owner not in self._owners:
            raise ConfigError(f"Failed to create directory {path}: it is there, and user {owner}'s")
        return fd

    def _take(self, fd: int, path: str) -> None:
        """Have a folder to oneself until `hand_over`."""
        before = os.fstat(fd)

        def give_back() -> None:
            os.fchown(fd, before.st_uid, before.st_gid)
            os.fchmod(fd, stat.S_IMODE(before.st_mode))

        self._undo.push(give_back)
        with step(f"Failed to change owner for {path}"):
            os.fchown(fd, os.geteuid(), os.getegid())
        with step(f"Failed to change permissions on {path}"):
            os.fchmod(fd, 0o700)
        self._own.append((fd, path))
