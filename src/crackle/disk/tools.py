"""What people and snapshots do with overlays that no microVM writes to: clone, show, commit, rebase.

Each takes the locks that a drive takes, so that none of it happens under a microVM, and whatever ends it in the
middle, the disk shows what it showed before.
"""

from __future__ import annotations

import contextlib
import errno
import os

import msgspec

from crackle.disk.chain import Layer, below, check_below, close, header_at, open_layers
from crackle.disk.overlay import (
    BLOCK,
    MAP_AT,
    SECTOR,
    Header,
    Under,
    check_base,
    identify,
    make,
    new_id,
    put_in_place,
    read_header,
    seen_from,
    sync_directory,
    write_header,
)
from crackle.errors import ConfigError, context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from crackle.virtio.block.backing import Backing
    from crackle.virtio.block.layers import Layers

# Bytes that are looked for, compared or copied at once.
_STEP = 1 << 20


def _open(path: str, read_only: bool) -> Backing:
    """A file that no microVM writes to, or that none uses if it is to be written to."""
    from crackle.virtio.block.backing import open_backing

    backing = open_backing(path, read_only)
    if backing.lockable and not backing.lock():
        backing.close()
        does = "writes to" if read_only else "uses"
        raise ConfigError(f"a microVM {does} {path}: stop it first")
    return backing


@contextlib.contextmanager
def _disk(
    path: str,
    *,
    writable: bool = False,
    base_writable: bool = False,
    committing: bool = False,
    check: bool = True,
) -> Iterator[Backing]:
    """The base of the overlay at `path`, open, with all the layers; ConfigError where they do not belong together."""
    layers = open_layers(path, _open, writable=writable, committing=committing)
    try:
        lowest = layers[-1]
        base = _open(below(lowest), not base_writable)
        try:
            base.layers = layers
            if check:
                check_base(base.fd, base.path, base.size // SECTOR * SECTOR, lowest.header, lowest.path)
            yield base
        finally:
            base.close()
    finally:
        close(layers)


def clone(path: str, new: str, *, durable: bool = False) -> None:
    """A new overlay at `new` that shows the disk which the overlay at `path` shows; each goes its own way from then on.

    By sharing the blocks of the file (FICLONE) where the file system can. Where it cannot, `new` is an empty layer
    over `path`, made in some dozen microseconds, and `path` must not be written to any more: whoever opens `new`
    then is told. (`make(new, over=path)` always does that.) Nobody writes to `path` meanwhile: a microVM that does
    is refused. durable: it is on the disk when this returns. ConfigError, and there is nothing new, when it cannot
    be done.
    """
    layers = open_layers(path, _open)
    try:
        if not _share(layers[0], new, durable=durable):
            make(new, over=path, durable=durable)
    finally:
        close(layers)


def _share(layer: Layer, new: str, *, durable: bool) -> bool:
    """Make a file that shares its blocks with that of `layer`; False where there is no such thing."""
    from crackle.virtio.block.backing import share_blocks

    header = header_at(layer, new)
    temporary = f"{new}.{new_id()}"
    with context(f"cannot make the overlay {new}"):
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if not share_blocks(layer.backing.fd, fd, header.map_end):
                return False
            write_header(fd, header, new)
            if durable:
                os.fsync(fd)
            put_in_place(temporary, new)
            if durable:
                sync_directory(new)
        finally:
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    return True


# -- for people ------------------------------------------------------------------------------------------------------


def describe(path: str) -> Iterator[tuple[str, str]]:
    """What the overlay at `path` holds, over what, and whether that is what it was: (name, value), line by line.

    ConfigError when it is no overlay.
    """
    from crackle.virtio.block.backing import open_backing

    layer = Layer(path, open_backing(path, True), _NO_HEADER)
    try:
        layer.header = header = read_header(layer.backing.fd, path)
        info = os.fstat(layer.backing.fd)
    finally:
        layer.backing.close()
    yield "disk", f"{header.size} bytes"
    yield "id", header.id
    yield "takes", f"{info.st_blocks * 512} bytes"
    if header.committing:
        yield "state", "half committed: crackle disk commit finishes it"
    try:
        layers = open_layers(path, open_backing, committing=True)
        try:
            base = open_backing(below(layers[-1]), True)
            try:
                with _mapped(base, layers) as stack:
                    held = [stack.held_by(n) for n in range(len(layers))]
                for n, one in enumerate(layers):
                    yield (
                        ("holds" if n == 0 else "over"),
                        f"{held[n]} bytes" + ("" if n == 0 else f" in {one.path}"),
                    )
                yield "base", base.path
                check_base(
                    base.fd, base.path, base.size // SECTOR * SECTOR, layers[-1].header, layers[-1].path
                )
            finally:
                base.close()
        finally:
            close(layers)
    except ConfigError as error:
        yield "broken", str(error)


_NO_HEADER = Header(id="", size=0, under=Under(path=""))


def commit(path: str) -> None:
    """Write what the overlay at `path` holds into what lies below it, overlay or base, and leave it empty.

    Other overlays over that are of no use any more, and say so. What is interrupted is finished by the next commit; the
    overlay shows the same disk before, in between and after. ConfigError when a microVM uses one of them.
    """
    with context(f"cannot commit {path}"), contextlib.ExitStack() as stack:
        top = Layer(path, _open(path, False), _NO_HEADER)
        stack.callback(top.backing.close)
        top.header = read_header(top.backing.fd, path)
        if top.header.under.overlay is None:
            # As it is before it is opened for writing, which looks whether it can have holes.
            base = _open(below(top), True)
            try:
                check_base(base.fd, base.path, base.size // SECTOR * SECTOR, top.header, path)
            finally:
                base.close()
            base = _open(below(top), False)
            stack.callback(base.close)
            _begin(top)
            with _mapped(base, [top]) as layers:
                _copy_runs(layers, base.fd, 0, top.header.size)
            os.fsync(base.fd)
            under = identify(base.fd, top.header.under.path, top.header.size)
        else:
            other = stack.enter_context(_disk(below(top), writable=True, committing=True))
            check_below(top, other.layers[0].path, other.layers[0].header)
            _begin(top)
            under = _commit_to_overlay(top, other)
        _empty(top, under)


def _commit_to_overlay(top: Layer, other: Backing) -> Under:
    lower = other.layers[0]
    # Whoever knows these contents is to be told that they change.
    lower.header = lower.header.changed()
    write_header(lower.backing.fd, lower.header, lower.path)
    os.fsync(lower.backing.fd)
    with _mapped(other, [top]) as layers, _mapped(other, other.layers, writable=True) as below_it:
        to_fd, start = below_it.place(0, 0)
        runs = _copy_runs(layers, to_fd, start, top.header.size)
        os.fsync(to_fd)
        for offset, length in runs:
            below_it.take(offset, length)
        below_it.sync()
    return msgspec.structs.replace(top.header.under, overlay=lower.header.id)


@contextlib.contextmanager
def _mapped(base: Backing, layers: list[Layer], *, writable: bool = False) -> Iterator[Layers]:
    """The maps of these layers over a base, for as long; what is written to them goes to the disk in order."""
    from crackle.virtio.block.layers import Layers

    twin = base.duplicate(alone=True)
    try:
        for layer in layers:
            twin.layers.append(layer.duplicate())
        found = Layers(twin, writable=writable, ordered=True)
        try:
            yield found
        finally:
            found.close()
    finally:
        twin.close()


def _begin(top: Layer) -> None:
    """From here on what is below is no longer what it was, and what the overlay holds counts in any case."""
    if not top.header.committing:
        top.header = msgspec.structs.replace(top.header, committing=True, number=top.header.number + 1)
        write_header(top.backing.fd, top.header, top.path)
        os.fsync(top.backing.fd)


def _empty(top: Layer, under: Under) -> None:
    """All of it is below: the map goes first, then it is an overlay like any other, and then its room is given back."""
    from crackle.virtio.block.backing import punch

    fd, header = top.backing.fd, top.header
    for at in range(MAP_AT, MAP_AT + header.map_size, _STEP):
        _write(fd, bytes(min(_STEP, MAP_AT + header.map_size - at)), at)
    os.fsync(fd)
    top.header = msgspec.structs.replace(header.changed().over(under), committing=False)
    write_header(fd, top.header, top.path)
    os.fsync(fd)
    punch(fd, header.data_at, header.file_size - header.data_at)


def _copy_runs(layers: Layers, to_fd: int, start: int, size: int) -> list[tuple[int, int]]:
    """Copy what the first file has to another, where the disk begins at `start`; what that was: (offset, bytes)."""
    runs = []
    at = 0
    while at < size:
        index, length = layers.find(at, min(size - at, 64 * _STEP))
        if index == 0:
            fd, from_at = layers.place(0, at)
            _copy(fd, from_at, to_fd, start + at, length)
            runs.append((at, length))
        at += length
    return runs


def _copy(from_fd: int, from_at: int, to_fd: int, to_at: int, length: int) -> None:
    """Copy a part of a file, holes as holes where that can be."""
    from crackle.virtio.block.backing import punch

    done = 0
    while done < length:
        try:
            data = max(os.lseek(from_fd, from_at + done, os.SEEK_DATA) - from_at, done)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = length
        data = min(data, length)
        if data > done and not punch(to_fd, to_at + done, data - done):
            for at in range(done, data, _STEP):
                _write(to_fd, bytes(min(_STEP, data - at)), to_at + at)
        done = data
        end = (
            min(os.lseek(from_fd, from_at + done, os.SEEK_HOLE) - from_at, length) if done < length else done
        )
        while done < end:
            block = os.pread(from_fd, min(_STEP, end - done), from_at + done)
            if not block:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            _write(to_fd, block, to_at + done)
            done += len(block)


def _write(fd: int, data: bytes, at: int) -> None:
    rest = memoryview(data)
    while rest:
        n = os.pwrite(fd, rest, at)
        rest, at = rest[n:], at + n


def rebase(path: str, under: str, *, overlay: bool = False, checked: bool = True) -> None:
    """Let the overlay at `path` lie over `under`, a plain disk or, if it is an `overlay`, that. It shows the same disk.

    What the two differ in is copied into it first: onto the base below, so that the overlays in between are needed
    no more, or onto another base altogether of the same size. checked: without, nothing is compared or copied: for a
    file that was moved, or copied. ConfigError leaves it as it was.
    """
    with context(f"cannot rebase {path}"), contextlib.ExitStack() as stack:
        if overlay:
            _check_apart(path, under)
        if checked:
            old = stack.enter_context(_disk(path, writable=True))
            top = old.layers[0]
        else:
            top = Layer(path, _open(path, False), _NO_HEADER)
            stack.callback(top.backing.close)
            top.header = read_header(top.backing.fd, path)
        if overlay:
            new = stack.enter_context(_disk(under))
            name = Under(path=seen_from(path, under), overlay=new.layers[0].header.id)
            size = new.layers[0].header.size
        else:
            new = _open(under, True)
            stack.callback(new.close)
            size = new.size // SECTOR * SECTOR
            name = identify(new.fd, os.path.realpath(under), size)
        if size != top.header.size:
            raise ConfigError(f"{under} has {size} bytes, and the disk {top.header.size}")
        if checked:
            ours = stack.enter_context(_mapped(old, old.layers, writable=True))
            theirs = stack.enter_context(_mapped(new, new.layers)) if overlay else None
            _take_differences(ours, theirs, new.fd, size)
            ours.sync()
        top.header = top.header.over(name)
        write_header(top.backing.fd, top.header, path)
        os.fsync(top.backing.fd)


def _check_apart(path: str, under: str) -> None:
    """ConfigError where the overlay `under` is, or lies over, the one at `path`."""
    from crackle.virtio.block.backing import open_backing

    layers = open_layers(under, open_backing)
    close(layers)
    if any(os.path.samefile(layer.path, path) for layer in layers):
        raise ConfigError(f"{under} lies over {path}")


def _take_differences(ours: Layers, theirs: Layers | None, base_fd: int, size: int) -> None:
    """Copy into our first file what is not the same in theirs, or in the plain disk that is open as `base_fd`."""
    offset = 0
    while offset < size:
        index, length = ours.find(offset, min(_STEP, size - offset))
        if theirs is not None:
            other, length = theirs.find(offset, length)
            fd, at = theirs.place(other, offset)
        else:
            fd, at = base_fd, offset
        if index:
            own, own_at = ours.place(index, offset)
            if not (os.path.sameopenfile(own, fd) and own_at == at):
                _take_blocks(ours, offset, os.pread(own, length, own_at), os.pread(fd, length, at))
        offset += length


def _take_blocks(ours: Layers, offset: int, data: bytes, other: bytes) -> None:
    if data == other:
        return
    fd, start = ours.place(0, offset)
    for at in range(0, len(data), BLOCK):
        block = data[at : at + BLOCK]
        if block != other[at : at + BLOCK]:
            _write(fd, block, start + at)
            ours.take(offset + at, len(block))
