"""Reading a snapshot: the pair of files, and what whoever loads it wants otherwise."""

from __future__ import annotations

import os
from contextlib import nullcontext

import msgspec

from crackle.errors import ConfigError, context
from crackle.schema.config import VmConfig
from crackle.snapshot import statefile
from crackle.snapshot.overrides import named, override
from crackle.snapshot.pair import find, read
from crackle.snapshot.state import Snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from crackle.memory import GuestMemory
    from crackle.schema import SnapshotLoad

# Whoever imports this will want it, or has the time.
statefile.make_ready()


class Template:
    """A snapshot that has been read once, for any number of loads. Owns the open memory file until `close`."""

    def __init__(self, snapshot: Snapshot, memory_fd: int) -> None:
        self.snapshot = snapshot
        self.memory_fd = memory_fd
        self._config = msgspec.msgpack.encode(snapshot.config)

    def copy(self) -> tuple[Snapshot, int]:
        """As `find` gives it: a configuration that may be changed, and a descriptor to close."""
        config = msgspec.msgpack.decode(self._config, type=VmConfig)
        return msgspec.structs.replace(self.snapshot, config=config), os.dup(self.memory_fd)

    def close(self) -> None:
        """Idempotent."""
        fd, self.memory_fd = self.memory_fd, -1
        if fd >= 0:
            os.close(fd)


class Loaded:
    """A snapshot whose configuration is as `request` wants it, until `close`.

    memory_fd: the memory file, open; or -1 where its pages come from the handler that listens at `handler`.
    template: the snapshot that is meant, if it has been read already.
    ConfigError when there is no such snapshot, or no such device in it.
    """

    def __init__(self, request: SnapshotLoad, template: Template | None = None) -> None:
        path = request.mem_file_path if request.mem_backend is None else request.mem_backend.backend_path
        assert path is not None, "one of the two is given"
        self.clock_realtime = request.clock_realtime
        self.memory_fd = -1
        self.handler: str | None = None
        if request.mem_backend is not None and request.mem_backend.backend_type == "Uffd":
            self.handler = path
            found = read(request.snapshot_path)
        elif template is None:
            found, self.memory_fd = find(request.snapshot_path, path)
        else:
            found, self.memory_fd = template.copy()
        try:
            self.snapshot: Snapshot = _overridden(found, request)
        except BaseException:
            self.close()
            raise

    def take(self, config: VmConfig) -> None:
        """Go on with `config`, into which the snapshot's has been made."""
        self.snapshot = msgspec.structs.replace(self.snapshot, config=config)

    def fill(self, memory: GuestMemory, report: Callable[[str], None]) -> AbstractContextManager[object]:
        """Give a machine's memory its contents; the machine, which looks at some of them, is restored in the block.

        report: is told of what becomes of a page-fault handler later.
        """
        if self.handler is None:
            memory.map_file(self.memory_fd)
            return nullcontext()
        from crackle.snapshot.handover import Handover

        with context("Failed to load guest memory: Error creating guest memory from uffd"):
            handover = Handover(memory, self.handler, report, self.snapshot.memory.samples)
        memory.come_from(handover)
        return handover

    def close(self) -> None:
        """Idempotent."""
        fd, self.memory_fd = self.memory_fd, -1
        if fd >= 0:
            os.close(fd)


def _overridden(found: Snapshot, request: SnapshotLoad) -> Snapshot:
    config = found.config
    machine = config.machine_config
    assert machine is not None, "whoever saved it has filled it in"
    huge_pages = machine.huge_pages if request.huge_pages == "Snapshot" else request.huge_pages
    backend = request.mem_backend
    if huge_pages == "2M" and (backend is None or backend.backend_type == "File"):
        raise ConfigError(
            "Failed to load guest memory: Cannot restore hugetlbfs backed snapshot by mapping the memory file. "
            'Give "huge_pages": "None" or "Transparent", or have a page-fault handler ("Uffd").'
        )
    config.machine_config = msgspec.structs.replace(
        machine,
        huge_pages=huge_pages,
        track_dirty_pages=request.track_dirty_pages or request.enable_diff_snapshots,
    )
    for device in request.pmem_overrides:
        named(config.pmem, "id", device.id, "Pmem", "pmem device").path_on_host = device.path_on_host
    return override(found, request)
