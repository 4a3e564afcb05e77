"""The processor architecture of this host: memory map, boot protocols, firmware tables and CPU state.

Every architecture offers the same names, which are re-exported here for the machine Crackle runs on. Nothing
below this package opens a KVM descriptor; guest memory and vCPUs are handed in.
"""

from __future__ import annotations

import os

from crackle.errors import ConfigError

MACHINE = os.uname().machine

if MACHINE != "x86_64":
    raise ConfigError(f"this host is {MACHINE}; only x86_64 hosts are supported yet")

from crackle.arch.x86_64 import (  # noqa: E402  (only after the check above)
    Cmdline,
    DeviceInfo,
    LoadedKernel,
    build_cmdline,
    configure_system,
    enter_kernel,
    layout,
    load_initrd,
    load_kernel,
    memory_layout,
    prepare_vcpu,
)

__all__ = [
    "MACHINE",
    "Cmdline",
    "DeviceInfo",
    "LoadedKernel",
    "build_cmdline",
    "configure_system",
    "enter_kernel",
    "layout",
    "load_initrd",
    "load_kernel",
    "memory_layout",
    "prepare_vcpu",
]
