"""Archives in the "newc" format of cpio, which is what Linux unpacks as an initial RAM file system.

Documentation/driver-api/early-userspace/buffer-format.rst of Linux. Deterministic: no times, no owners, order
as given.
"""

from __future__ import annotations

import stat


class Archive:
    """An archive in the making. Paths have no leading slash; missing parent directories are added."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0
        self._directories: set[str] = set()

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory."""
        if path and path not in self._directories:
            self._parents(path)
            self._directories.add(path)
            self._entry(path, stat.S_IFDIR | mode, b"")

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._parents(path)
        self._entry(path, stat.S_IFREG | mode, content)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._parents(path)
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node."""
        self._parents(path)
        self._entry(path, stat.S_IFCHR | mode, b"", major, minor)

    def finish(self) -> bytes:
        """The archive, padded to a multiple of 512 bytes so that another may follow it."""
        data = self._data + _record(0, 0, "TRAILER!!!", b"", 0, 0)
        return bytes(data + bytes(-len(data) % 512))

    def _parents(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        if parent:
            self.directory(parent)

    def _entry(self, path: str, mode: int, content: bytes, major: int = 0, minor: int = 0) -> None:
        self._inode += 1
        self._data += _record(self._inode, mode, path, content, major, minor)


def _record(inode: int, mode: int, path: str, content: bytes, major: int, minor: int) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, major, minor, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
