"""A snapshot that no machine was needed for, and what of its two files can be found."""

from __future__ import annotations

from pathlib import Path

from crackle.arch.x86_64.board import BoardState
from crackle.arch.x86_64.state import VcpuState, VmState
from crackle.devices.state import I8042State, PvPanicState, SerialState
from crackle.memory import GuestMemory
from crackle.schema.boot import BootSource
from crackle.schema.config import VmConfig
from crackle.schema.machine import MachineConfig
from crackle.schema.snapshot import SnapshotCreate
from crackle.snapshot.save import save
from crackle.snapshot.state import MachineState, MemoryFile, Snapshot

VCPU = VcpuState(
    cpuid=((0, 0, 0, 0xD, 1, 2, 3), (1, 0, 0, 0x800F12, 0, 0x8000_0001, 0x200)),
    tsc_khz=2_000_000,
    mp_state=0,
    regs={"rip": 0x100000, "rax": (1 << 64) - 1},
    sregs={"cr0": 1, "cs": {"base": 0}, "interrupt_bitmap": [0, 0, 0, 0]},
    xsave=bytes(4096),
    xcrs=b"xcrs",
    debugregs=b"debug",
    lapic=bytes(1024),
    msrs={0x10: 5, 0x6E0: 0},
    events=b"events",
)
STATE = MachineState(
    vm=VmState(irqchips=(b"1", b"2", b"3"), pit=b"pit", clock_ns=7),
    vcpus=(VCPU,),
    board=BoardState(
        serial=SerialState(
            ier=0, lcr=3, mcr=0, scratch=0, fifo_control=0, divisor=12, thr_pending=False, received=b"x"
        ),
        i8042=I8042State(control=0, output_port=0, command=0, pending=b""),
        pvpanic=PvPanicState(panicked=False),
    ),
    devices=(),
    memory=((0, 1 << 20),),
)
CONFIG = VmConfig(
    drives=[], boot_source=BootSource("kernel"), machine_config=MachineConfig(vcpu_count=1, mem_size_mib=1)
)
SNAPSHOT = Snapshot(
    id="0123456789abcdef" * 2,
    crackle="0.1.0",
    instance_id="one",
    created_ms=1_700_000_000_000,
    config=CONFIG,
    machine=STATE,
    memory=MemoryFile(size=1 << 20, samples=(0, 4096), checksum=1),
)


class Paused:
    """As far as a snapshot is concerned, a machine: its memory, and a state."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory

    def save(self) -> MachineState:
        return STATE

    def dirty_pages(self) -> list[bytes] | None:
        return None

    def forget_dirty(self) -> None:
        """Nobody notes any."""


def fill(memory: GuestMemory, number: int) -> None:
    """Some pages that tell this number from others."""
    for page in (0, 1, 7, 100, 255):
        memory.write(page * 4096, number.to_bytes(8, "little") * 512)


def save_as(memory: GuestMemory, directory: Path) -> None:
    """A snapshot of `memory` to the files "state" and "memory"."""
    save(Paused(memory), CONFIG, "one", SnapshotCreate(str(directory / "state"), str(directory / "memory")))
