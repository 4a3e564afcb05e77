"""Crackle: a microVM monitor for Linux KVM.

    from crackle import MicroVM

    with MicroVM(kernel="vmlinux", rootfs="root.ext4") as vm:
        vm.console.expect("login:")

This is the one place to import public names from. They are imported when first used: the VMM process, which needs none
of them, starts in milliseconds.
"""

from __future__ import annotations

from crackle.lazy import finder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.errors import CapacityError as CapacityError
    from crackle.errors import ConfigError as ConfigError
    from crackle.errors import CrackleError as CrackleError
    from crackle.errors import GuestError as GuestError
    from crackle.errors import KvmError as KvmError
    from crackle.errors import MemoryAccessError as MemoryAccessError
    from crackle.errors import StateError as StateError
    from crackle.errors import TooLargeError as TooLargeError
    from crackle.schema.balloon import Balloon as Balloon
    from crackle.schema.config import VmConfig as VmConfig
    from crackle.schema.cpu import CpuConfig as CpuConfig
    from crackle.schema.drive import Drive as Drive
    from crackle.schema.drive import Overlay as Overlay
    from crackle.schema.entropy import EntropyDevice as EntropyDevice
    from crackle.schema.jail import Jail as Jail
    from crackle.schema.mmds import MmdsConfig as MmdsConfig
    from crackle.schema.net import NetworkInterface as NetworkInterface
    from crackle.schema.pmem import Pmem as Pmem
    from crackle.schema.rate_limiter import RateLimiter as RateLimiter
    from crackle.schema.rate_limiter import TokenBucket as TokenBucket
    from crackle.schema.vsock import Vsock as Vsock
    from crackle.telemetry.logger import Logger as Logger
    from crackle.version import VERSION as __version__  # noqa: F401, N811
    from crackle.virtio.custom.base import VirtioDevice as VirtioDevice
    from crackle.virtio.custom.device import Request as Request
    from crackle.virtio.custom.device import RequestQueue as RequestQueue
    from crackle.vmm.clones import Snapshot as Snapshot
    from crackle.vmm.console import Console as Console
    from crackle.vmm.console import Match as Match
    from crackle.vmm.machine import ExitStatus as ExitStatus
    from crackle.vmm.microvm import MicroVM as MicroVM
    from crackle.vmm.paging import PageHandler as PageHandler
    from crackle.vmm.pool import Pool as Pool

_MODULE_OF = {
    "Balloon": "crackle.schema.balloon",
    "CapacityError": "crackle.errors",
    "ConfigError": "crackle.errors",
    "Console": "crackle.vmm.console",
    "CpuConfig": "crackle.schema.cpu",
    "CrackleError": "crackle.errors",
    "Drive": "crackle.schema.drive",
    "EntropyDevice": "crackle.schema.entropy",
    "ExitStatus": "crackle.vmm.machine",
    "GuestError": "crackle.errors",
    "Jail": "crackle.schema.jail",
    "KvmError": "crackle.errors",
    "Logger": "crackle.telemetry.logger",
    "Match": "crackle.vmm.console",
    "MemoryAccessError": "crackle.errors",
    "MicroVM": "crackle.vmm.microvm",
    "MmdsConfig": "crackle.schema.mmds",
    "NetworkInterface": "crackle.schema.net",
    "Overlay": "crackle.schema.drive",
    "PageHandler": "crackle.vmm.paging",
    "Pmem": "crackle.schema.pmem",
    "Pool": "crackle.vmm.pool",
    "RateLimiter": "crackle.schema.rate_limiter",
    "Request": "crackle.virtio.custom.device",
    "RequestQueue": "crackle.virtio.custom.device",
    "Snapshot": "crackle.vmm.clones",
    "StateError": "crackle.errors",
    "TokenBucket": "crackle.schema.rate_limiter",
    "TooLargeError": "crackle.errors",
    "VirtioDevice": "crackle.virtio.custom.base",
    "VmConfig": "crackle.schema.config",
    "Vsock": "crackle.schema.vsock",
    "__version__": "crackle.version:VERSION",
}

__all__ = [  # noqa: PLE0604  (the names are resolved by __getattr__)
    *_MODULE_OF
]


__getattr__ = finder("crackle", _MODULE_OF)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
