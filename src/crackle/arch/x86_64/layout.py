"""Guest physical addresses, ports and interrupt lines of the x86_64 microVM: the map Firecracker guests know.

```
0x0000_0500    GDT; 0x530 IDT                        0x0010_0000    kernel, RAM up to 3 GiB, initrd at its end
0x0000_6000    PVH start info; 0x6040 module list    0xc000_0000    boot timer
0x0000_7000    zero page, or PVH memory map          0xc000_1000    virtio-mmio windows of 4 KiB
0x0000_8ff0    top of the boot stack                 0xc100_0000    tables of devices that come later
0x0000_9000    page tables, three pages              0xfec0_0000    IOAPIC
0x0002_0000    kernel command line                   0xfee0_0000    local APIC
0x0009_fc00    MP table, ACPI tables                 0xfffb_d000    KVM's TSS, three pages
0x000e_0000    RSDP; 0xe_1000 VMGENID; next VMClock  0x1_0000_0000  RAM from 4 GiB to 256 GiB
                                                     0x80_0000_0000 RAM from 512 GiB to 1 TiB
```
"""

from __future__ import annotations

from crackle.devices.i8042 import COMMAND, PULSE_RESET
from crackle.errors import ConfigError
from crackle.schema.machine import MAX_VCPUS as MAX_VCPUS

PAGE_SIZE = 0x1000
HUGE_PAGE_SIZE = 2 << 20

BOOT_GDT = 0x500
BOOT_IDT = 0x530
PVH_INFO_START = 0x6000
MODLIST_START = 0x6040
MEMMAP_START = 0x7000
ZERO_PAGE_START = 0x7000
BOOT_STACK_POINTER = 0x8FF0
PML4_START = 0x9000
PDPTE_START = 0xA000
PDE_START = 0xB000
LOW_BOOT_END = 0xC000
CMDLINE_START = 0x2_0000
CMDLINE_MAX_SIZE = 2048
"""Bytes of the kernel command line, its terminating NUL included."""

SYSTEM_MEM_START = 0x9_FC00
"""Where the extended BIOS data area of a PC begins: the MP floating pointer is searched for here (MP 1.4,
section 4).
"""
RSDP_ADDR = 0xE_0000
SYSTEM_MEM_SIZE = RSDP_ADDR - SYSTEM_MEM_START
VMGENID_ADDR = RSDP_ADDR + PAGE_SIZE
"""The VM generation ID: a page with nothing else in it, which is no RAM of the guest's."""
VMCLOCK_ADDR = VMGENID_ADDR + PAGE_SIZE
"""VMClock's page, which the guest may map for its programs."""
RESET_VECTOR = 0xF_FFF0
"""Where a kernel that reboots "through the BIOS" jumps to in real mode."""
HIMEM_START = 0x10_0000

BOOT_DATA = (
    (0, LOW_BOOT_END),
    (CMDLINE_START, CMDLINE_START + CMDLINE_MAX_SIZE),
    (SYSTEM_MEM_START, VMCLOCK_ADDR + PAGE_SIZE),
)
"""(start, end) of what the monitor writes before the guest runs; a kernel may not be loaded over it."""

IDENTITY_MAP_END = 1 << 30
"""The boot page tables map [0, 1 GiB) to itself."""

MMIO32_START = 0xC000_0000
MMIO32_END = 1 << 32
MMIO64_START = 256 << 30
MMIO64_END = 512 << 30
"""Between these, memory of devices' own: files that the guest has in its address space."""
ADDRESS_LIMIT = 1 << 40
"""RAM ends below this: 1 TiB less the two gaps."""

BOOT_TIMER_ADDR = MMIO32_START
MMIO_WINDOW_SIZE = 0x1000
VIRTIO_MMIO_START = BOOT_TIMER_ADDR + MMIO_WINDOW_SIZE
VIRTIO_MMIO_LAST = VIRTIO_MMIO_START + 999 * MMIO_WINDOW_SIZE
"""The last window: ACPI names devices with three digits."""
HOTPLUG_ADDR = MMIO32_START + (16 << 20)
"""Registers that tell of devices that come while the guest runs, one page."""
IOAPIC_ADDR = 0xFEC0_0000
APIC_ADDR = 0xFEE0_0000
KVM_TSS_ADDRESS = 0xFFFB_D000
KVM_IDENTITY_MAP_ADDRESS = 0xFFFB_C000
"""The page below the TSS, for KVM_SET_IDENTITY_MAP_ADDR."""

GSI_KEYBOARD = 1
GSI_POWER = 3
"""Interrupt of the ACPI generic event device that stands for the power button. It is COM2's line, and
there is no COM2.
"""
GSI_COM1 = 4
GSI_FIRST = 5
GSI_LAST = 23
"""Interrupt lines for devices, inclusive. 23 is the IOAPIC's last pin."""
GSI_VMGENID = GSI_LAST
"""Interrupt of the ACPI generic event device that tells of another VM generation ID, and of devices that have come.

More virtio devices than there are lines share the others: Linux does not share this one, and has no handlers on 0
and 2.
"""
GSI_MSI_FIRST = 24
GSI_MSI_LAST = 4095

COM1_PORT = 0x3F8
COM1_PORT_COUNT = 8
I8042_PORT = 0x60
I8042_PORT_COUNT = 5
I8042_COMMAND_PORT = I8042_PORT + COMMAND
I8042_RESET = PULSE_RESET
SLEEP_PORT = 0x600
SLEEP_PORT_COUNT = 2
"""Sleep control register (ACPI 6.5, 4.8.3.7), one byte; the sleep status register is the next port."""
PVPANIC_PORT = 0x505
PVPANIC_PORT_COUNT = 1
"""Where QEMU's ISA device is; the guest learns of it from the ACPI tables."""
S5_SLEEP_TYPE = 5
"""What the guest writes to SLP_TYP (bits 4:2 of the sleep control register) with SLP_EN (bit 5) to be switched off."""


def memory_layout(size: int) -> list[tuple[int, int]]:
    """Where `size` bytes of RAM go: (guest physical address, bytes) below 3 GiB, from 4 GiB, and from 512
    GiB.

    ConfigError unless `size` is a positive multiple of the page size and fits below 1 TiB.
    """
    if size <= 0 or size % PAGE_SIZE:
        raise ConfigError(f"memory size must be a positive multiple of {PAGE_SIZE} bytes, not {size}")
    regions = []
    left = size
    for start, end in ((0, MMIO32_START), (MMIO32_END, MMIO64_START), (MMIO64_END, ADDRESS_LIMIT)):
        part = min(left, end - start)
        if part:
            regions.append((start, part))
            left -= part
    if left:
        raise ConfigError(
            f"memory size of {size >> 20} MiB is more than the {(size - left) >> 20} MiB there is room for"
        )
    return regions
