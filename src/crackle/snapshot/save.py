"""Taking a snapshot: of a machine that stands still, to a pair of files."""

from __future__ import annotations

import time
from binascii import crc32

import msgspec

from crackle.errors import ConfigError, os_reason
from crackle.memory.dump import Scan
from crackle.snapshot import statefile
from crackle.snapshot.pair import Pair
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


_PAGE = 4096


def save(machine: Machine, config: VmConfig, instance_id: str, request: SnapshotCreate) -> None:
    """Write a snapshot of the paused machine that `config` describes. ConfigError leaves the files as they were."""
    state = machine.save()
    memory = machine.memory
    with Pair(request.snapshot_path, request.mem_file_path, memory.size) as pair:
        try:
            samples = tuple(Scan(memory, pair.memory_fd).samples)
        except OSError as error:
            raise ConfigError(
                f"Cannot write memory file: {os_reason(error)}: {request.mem_file_path}"
            ) from None
        snapshot = Snapshot(
            id=pair.id,
            crackle=VERSION,
            instance_id=instance_id,
            created_ms=time.time_ns() // 1_000_000,
            # Outputs of the host's are not part of what the guest is made of.
            config=msgspec.structs.replace(config, logger=None, metrics=None, serial=msgspec.UNSET),
            machine=state,
            memory=MemoryFile(size=memory.size, samples=samples, checksum=_checksum(memory, samples)),
        )
        pair.commit(statefile.encode(snapshot))


def _checksum(memory: GuestMemory, samples: tuple[int, ...]) -> int:
    """CRC-32 of the pages at these offsets of the memory file, as they are in memory."""
    checksum, begin = 0, 0
    for region in memory.regions:
        for offset in samples:
            if begin <= offset < begin + region.size:
                checksum = crc32(memory.read(region.gpa + offset - begin, _PAGE), checksum)
        begin += region.size
    return checksum
