"""Taking a snapshot: of a machine that stands still, to a pair of files."""

from __future__ import annotations

import contextlib
import os
import time
from binascii import crc32

import msgspec

from crackle.errors import ConfigError, context, os_reason
from crackle.memory.dump import Scan, resident_pages, write_pages
from crackle.snapshot import statefile
from crackle.snapshot.pair import PAGE_SIZE, Pair, sweep
from crackle.snapshot.state import MemoryFile, Snapshot
from crackle.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from crackle.memory import GuestMemory
    from crackle.schema import SnapshotCreate, VmConfig
    from crackle.snapshot.state import MachineState

    class Machine(Protocol):
        """As far as it concerns a snapshot."""

        @property
        def memory(self) -> GuestMemory: ...
        def save(self) -> MachineState: ...
        def copy_overlay(self, drive: str, path: str) -> None: ...
        def dirty_pages(self) -> list[bytes] | None: ...
        def forget_dirty(self) -> None: ...


def save(machine: Machine, config: VmConfig, instance_id: str, request: SnapshotCreate) -> None:
    """Write a snapshot of the paused machine that `config` describes. ConfigError leaves the files as they were.

    A differential one has the pages that were written since the one before it or, where nobody notes that, all that are
    the guest's own. Where the memory file is there already, and as large as memory, it is that one with these pages.
    """
    state = machine.save()
    memory = machine.memory
    # Taken before a full one too: it begins anew what the next differential one has.
    marks = machine.dirty_pages()
    full = request.snapshot_type == "Full"
    if marks is None:
        marks = [] if full else resident_pages(memory)
    _fetch(memory, full)
    with (
        Pair(request.snapshot_path, request.mem_file_path, memory.size) as pair,
        contextlib.ExitStack() as undo,
    ):
        try:
            if full:
                samples = tuple(Scan(memory, pair.memory_fd).samples)
            else:
                pair.begin_with_old_memory()
                write_pages(memory, pair.memory_fd, marks)
                # Of all memory: whoever loads it needs what this one goes on from as well.
                samples = tuple(Scan(memory).samples)
        except OSError as error:
            raise ConfigError(
                f"Cannot write memory file: {os_reason(error)}: {request.mem_file_path}"
            ) from None
        kept, config = _keep_overlays(machine, config, request, pair, undo)
        snapshot = Snapshot(
            id=pair.id,
            crackle=VERSION,
            instance_id=instance_id,
            created_ms=time.time_ns() // 1_000_000,
            # Outputs of the host's are not part of what the guest is made of.
            config=msgspec.structs.replace(config, logger=None, metrics=None, serial=msgspec.UNSET),
            machine=state,
            memory=MemoryFile(
                size=memory.size, samples=samples, checksum=_checksum(memory, samples), whole=full
            ),
        )
        pair.commit(statefile.encode(snapshot))
        undo.pop_all()
        for path in kept:
            with contextlib.suppress(OSError):
                sweep(path.rpartition(".")[0], pair.id)
    machine.forget_dirty()


def _keep_overlays(
    machine: Machine, config: VmConfig, request: SnapshotCreate, pair: Pair, undo: contextlib.ExitStack
) -> tuple[list[str], VmConfig]:
    """Copies of the overlays that the snapshot is to have itself, until `undo`, and the configuration that names
    them.
    """
    state = os.path.realpath(request.snapshot_path)
    paths, drives = [], []
    for drive in config.drives:
        overlay = drive.overlay
        if overlay is not msgspec.UNSET and (request.keep_overlays or overlay.path is None):
            path = f"{state}.{drive.drive_id}.{pair.id}"
            with contextlib.suppress(OSError):
                sweep(f"{state}.{drive.drive_id}", pair.before)
            machine.copy_overlay(drive.drive_id, path)
            undo.callback(os.unlink, path)
            paths.append(path)
            overlay = msgspec.structs.replace(overlay, path=path, memory=False, over=None)
        drives.append(msgspec.structs.replace(drive, overlay=overlay))
    return paths, msgspec.structs.replace(config, drives=drives)


def _fetch(memory: GuestMemory, full: bool) -> None:
    """Have the pages come that only a page-fault handler has: all of them for a full snapshot.

    For a differential one those by which the memory that it goes on from is known: it is not to be taken for that.
    """
    source = memory.source
    if source is None:
        return
    places, begin = [], 0
    for index, region in enumerate(memory.regions):
        if full:
            places.append((index, 0, region.size // PAGE_SIZE))
        else:
            places += [
                (index, (offset - begin) // PAGE_SIZE, 1)
                for offset in source.landmarks
                if begin <= offset < begin + region.size
            ]
        begin += region.size
    with context("Cannot write memory file"):
        source.fetch(places)


def _checksum(memory: GuestMemory, samples: tuple[int, ...]) -> int:
    """CRC-32 of the pages at these offsets of the memory file, as they are in memory."""
    checksum, begin = 0, 0
    for region in memory.regions:
        for offset in samples:
            if begin <= offset < begin + region.size:
                checksum = crc32(memory.read(region.gpa + offset - begin, PAGE_SIZE), checksum)
        begin += region.size
    return checksum
