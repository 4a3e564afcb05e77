"""Model-specific registers at boot (Intel SDM volume 4): system calls off, fast strings on, memory
write-back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

TSC = 0x10
SYSENTER_CS = 0x174
SYSENTER_ESP = 0x175
SYSENTER_EIP = 0x176
MISC_ENABLE = 0x1A0
MTRR_DEF_TYPE = 0x2FF
STAR = 0xC000_0081
LSTAR = 0xC000_0082
CSTAR = 0xC000_0083
SYSCALL_MASK = 0xC000_0084
KERNEL_GS_BASE = 0xC000_0102

_FAST_STRINGS = 1 << 0
_MTRR_ENABLE = 1 << 11
_WRITE_BACK = 6

_BOOT_MSRS = {
    SYSENTER_CS: 0,
    SYSENTER_ESP: 0,
    SYSENTER_EIP: 0,
    STAR: 0,
    CSTAR: 0,
    KERNEL_GS_BASE: 0,
    SYSCALL_MASK: 0,
    LSTAR: 0,
    TSC: 0,
    MISC_ENABLE: _FAST_STRINGS,
    MTRR_DEF_TYPE: _MTRR_ENABLE | _WRITE_BACK,
}
# KVM handles the MTRRs but does not list them among the MSRs to save: eight variable ranges (base and mask), and the
# fixed ones (Intel SDM volume 3, 12.11.2).
_UNLISTED = (MTRR_DEF_TYPE, *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270))


def saved_msrs(listed: Iterable[int]) -> list[int]:
    """The MSRs of a snapshot, out of KVM_GET_MSR_INDEX_LIST's; KVM leaves out those that it does not know."""
    return list(dict.fromkeys((*listed, *_UNLISTED)))


def boot_msrs(supported: Container[int] | None = None) -> dict[int, int]:
    """MSR index to value, of those in `supported` (KVM_GET_MSR_INDEX_LIST), or of all when that is None."""
    if supported is None:
        return dict(_BOOT_MSRS)
    return {msr: value for msr, value in _BOOT_MSRS.items() if msr in supported or msr in _UNLISTED}
