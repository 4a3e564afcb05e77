"""Crackle: a microVM monitor for Linux KVM.

    from crackle import MicroVM

    with MicroVM(kernel="vmlinux", rootfs="root.ext4") as vm:
        vm.console.expect("login:")

Names are imported when first used: the VMM process, which needs none of them, starts in milliseconds.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.errors import ConfigError as ConfigError
    from crackle.errors import CrackleError as CrackleError
    from crackle.errors import GuestError as GuestError
    from crackle.errors import KvmError as KvmError
    from crackle.errors import StateError as StateError
    from crackle.schema.drive import Drive as Drive
    from crackle.schema.mmds import MmdsConfig as MmdsConfig
    from crackle.schema.net import NetworkInterface as NetworkInterface
    from crackle.schema.vsock import Vsock as Vsock
    from crackle.virtio.custom.base import VirtioDevice as VirtioDevice
    from crackle.vmm.console import Console as Console
    from crackle.vmm.machine import ExitStatus as ExitStatus
    from crackle.vmm.microvm import MicroVM as MicroVM

_MODULE_OF = {
    "ConfigError": "crackle.errors",
    "Console": "crackle.vmm.console",
    "CrackleError": "crackle.errors",
    "Drive": "crackle.schema.drive",
    "ExitStatus": "crackle.vmm.machine",
    "GuestError": "crackle.errors",
    "KvmError": "crackle.errors",
    "MicroVM": "crackle.vmm.microvm",
    "MmdsConfig": "crackle.schema.mmds",
    "NetworkInterface": "crackle.schema.net",
    "StateError": "crackle.errors",
    "VirtioDevice": "crackle.virtio.custom.base",
    "Vsock": "crackle.schema.vsock",
}

__all__ = [  # noqa: PLE0604  (the names are resolved by __getattr__)
    *_MODULE_OF
]


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'crackle' has no attribute {name!r}")
    value = getattr(__import__(module, fromlist=(name,)), name)
    globals()[name] = value
    return value
