"""KVM: thin, complete bindings to /dev/kvm, and the vCPU run loop. Knows nothing of devices.

`vm`, `vcpu` and `bus` are neutral; one file for each architecture adds its own. Only that of this host is built.
"""

from crackle.kvm.bus import Bus
from crackle.kvm.vm import CAPABILITIES, MEM_LOG_DIRTY_PAGES, MEM_READONLY
from crackle.kvm.x86_64 import CPUID_FLAG_SIGNIFICANT_INDEX, CpuidEntry, Kvm, Vcpu, Vm

__all__ = [
    "CAPABILITIES",
    "CPUID_FLAG_SIGNIFICANT_INDEX",
    "MEM_LOG_DIRTY_PAGES",
    "MEM_READONLY",
    "Bus",
    "CpuidEntry",
    "Kvm",
    "Vcpu",
    "Vm",
]
