"""What the legacy devices save in a snapshot."""

from __future__ import annotations

import msgspec


class SerialState(msgspec.Struct, frozen=True, kw_only=True):
    """Registers of the 16550A, the input that the guest has not read yet, and its output that has not gone out yet."""

    ier: int
    lcr: int
    mcr: int
    scratch: int
    fifo_control: int
    divisor: int
    thr_pending: bool
    received: bytes
    unsent: bytes = b""


class PvPanicState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the guest's kernel has panicked."""

    panicked: bool


class VmGenIdState(msgspec.Struct, frozen=True, kw_only=True):
    """Where the generation ID is, as a guest physical address. The ID itself is in guest memory."""

    address: int


class VmClockState(msgspec.Struct, frozen=True, kw_only=True):
    """Where the guest's page is, as a guest physical address, and what stands in it that changes."""

    address: int
    sequence: int = 0
    marker: int = 0
    generation: int = 0


class HotPlugState(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest has not been told yet, the table that it may be reading, and how many it was given.

    events: a table each, or nothing for another generation. arrived: as what number those came that are there, by the
    guest physical addresses of their windows.
    """

    events: tuple[bytes, ...]
    table: bytes
    given: int
    arrived: dict[int, int] = {}


class I8042State(msgspec.Struct, frozen=True, kw_only=True):
    """Registers of the keyboard controller and the bytes waiting in its output buffer."""

    control: int
    output_port: int
    command: int
    pending: bytes
