"""The layers that a disk with an overlay is made of, from the one that is written down to the base: found, checked."""

from __future__ import annotations

import os

import msgspec

from crackle.disk.overlay import (
    MAP_AT,
    MAX_DEPTH,
    Header,
    check_base,
    create,
    lay_out,
    over_base,
    over_layers,
    read_header,
    seen_from,
    too_deep,
    write_header,
)
from crackle.errors import ConfigError, context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from crackle.schema.drive import Overlay
    from crackle.virtio.block.backing import Backing

    Open = Callable[[str, bool], Backing]


class Layer:
    """An open overlay, of which the map is read and, at the top, written.

    path, header: of it. backing: its file. fresh: made for this disk, with nothing in it yet, and nobody knows it.
    limit: bytes that the file may take, 0 for any number.
    """

    __slots__ = ("backing", "fresh", "header", "limit", "path")

    def __init__(self, path: str, backing: Backing, header: Header, *, fresh: bool = False) -> None:
        self.path, self.backing, self.header, self.fresh, self.limit = path, backing, header, fresh, 0

    @property
    def place(self) -> tuple[int, int, int, int]:
        """For the core: descriptor, where the map is, its bytes, and where the disk begins."""
        return self.backing.fd, MAP_AT, self.header.map_size, self.header.data_at

    def duplicate(self) -> Layer:
        """Another on the same open file description."""
        twin = Layer(self.path, self.backing.duplicate(), self.header, fresh=self.fresh)
        twin.limit = self.limit
        return twin


def close(layers: list[Layer]) -> None:
    """Idempotent."""
    for layer in layers:
        layer.backing.close()


def open_layers(
    path: str, open_file: Open, *, writable: bool = False, committing: bool = False
) -> list[Layer]:
    """The overlay at `path` and those below it, open; the first `writable`, by `open_file`(path, read only).

    ConfigError when one is missing, is no overlay, belongs to another one or has been written to since.
    committing: one that is only half committed will do.
    """
    found: list[Layer] = []
    try:
        while True:
            if len(found) == MAX_DEPTH:
                raise ConfigError(too_deep(found[0].path, MAX_DEPTH + 1))
            backing = open_file(path, bool(found) or not writable)
            try:
                header = read_header(backing.fd, path)
                if found:
                    check_below(found[-1], path, header)
                if header.committing and not committing:
                    raise ConfigError(
                        f"{path} is only half committed: finish that with crackle disk commit {path}"
                    )
            except BaseException:
                backing.close()
                raise
            found.append(Layer(path, backing, header))
            if header.under.overlay is None:
                return found
            path = below(found[-1])
    except BaseException:
        close(found)
        raise


def below(layer: Layer) -> str:
    """The path of what an overlay lies over."""
    return os.path.join(os.path.dirname(os.path.realpath(layer.path)), layer.header.under.path)


def files_of(path: str) -> list[str]:
    """The overlay at `path` and those below it, as far as they are there, for who has to have them seen elsewhere.

    Whether they belong together is not looked at. ConfigError for one that is no overlay.
    """
    found: list[str] = []
    while len(found) < MAX_DEPTH and path not in found:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            break  # it is to be made, or whoever wants it will say that it is missing
        try:
            under = read_header(fd, path).under
        finally:
            os.close(fd)
        found.append(path)
        if under.overlay is None:
            break
        path = os.path.join(os.path.dirname(os.path.realpath(path)), under.path)
    return found


def header_at(layer: Layer, new: str) -> Header:
    """The header for a copy of an overlay at `new`: of the same contents, and what is below it named from there."""
    header = read_header(layer.backing.fd, layer.path)
    return header.over(msgspec.structs.replace(header.under, path=seen_from(new, below(layer))))


def copy_layer(layer: Layer, new: str) -> None:
    """A copy of an open overlay in a new file at `new`, on the disk; blocks are shared where they can be.

    Nobody writes to it meanwhile. ConfigError, and there is nothing new.
    """
    from crackle.memory.dump import copy_data
    from crackle.virtio.block.backing import share_blocks

    header = header_at(layer, new)
    with context(f"cannot make the overlay {new}"):
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if not share_blocks(layer.backing.fd, fd, header.map_end):
                lay_out(fd, header, new)
                copy_data(layer.backing.fd, fd, header.file_size)
            write_header(fd, header, new)
            os.fsync(fd)
        except BaseException:
            os.unlink(new)
            raise
        finally:
            os.close(fd)


def check_below(upper: Layer, path: str, header: Header) -> None:
    """ConfigError unless the overlay at `path` is what `upper` was made over."""
    if upper.header.committing:
        return
    if header.id != upper.header.under.overlay or header.size != upper.header.size:
        raise ConfigError(
            f"the overlay {upper.path} was made over {path}, which has been written to since, or is another overlay now"
        )


def lay_over(base: Backing, overlay: Overlay, open_file: Open, *, read_only: bool, durable: bool) -> None:
    """Open what a drive's `overlay` says, over its plain disk `base`, whose `layers` they become.

    One that is not there is made, over `overlay.over` where that is given. ConfigError when they do not belong
    together, and nothing new is left.
    """
    path = overlay.path
    made = path is None or not (read_only or os.path.lexists(path))
    layers: list[Layer] = []
    try:
        if not made:
            assert path is not None
            layers = open_layers(path, open_file, writable=not read_only)
            if overlay.over is not None and not _lies_over(layers, overlay.over):
                raise ConfigError(
                    f"the overlay {path} is there already, and lies over {below(layers[0])}, not over {overlay.over}"
                )
        elif overlay.over is not None:
            layers = open_layers(overlay.over, open_file)
        if layers:
            check_base(base.fd, base.path, base.size // 512 * 512, layers[-1].header, layers[-1].path)
        if made:
            layers.insert(0, _made(path, base, layers, open_file, durable=durable))
        layers[0].limit = overlay.size_limit or 0
    except BaseException:
        close(layers)
        raise
    base.layers = layers


def _lies_over(layers: list[Layer], over: str) -> bool:
    return len(layers) > 1 and os.path.realpath(over) == os.path.realpath(layers[1].path)


def _made(path: str | None, base: Backing, layers: list[Layer], open_file: Open, *, durable: bool) -> Layer:
    """A new overlay over `layers`, or over `base` where there are none."""
    from crackle.virtio.block.backing import backing_of

    header = over_layers(layers, path) if layers else over_base(base)
    if path is None:
        with context("cannot make an overlay in memory"):
            fd = os.memfd_create("overlay", os.MFD_CLOEXEC)
            try:
                lay_out(fd, header, "in memory", reserve=False)
            except BaseException:
                os.close(fd)
                raise
            return Layer("", backing_of(fd, "an overlay in memory", False), header, fresh=True)
    os.close(create(path, header, durable=durable))
    try:
        return Layer(path, open_file(path, False), header, fresh=True)
    except BaseException:
        os.unlink(path)
        raise
