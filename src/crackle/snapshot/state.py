"""What a snapshot keeps of a microVM beside its memory."""

from __future__ import annotations

import msgspec

from crackle.arch import platform
from crackle.mmds.state import MmdsState
from crackle.schema.config import VmConfig
from crackle.virtio.state import MmioState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    VmState: TypeAlias = Any
    VcpuState: TypeAlias = Any
    BoardState: TypeAlias = Any
else:
    VmState, VcpuState, BoardState = platform.VmState, platform.VcpuState, platform.BoardState


class SavedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A virtio device: its kind and identifier, as in the configuration, and what its transport holds."""

    kind: str
    identifier: str
    transport: MmioState


class MachineState(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that stands still.

    devices: in the order in which the guest numbers them. memory: (guest physical address, bytes) of each region, in
    the order of the memory file.
    """

    vm: VmState
    vcpus: tuple[VcpuState, ...]
    board: BoardState
    devices: tuple[SavedDevice, ...]
    memory: tuple[tuple[int, int], ...]
    mmds: MmdsState | None = None


class MemoryFile(msgspec.Struct, frozen=True, kw_only=True):
    """How the memory file that belongs to a state is known again.

    size: bytes. samples: offsets of pages in it. checksum: CRC-32 of these pages, one after the other. whole: it holds
    all of memory, rather than what has changed since the snapshot before.
    """

    size: int
    samples: tuple[int, ...]
    checksum: int
    whole: bool = True


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A state file's content.

    id: of this pair of files, 32 hexadecimal digits. crackle: the version that wrote it. created_ms: since 1970.
    """

    id: str
    crackle: str
    instance_id: str
    created_ms: int
    config: VmConfig
    machine: MachineState
    memory: MemoryFile
