"""The CPU at the kernel's first instruction: registers, tables in memory, MSRs and local APIC."""

from __future__ import annotations

import struct
from collections import namedtuple
from typing import Any

import pytest

from crackle.arch.x86_64 import enter_kernel, memory_layout, msr, prepare_vcpu, registers
from crackle.arch.x86_64.kernel import LoadedKernel
from crackle.memory import GuestMemory

Entry = namedtuple("Entry", "function index flags eax ebx ecx edx")
CPUID = [Entry(0, 0, 0, 0xD, 0x68747541, 0x444D4163, 0x69746E65), Entry(1, 0, 0, 0, 0, 0, 0)]
LINUX64 = LoadedKernel(entry=0x1000000, protocol="linux64", end=0x2000000)
PVH = LoadedKernel(entry=0x1000850, protocol="pvh", end=0x2000000)
RESET_SREGS: dict[str, Any] = {
    "cr0": 0x6000_0010,
    "cr2": 0,
    "cr3": 0,
    "cr4": 0,
    "cr8": 0,
    "efer": 0,
    "apic_base": 0xFEE0_0900,
    "interrupt_bitmap": [0, 0, 0, 0],
    "ldt": {"selector": 0},
}


class RecordingVcpu:
    """Takes what boot set-up does to a vCPU, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "get_sregs":
            return lambda: dict(RESET_SREGS)
        if name == "get_lapic":
            return lambda: (
                bytes(0x350)
                + struct.pack("<I", 0x10000)
                + bytes(12)
                + struct.pack("<I", 0x10000)
                + bytes(0x9C)
            )
        return lambda value: self.calls.append((name, value))

    def done(self, name: str) -> Any:
        (value,) = [value for call, value in self.calls if call == name]
        return value


def configured(kernel: LoadedKernel, index: int = 0, count: int = 1, **settings: Any) -> RecordingVcpu:
    vcpu = RecordingVcpu()
    prepare_vcpu(vcpu, index=index, count=count, smt=False, supported_cpuid=CPUID, **settings)
    if index == 0:
        enter_kernel(vcpu, kernel)
    return vcpu


def tables(*, pvh: bool) -> GuestMemory:
    memory = GuestMemory(memory_layout(1 << 20))
    registers.write_tables(memory, pvh=pvh)
    return memory


def test_the_64_bit_protocol_starts_with_the_zero_page_in_rsi() -> None:
    regs = configured(LINUX64).done("set_regs")
    assert len(regs) == 18
    changed = {name: value for name, value in regs.items() if value}
    assert changed == {"rip": 0x1000000, "rsi": 0x7000, "rsp": 0x8FF0, "rbp": 0x8FF0, "rflags": 2}


def test_pvh_starts_with_the_start_info_in_ebx() -> None:
    regs = configured(PVH).done("set_regs")
    assert {name: value for name, value in regs.items() if value} == {
        "rip": 0x1000850,
        "rbx": 0x6000,
        "rflags": 2,
    }


def test_the_64_bit_protocol_is_in_long_mode_with_paging() -> None:
    sregs = configured(LINUX64).done("set_sregs")
    assert sregs["cr0"] == RESET_SREGS["cr0"] | 1 << 31 | 1
    assert (sregs["cr3"], sregs["cr4"], sregs["efer"]) == (0x9000, 1 << 5, 0x500)
    assert sregs["cs"]["l"] == 1
    assert sregs["cs"]["db"] == 0


def test_pvh_is_in_protected_mode_without_paging() -> None:
    sregs = configured(PVH).done("set_sregs")
    assert (sregs["cr0"], sregs["cr4"], sregs["efer"]) == (0x11, 0, 0)
    assert sregs["cs"]["l"] == 0
    assert sregs["cs"]["db"] == 1
    assert sregs["tr"]["limit"] == 0x67


@pytest.mark.parametrize("kernel", [LINUX64, PVH])
def test_segments_are_flat_and_match_their_descriptors(kernel: LoadedKernel) -> None:
    sregs = configured(kernel).done("set_sregs")
    memory = tables(pvh=kernel is PVH)
    assert sregs["gdt"] == {"base": 0x500, "limit": 47}
    assert sregs["idt"] == {"base": 0x530, "limit": 7}
    assert memory.read(0x500, 16) == memory.read(0x528, 16) == bytes(16)
    # __BOOT_CS and __BOOT_DS (boot.rst, "64-bit Boot Protocol").
    boot_cs, boot_ds = 0x10, 0x18
    for name, selector in (
        ("cs", boot_cs),
        *((name, boot_ds) for name in ("ds", "es", "fs", "gs", "ss")),
        ("tr", 0x20),
    ):
        segment = sregs[name]
        low, base, middle, access, flags, top = struct.unpack("<HHBBBB", memory.read(0x500 + selector, 8))
        limit = low | (flags & 0xF) << 16
        assert segment["selector"] == selector
        assert segment["base"] == base == middle == top == 0
        assert segment["limit"] == (limit << 12 | 0xFFF if flags & 0x80 else limit)
        assert access == segment["type"] | segment["s"] << 4 | segment["dpl"] << 5 | segment["present"] << 7
        assert flags >> 4 == segment["g"] << 3 | segment["db"] << 2 | segment["l"] << 1 | segment["avl"]
        assert segment["unusable"] == segment["padding"] == 0
    assert (sregs["cs"]["type"], sregs["ds"]["type"], sregs["tr"]["type"]) == (0xB, 3, 0xB)
    assert sregs["cs"]["limit"] == sregs["ds"]["limit"] == 0xFFFF_FFFF


def test_what_kvm_made_of_the_other_special_registers_stays() -> None:
    sregs = configured(LINUX64).done("set_sregs")
    assert {name: sregs[name] for name in ("apic_base", "ldt", "cr8", "interrupt_bitmap")} == {
        name: RESET_SREGS[name] for name in ("apic_base", "ldt", "cr8", "interrupt_bitmap")
    }


def test_page_tables_map_the_first_gibibyte_to_itself_in_large_pages() -> None:
    memory = tables(pvh=False)
    assert struct.unpack("<512Q", memory.read(0x9000, 4096)) == (0xA003, *[0] * 511)
    assert struct.unpack("<512Q", memory.read(0xA000, 4096)) == (0xB003, *[0] * 511)
    assert struct.unpack("<512Q", memory.read(0xB000, 4096)) == tuple(
        index << 21 | 0x83 for index in range(512)
    )


def test_pvh_needs_no_page_tables() -> None:
    assert tables(pvh=True).read(0x9000, 0x3000) == bytes(0x3000)


def test_the_fpu_is_as_after_fninit() -> None:
    assert configured(LINUX64).done("set_fpu") == {"fcw": 0x37F, "mxcsr": 0x1F80}


def test_lint0_takes_external_interrupts_and_lint1_nmis() -> None:
    page = configured(LINUX64).done("set_lapic")
    assert len(page) == 1024
    assert struct.unpack_from("<I", page, 0x350) == (0x10700,)
    assert struct.unpack_from("<I", page, 0x360) == (0x10400,)


def test_boot_msrs_are_the_ones_firecracker_sets() -> None:
    zeroed = [0x174, 0x175, 0x176, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102, 0x10]
    assert configured(LINUX64).done("set_msrs") == {**dict.fromkeys(zeroed, 0), 0x1A0: 1, 0x2FF: 0x806}


def test_msrs_this_kvm_does_not_list_are_left_out_but_for_the_mtrr_it_never_lists() -> None:
    msrs = configured(LINUX64, supported_msrs=[msr.TSC, msr.STAR]).done("set_msrs")
    assert msrs == {msr.TSC: 0, msr.STAR: 0, msr.MTRR_DEF_TYPE: 0x806}


def test_cpuid_is_set_before_what_depends_on_it() -> None:
    assert [name for name, _ in configured(LINUX64).calls][:2] == ["set_cpuid2", "set_msrs"]


def test_other_vcpus_get_cpuid_and_msrs_and_wait_for_their_start_up_ipi() -> None:
    vcpu = configured(LINUX64, index=1, count=2)
    assert [name for name, _ in vcpu.calls] == ["set_cpuid2", "set_msrs"]
    assert vcpu.done("set_cpuid2")[1].ebx >> 24 == 1
