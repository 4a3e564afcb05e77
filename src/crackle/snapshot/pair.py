"""The two files of a snapshot, which appear together or not at all.

Each pair has an id, which its state file holds. Memory is written to ``<memory path>.<id>`` and the state to
``<state path>.<id>``; both are on the disk before the state file gets its name, which is the moment the new pair
counts. Then the memory file gets its own. Whoever loads a state prefers the memory file with its id, so that the state
file finds its memory before and after that moment and in between; the memory that an older state file needs keeps a
second name until then. A crash leaves files with an id at most, which the next snapshot to the same place takes away
before it makes its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from binascii import crc32

from crackle.errors import ConfigError, context, step
from crackle.memory.dump import copy_data
from crackle.snapshot import statefile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from crackle.snapshot.state import MemoryFile, Snapshot

PAGE_SIZE = 4096
_ID_DIGITS = 32
_HEX = frozenset("0123456789abcdef")

# How often a pair is looked for that is being replaced meanwhile.
_ATTEMPTS = 3


class Pair:
    """A pair being written, its memory file of `size` bytes, all of them holes yet, open as `memory_fd`.

    before: the id of the pair that is there now, None for none. `commit` gives both their names. Leaving the block
    without it takes everything away again.
    """

    def __init__(self, state_path: str, memory_path: str, size: int) -> None:
        self.id = os.urandom(_ID_DIGITS // 2).hex()
        self._state_path = _target(state_path, "snapshot")
        self._memory_path = _target(memory_path, "memory")
        if self._state_path == self._memory_path:
            raise ConfigError(f"snapshot_path and mem_file_path are the same file: {state_path}")
        self._temporary: dict[str, int] = {}
        self._undo: Callable[[], None] | None = None
        self.before = _id_in(self._state_path)
        self._sweep(self.before)
        try:
            self.memory_fd = self._create(self._memory_path, "memory")
            with step("Cannot perform set_length on the memory backing file", memory_path):
                os.ftruncate(self.memory_fd, size)
        except BaseException:
            self.close()
            raise

    def begin_with_old_memory(self) -> None:
        """Give the new memory file the contents of the one that it takes the place of, if that is as large. OSError."""
        size = os.fstat(self.memory_fd).st_size
        try:
            fd = os.open(self._memory_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            if os.fstat(fd).st_size == size:
                copy_data(fd, self.memory_fd, size)
        finally:
            os.close(fd)

    def commit(self, state: bytes) -> None:
        """Put the pair in place, the state file with this content. ConfigError, and everything is as it was."""
        with step("Cannot perform sync_all on the memory backing file", self._memory_path):
            os.fsync(self.memory_fd)
        fd = self._create(self._state_path, "snapshot")
        with step("Cannot perform write on the snapshot backing file", self._state_path):
            rest = memoryview(state)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
            _sync_directory(self._memory_path)
        before = _id_in(self._state_path)
        if before is not None:
            self._keep(before)
        with step("Cannot perform rename on the snapshot backing file", self._state_path):
            os.rename(f"{self._state_path}.{self.id}", self._state_path)
        self._undo = None
        os.close(self._temporary.pop(f"{self._state_path}.{self.id}"))
        # From here on the new pair counts, and what goes wrong leaves a file too many at most.
        with contextlib.suppress(OSError):
            os.rename(f"{self._memory_path}.{self.id}", self._memory_path)
        os.close(self._temporary.pop(f"{self._memory_path}.{self.id}"))
        self.memory_fd = -1
        self._sweep(self.id)

    def _sweep(self, current: str | None) -> None:
        """Take away what others have left, but the memory of the state file that counts."""
        with contextlib.suppress(OSError):
            sweep(self._memory_path, current)
            sweep(self._state_path, current)

    def _keep(self, before: str) -> None:
        """Let the state file that is there now find its memory when the memory file is another's."""
        old = f"{self._memory_path}.{before}"
        try:
            os.link(self._memory_path, old)
        except FileNotFoundError:
            return  # its memory is elsewhere
        except FileExistsError:
            return  # a crash has left it with that name, and no other
        except OSError:
            # A file system without second names: it has the one it is looked for by first.
            with step("Cannot perform rename on the memory backing file", self._memory_path):
                os.rename(self._memory_path, old)
            self._undo = lambda: os.rename(old, self._memory_path)
        else:
            self._undo = lambda: os.unlink(old)

    def _create(self, path: str, what: str) -> int:
        name = f"{path}.{self.id}"
        with step(f"Cannot perform open on the {what} backing file", path):
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._temporary[name] = fd
            # For as long as it is open nobody takes it for a leftover.
            fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            before = os.stat(path)
            os.fchmod(fd, stat.S_IMODE(before.st_mode))
            os.fchown(fd, before.st_uid, before.st_gid)
        return fd

    def close(self) -> None:
        """Take away what has not been put in place. Idempotent."""
        undo, self._undo = self._undo, None
        if undo is not None:
            with contextlib.suppress(OSError):
                undo()
        while self._temporary:
            name, fd = self._temporary.popitem()
            with contextlib.suppress(OSError):
                os.unlink(name)
            os.close(fd)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _target(path: str, what: str) -> str:
    """The file that `path` leads to, through symbolic links. ConfigError where no file can be put."""
    with step(f"Cannot perform open on the {what} backing file", path):
        target = os.path.realpath(path)
        try:
            mode = os.stat(target).st_mode
        except FileNotFoundError:
            return target
        _check_regular(mode)
        return target


def _check_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(21, "Is a directory")
    if not stat.S_ISREG(mode):
        raise OSError(22, "It is no regular file")


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(path: str, current: str | None) -> None:
    """Remove what snapshots to this place have left that did not come to their end; not the file with this id."""
    directory, name = os.path.split(path)
    for leftover in os.listdir(directory):
        stem, dot, suffix = leftover.rpartition(".")
        if not dot or stem != name or suffix == current or len(suffix) != _ID_DIGITS or set(suffix) - _HEX:
            continue
        other = os.path.join(directory, leftover)
        with contextlib.suppress(OSError):
            fd = os.open(other, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(other)
            finally:
                os.close(fd)


def _id_in(path: str) -> str | None:
    """The id of the state file that is there, if one is."""
    try:
        return statefile.id_of(read_state(path))
    except ConfigError:
        return None


# -- finding them again --------------------------------------------------------------------------------------------


def read_state(path: str) -> bytes:
    """A state file's content. ConfigError when it cannot be had."""
    with step("Failed to open snapshot file", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check_regular(os.fstat(fd).st_mode)
            begin = os.pread(fd, statefile.HEADER_SIZE, 0)
            if not begin.startswith(statefile.MAGIC):
                # Another file may be of any size.
                return begin
            with open(fd, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(fd)


def find(state_path: str, memory_path: str) -> tuple[Snapshot, int]:
    """The snapshot in a state file, and the memory file that belongs to it, open.

    ConfigError when there is no such pair.
    """
    snapshot = read(state_path)
    for _ in range(_ATTEMPTS):
        try:
            return snapshot, open_memory(memory_path, snapshot)
        except ConfigError:
            # Another pair may have been put in its place just now.
            again = read(state_path)
            if again.id == snapshot.id:
                raise
            snapshot = again
    raise ConfigError(f"Failed to load snapshot state from file: it is replaced all the time: {state_path}")


def read(path: str) -> Snapshot:
    """The snapshot in a state file. ConfigError when there is none."""
    with context("Failed to get snapshot state from file"):
        data = read_state(path)
        with context("Failed to load snapshot state from file", f": {path}"):
            return statefile.decode(data)


def open_memory(path: str, snapshot: Snapshot) -> int:
    """The memory file of a snapshot, checked as far as some dozen pages of it tell."""
    own = f"{path}.{snapshot.id}"
    with context("Failed to load guest memory"):
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(own, flags)
        except (OSError, ValueError):
            with step("Error creating guest memory from file", path):
                fd = os.open(path, flags)
        else:
            path = own
        try:
            _check_memory(fd, path, snapshot.memory)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _check_memory(fd: int, path: str, expected: MemoryFile) -> None:
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"the memory file is no regular file: {path}")
    if info.st_size != expected.size:
        raise ConfigError(
            f"the memory file has {info.st_size} bytes, and the snapshot's memory {expected.size}: {path}"
        )
    with step("the memory file cannot be read", path):
        checksum = 0
        for offset in expected.samples:
            checksum = crc32(os.pread(fd, PAGE_SIZE, offset), checksum)
    if checksum != expected.checksum:
        advice = (
            "name the two files that one snapshot wrote"
            if expected.whole
            else "the snapshot is a differential one: merge its memory file into that of its base first "
            "(crackle snapshot rebase)"
        )
        raise ConfigError(f"the memory file is not this snapshot's; {advice}: {path}")
