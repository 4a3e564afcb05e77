"""The whole configuration: the configuration file, and the answer to ``GET /vm/config``."""

from __future__ import annotations

import msgspec

from crackle.schema.balloon import Balloon
from crackle.schema.boot import BootSource
from crackle.schema.cpu import CpuConfig
from crackle.schema.drive import Drive
from crackle.schema.entropy import EntropyDevice
from crackle.schema.machine import MachineConfig
from crackle.schema.memory_hotplug import MemoryHotplug
from crackle.schema.mmds import MmdsConfig
from crackle.schema.net import NetworkInterface
from crackle.schema.pmem import Pmem
from crackle.schema.serial import Serial
from crackle.schema.telemetry import LoggerConfig, MetricsConfig
from crackle.schema.vsock import Vsock


class VmConfig(msgspec.Struct, rename="kebab", kw_only=True):
    """Everything configured so far, in the order and under the names of the configuration file.

    A configuration file must hold ``boot-source`` and ``drives``; sections it does not know are ignored, so
    that files written for another version still load. ``cpu_config`` may be the path of a file that holds
    the section.
    """

    balloon: Balloon | None = None
    drives: list[Drive]
    boot_source: BootSource
    cpu_config: CpuConfig | str | None = None
    logger: LoggerConfig | None = None
    machine_config: MachineConfig | None = None
    metrics: MetricsConfig | None = None
    mmds_config: MmdsConfig | None = None
    network_interfaces: list[NetworkInterface] = msgspec.field(default_factory=list)
    vsock: Vsock | None = None
    entropy: EntropyDevice | None = None
    pmem: list[Pmem] = msgspec.field(default_factory=list)
    memory_hotplug: MemoryHotplug | None = None
    serial: Serial | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def shares_memory(self) -> bool:
        """Whether another process is to have guest memory too: the back end of a vhost-user drive."""
        return any(drive.socket is not None for drive in self.drives)
