"""The processor architecture of this host: memory map, boot protocols, firmware tables, chips, board and CPU state.

`platform` is that of the machine Crackle runs on; `crackle.arch.interface` says what every one offers. Nothing below
this package opens a KVM descriptor; guest memory, VMs and vCPUs are handed in.
"""

from __future__ import annotations

import os

from crackle.arch.interface import DeviceInfo, Finding
from crackle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.arch.interface import Board, LoadedKernel, Platform
    from crackle.arch.x86_64 import platform as x86_64

    # Every architecture keeps to the interface.
    PLATFORMS: tuple[Platform, ...] = (x86_64,)

MACHINE = os.uname().machine

try:
    platform: Platform = __import__(f"crackle.arch.{MACHINE}.platform", fromlist=["platform"])
except ModuleNotFoundError:
    raise ConfigError(f"this host is {MACHINE}; only x86_64 hosts are supported yet") from None

__all__ = ["MACHINE", "Board", "DeviceInfo", "Finding", "LoadedKernel", "Platform", "platform"]
