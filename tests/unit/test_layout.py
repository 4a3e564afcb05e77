"""Where RAM and devices go in the x86_64 microVM."""

from itertools import pairwise

import pytest

from crackle.arch.x86_64 import layout, platform
from crackle.arch.x86_64.layout import memory_layout
from crackle.errors import ConfigError

MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize(
    ("size", "regions"),
    [
        (MIB, [(0, MIB)]),
        (128 * MIB, [(0, 128 * MIB)]),
        (3 * GIB, [(0, 3 * GIB)]),
        (3 * GIB + MIB, [(0, 3 * GIB), (4 * GIB, MIB)]),
        (5 * GIB, [(0, 3 * GIB), (4 * GIB, 2 * GIB)]),
        (256 * GIB, [(0, 3 * GIB), (4 * GIB, 252 * GIB), (512 * GIB, GIB)]),
        (767 * GIB, [(0, 3 * GIB), (4 * GIB, 252 * GIB), (512 * GIB, 512 * GIB)]),
    ],
)
def test_ram_goes_around_the_mmio_gaps(size: int, regions: list[tuple[int, int]]) -> None:
    assert memory_layout(size) == regions
    assert sum(part for _, part in regions) == size


@pytest.mark.parametrize("size", [0, -MIB, MIB + 1, 768 * GIB])
def test_an_impossible_size_is_refused_with_its_value(size: int) -> None:
    with pytest.raises(ConfigError, match=str(size if size < GIB else size // MIB)):
        memory_layout(size)


def test_the_map_is_the_one_firecracker_guests_know() -> None:
    assert layout.CMDLINE_START == 0x20000
    assert layout.CMDLINE_MAX_SIZE == 2048
    assert layout.ZERO_PAGE_START == 0x7000
    assert layout.BOOT_STACK_POINTER == 0x8FF0
    assert layout.PVH_INFO_START == 0x6000
    assert layout.RSDP_ADDR == 0xE0000
    assert layout.SYSTEM_MEM_START == 0x9FC00
    assert layout.HIMEM_START == 0x100000
    assert layout.BOOT_TIMER_ADDR == 0xC000_0000
    assert layout.VIRTIO_MMIO_START == 0xC000_1000
    assert layout.KVM_TSS_ADDRESS == 0xFFFB_D000
    assert (layout.GSI_FIRST, layout.GSI_LAST) == (5, 23)


def test_what_the_monitor_writes_does_not_overlap() -> None:
    ranges = [
        (layout.BOOT_GDT, 6 * 8),
        (layout.BOOT_IDT, 8),
        (layout.PVH_INFO_START, 56),
        (layout.MODLIST_START, 32),
        (layout.ZERO_PAGE_START, 4096),
        (layout.PML4_START, 4096),
        (layout.PDPTE_START, 4096),
        (layout.PDE_START, 4096),
        (layout.CMDLINE_START, layout.CMDLINE_MAX_SIZE),
        (layout.SYSTEM_MEM_START, layout.SYSTEM_MEM_SIZE),
        (layout.RSDP_ADDR, 36),
        (layout.VMGENID_ADDR, 16),
        (layout.VMCLOCK_ADDR, 4096),
    ]
    ends = [(start, start + size) for start, size in sorted(ranges)]
    assert all(before[1] <= after[0] for before, after in pairwise(ends))
    assert all(any(low <= start and end <= high for low, high in layout.BOOT_DATA) for start, end in ends)
    assert layout.ZERO_PAGE_START + 4096 <= layout.BOOT_STACK_POINTER


def test_fixed_interrupt_lines_are_not_handed_to_devices() -> None:
    fixed = [layout.GSI_KEYBOARD, layout.GSI_POWER, layout.GSI_COM1]
    assert len(set(fixed)) == 3
    assert max(fixed) < layout.GSI_FIRST
    assert layout.GSI_VMGENID not in platform.DEVICE_LINES
