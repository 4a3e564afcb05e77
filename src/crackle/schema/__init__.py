"""Every resource of the API, once: request body, configuration-file section, library argument.

The names are imported when they are first used, because a process that starts a microVM uses few of them.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.schema.balloon import Balloon as Balloon
    from crackle.schema.balloon import BalloonHintingStart as BalloonHintingStart
    from crackle.schema.balloon import BalloonHintingStatus as BalloonHintingStatus
    from crackle.schema.balloon import BalloonStats as BalloonStats
    from crackle.schema.balloon import BalloonStatsUpdate as BalloonStatsUpdate
    from crackle.schema.balloon import BalloonUpdate as BalloonUpdate
    from crackle.schema.boot import BootSource as BootSource
    from crackle.schema.config import VmConfig as VmConfig
    from crackle.schema.cpu import CpuConfig as CpuConfig
    from crackle.schema.drive import Drive as Drive
    from crackle.schema.drive import DriveUpdate as DriveUpdate
    from crackle.schema.drive import Overlay as Overlay
    from crackle.schema.entropy import EntropyDevice as EntropyDevice
    from crackle.schema.fork import Fork as Fork
    from crackle.schema.fork import Forked as Forked
    from crackle.schema.instance import Action as Action
    from crackle.schema.instance import Fault as Fault
    from crackle.schema.instance import InstanceInfo as InstanceInfo
    from crackle.schema.instance import Version as Version
    from crackle.schema.instance import VmState as VmState
    from crackle.schema.machine import MachineConfig as MachineConfig
    from crackle.schema.machine import MachineConfigUpdate as MachineConfigUpdate
    from crackle.schema.memory_hotplug import MemoryHotplug as MemoryHotplug
    from crackle.schema.memory_hotplug import MemoryHotplugStatus as MemoryHotplugStatus
    from crackle.schema.memory_hotplug import MemoryHotplugUpdate as MemoryHotplugUpdate
    from crackle.schema.mmds import MmdsConfig as MmdsConfig
    from crackle.schema.net import NetworkInterface as NetworkInterface
    from crackle.schema.net import NetworkInterfaceUpdate as NetworkInterfaceUpdate
    from crackle.schema.pmem import Pmem as Pmem
    from crackle.schema.pmem import PmemUpdate as PmemUpdate
    from crackle.schema.rate_limiter import RateLimiter as RateLimiter
    from crackle.schema.rate_limiter import TokenBucket as TokenBucket
    from crackle.schema.serial import Serial as Serial
    from crackle.schema.snapshot import SnapshotCreate as SnapshotCreate
    from crackle.schema.snapshot import SnapshotLoad as SnapshotLoad
    from crackle.schema.telemetry import LoggerConfig as LoggerConfig
    from crackle.schema.telemetry import MetricsConfig as MetricsConfig
    from crackle.schema.vsock import Vsock as Vsock

_MODULE_OF = {
    name: module
    for module, names in {
        "balloon": "Balloon BalloonHintingStart BalloonHintingStatus BalloonStats "
        "BalloonStatsUpdate BalloonUpdate",
        "boot": "BootSource",
        "config": "VmConfig",
        "cpu": "CpuConfig",
        "drive": "Drive DriveUpdate Overlay",
        "entropy": "EntropyDevice",
        "fork": "Fork Forked",
        "instance": "Action Fault InstanceInfo Version VmState",
        "machine": "MachineConfig MachineConfigUpdate",
        "memory_hotplug": "MemoryHotplug MemoryHotplugStatus MemoryHotplugUpdate",
        "mmds": "MmdsConfig",
        "net": "NetworkInterface NetworkInterfaceUpdate",
        "pmem": "Pmem PmemUpdate",
        "rate_limiter": "RateLimiter TokenBucket",
        "serial": "Serial",
        "snapshot": "SnapshotCreate SnapshotLoad",
        "telemetry": "LoggerConfig MetricsConfig",
        "vsock": "Vsock",
    }.items()
    for name in names.split()
}
NAMES = tuple(_MODULE_OF)


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'crackle.schema' has no attribute {name!r}")
    value = getattr(__import__(f"crackle.schema.{module}", fromlist=(name,)), name)
    globals()[name] = value
    return value
