"""What a configuration has open on the host from the request that names it: kernel and initrd, and the files of drives.

What was checked is what is used: a path that is replaced or removed afterwards does not matter. A drive's file is
locked too, against other microVMs: many may read it, or one may write to it. The drives of one microVM may share a
file, whose lock is then theirs together.
"""

from __future__ import annotations

import contextlib
import os

import msgspec

from crackle.errors import ConfigError, os_reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from crackle.schema import CpuConfig, Drive
    from crackle.virtio.block.backing import Backing

# How it begins what is wrong with a file: a drive's, and one that the guest is to have in its address space.
DRIVE = "Virtio backend error: Error manipulating the backing file"
MAPPING = "Error accessing backing file"

_IN_USE = (
    "{problem}: Resource temporarily unavailable (os error 11) {path}: "
    "another microVM {does}. Stop that one, let both have it read-only, or switch the lock off for a file that several "
    'may write: "lock": false in the drive, or --no-drive-locks.'
)


class BootFile:
    """An open kernel or initrd, which it owns until `close`. ConfigError, which begins with `problem`, without one."""

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ConfigError(f"{problem}{os_reason(error)}: {path}") from None
        except ValueError as error:
            raise ConfigError(f"{problem}{os_reason(error)}: {path!r}") from None

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def read_template(path: str) -> CpuConfig:
    """The CPU template that a file holds. ConfigError when it cannot be read, or is none."""
    from crackle.schema.codec import decode, explain
    from crackle.schema.cpu import CpuConfig

    try:
        with open(path, "rb", buffering=0) as file:
            text = file.readall()
    except (OSError, ValueError) as error:
        raise ConfigError(f"The CPU template cannot be read: {os_reason(error)}: {path}") from None
    try:
        return decode(text, CpuConfig)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no CPU template: {explain(error, CpuConfig, text)}") from None


def open_disk(
    path: str,
    read_only: bool,
    locking: bool,
    mine: Iterable[Backing],
    leaving: Sequence[Backing] = (),
    problem: str = DRIVE,
) -> Backing:
    """A drive's file, open and, if `locking`, locked. `mine` is what this microVM's drives have open.

    leaving: what of it the new one is to take the place of; it is the caller's to close, and then to `settle` the
    others. ConfigError, beginning with `problem`, when the file cannot be a drive, or another microVM has it; nothing
    has changed then.
    """
    from crackle.virtio.block.backing import open_backing

    backing = open_backing(path, read_only, problem)
    backing.locking = locking and backing.lockable
    others = [
        other for other in mine if other.locking and other.file == backing.file and other not in leaving
    ]
    before = [*others, *(part for part in leaving if part.locking and part.file == backing.file)]
    if not backing.locking:
        return backing
    for other in before:
        if other.read_only is read_only:
            # One open file description: its lock is never let go in between.
            backing.close()
            return other.duplicate(alone=True)
    for other in before:
        other.unlock()
    if settle([*others, backing]):
        return backing
    settle(before)
    backing.close()
    does = "uses it" if not read_only else "writes to it"
    raise ConfigError(_IN_USE.format(problem=problem, path=path, does=does))


def open_overlaid(
    drive: Drive,
    mine: Sequence[Backing],
    leaving: Sequence[Backing] = (),
    *,
    locking: bool = False,
    durable: bool = True,
) -> Backing:
    """As `open_disk`, for a drive with an overlay: its file is only read, and has the layers that the overlay says.

    durable: one that is made is on the disk from the beginning.
    """
    path, overlay, read_only = drive.path_on_host, drive.overlay, bool(drive.is_read_only)
    assert path is not None, "a drive with a file has a path"
    assert overlay is not msgspec.UNSET, "whoever calls has looked"
    from crackle.disk.chain import lay_over

    def open_layer(path: str, read_only: bool) -> Backing:
        with contextlib.suppress(OSError, ValueError):
            if os.path.samestat(os.stat(path), os.fstat(base.fd)):
                raise ConfigError(f"the overlay {path} is the file of the drive itself")
        layer = open_disk(path, read_only, locking, mine, leaving)
        if not read_only and any(other.file == layer.file and other not in leaving for other in mine):
            layer.close()
            raise ConfigError(
                f"another drive of this microVM has the overlay {path}: each needs one of its own"
            )
        return layer

    base = open_disk(path, True, locking, mine, leaving)
    try:
        lay_over(base, overlay, open_layer, read_only=read_only, durable=durable)
    except BaseException:
        base.close()
        settle(mine)
        raise
    return base


def settle(mine: Iterable[Backing]) -> bool:
    """Lock what the drives of one microVM have open as each file needs it: a writer keeps all other microVMs out.

    False when another microVM was faster.
    """
    files: dict[tuple[int, int], Backing] = {}
    for backing in mine:
        if backing.locking:
            holder = files.get(backing.file)
            if holder is None or (holder.read_only and not backing.read_only):
                files[backing.file] = backing
    # One of them holds the lock for all.
    locked = [backing.lock() for backing in files.values()]
    return all(locked)
