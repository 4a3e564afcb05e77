"""The machine itself: vCPUs, memory, and how memory is backed (``/machine-config``)."""

from __future__ import annotations

from typing import Literal

import msgspec

from crackle.errors import ConfigError
from crackle.schema._base import U8, U64, Resource, check_u64

MAX_VCPUS = 32
DEFAULT_MEM_SIZE_MIB = 128

HugePages = Literal["None", "Transparent", "2M"]
CpuTemplate = Literal["C3", "T2", "T2S", "None", "T2CL", "T2A"]


class MachineConfig(Resource):
    """``vcpu_count`` is 1 to 32 (1 or even with ``smt``), ``mem_size_mib`` a multiple of the page size."""

    vcpu_count: U8
    mem_size_mib: U64
    smt: bool = False
    cpu_template: CpuTemplate | msgspec.UnsetType | None = msgspec.UNSET
    track_dirty_pages: bool = False
    huge_pages: HugePages = "None"

    def __post_init__(self) -> None:
        check_u64(self, "mem_size_mib")


class MachineConfigUpdate(Resource):
    """The fields of :class:`MachineConfig` that a ``PATCH`` changes; the others stay as they are."""

    vcpu_count: U8 | None = None
    mem_size_mib: U64 | None = None
    smt: bool | None = None
    cpu_template: CpuTemplate | None = None
    track_dirty_pages: bool | None = None
    huge_pages: HugePages | None = None

    def __post_init__(self) -> None:
        check_u64(self, "mem_size_mib")


def default_machine_config() -> MachineConfig:
    """The machine that boots when nobody configures one: 1 vCPU, 128 MiB."""
    return MachineConfig(vcpu_count=1, mem_size_mib=DEFAULT_MEM_SIZE_MIB)


def updated(current: MachineConfig, update: MachineConfig | MachineConfigUpdate) -> MachineConfig:
    """``current`` with the given fields of ``update``.

    Raises ConfigError when the result is a machine that cannot exist; ``current`` is never changed.
    """
    given = {
        name: value
        for name in update.__struct_fields__
        if (value := getattr(update, name)) is not None and value is not msgspec.UNSET
    }
    if given.get("cpu_template") == "None":
        given["cpu_template"] = msgspec.UNSET
    machine: MachineConfig = msgspec.structs.replace(current, **given)
    validate(machine)
    return machine


def validate(machine: MachineConfig) -> None:
    """Raise ConfigError, with the value, unless ``machine`` is one that can exist."""
    count, size = machine.vcpu_count, machine.mem_size_mib
    if not 1 <= count <= MAX_VCPUS or (machine.smt and count > 1 and count % 2):
        raise ConfigError(
            "The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if SMT is "
            f"enabled. It can be from 1 to {MAX_VCPUS}: got {count}{' with smt' if machine.smt else ''}."
        )
    page_mib = 1 if machine.huge_pages == "None" else 2
    if size <= 0 or size % page_mib:
        raise ConfigError(
            "The memory size (MiB) is either 0, or not a multiple of the configured page size. "
            f"The memory size is {size}, with huge_pages {machine.huge_pages}."
        )
