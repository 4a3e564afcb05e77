"""What the kernel is told: the zero page (zero-page.rst), the PVH start info, and the command line."""

from __future__ import annotations

import struct

import pytest

from crackle.arch.x86_64 import DeviceInfo, boot, configure_system, memory_layout
from crackle.arch.x86_64.kernel import LoadedKernel
from crackle.errors import ConfigError
from crackle.memory import GuestMemory

MIB = 1 << 20
LINUX64 = LoadedKernel(entry=0x1000000, protocol="linux64", end=0x2000000)
PVH = LoadedKernel(entry=0x1000850, protocol="pvh", end=0x2000000)


def guest(mib: int) -> GuestMemory:
    return GuestMemory(memory_layout(mib * MIB))


def zero_page(mib: int = 128, **settings: object) -> bytes:
    memory = guest(mib)
    arguments: dict[str, object] = {"setup_header": None, "cmdline_size": 1, "initrd": None, **settings}
    boot.write_zero_page(memory, **arguments)  # type: ignore[arg-type]
    return memory.read(0x7000, 4096)


def e820(page: bytes) -> list[tuple[int, int, int]]:
    return [struct.unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(page[0x1E8])]


@pytest.mark.parametrize(
    ("mib", "ram"),
    [
        (1, []),
        (2, [(0x100000, 0x100000, 1)]),
        (3072, [(0x100000, 3071 * MIB, 1)]),
        (5120, [(0x100000, 3071 * MIB, 1), (1 << 32, 2048 * MIB, 1)]),
    ],
)
def test_the_memory_map_has_low_ram_the_reserved_hole_and_each_region(
    mib: int, ram: list[tuple[int, int, int]]
) -> None:
    low = [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2)]
    assert e820(zero_page(mib)) == low + ram
    assert boot.memory_map(guest(mib)) == low + ram


def test_zero_page_fields_of_a_vmlinux() -> None:
    page = zero_page(cmdline_size=77)
    assert struct.unpack_from("<Q", page, 0x70) == (0xE0000,)
    assert struct.unpack_from("<H", page, 0x1FE) == (0xAA55,)
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF
    assert struct.unpack_from("<II", page, 0x218) == (0, 0)
    assert struct.unpack_from("<I", page, 0x228) == (0x20000,)
    assert struct.unpack_from("<I", page, 0x230) == (0x1000000,)
    assert struct.unpack_from("<I", page, 0x238) == (77,)
    assert page[0x1EF] == 0, "the sentinel: anything else and the kernel wipes what it does not know"


def test_a_bzimages_setup_header_is_carried_over_except_for_what_the_loader_fills_in() -> None:
    header = bytes(range(1, 124))
    page = zero_page(setup_header=header, initrd=(0x7FFF000, 0x321))
    filled_in = {
        *range(0x1FE, 0x200),
        *range(0x202, 0x206),
        0x210,
        *range(0x218, 0x220),
        *range(0x228, 0x22C),
    }
    for offset, byte in enumerate(header, 0x1F1):
        if offset not in filled_in:
            assert page[offset] == byte, hex(offset)
    assert page[0x210] == 0xFF
    assert struct.unpack_from("<II", page, 0x218) == (0x7FFF000, 0x321)
    assert struct.unpack_from("<I", page, 0x228) == (0x20000,)
    assert e820(page)[0] == (0, 0x9FC00, 1)


def test_pvh_start_info_points_to_everything() -> None:
    memory = guest(5120)
    boot.write_start_info(memory, initrd=(0xBFFF0000, 0x4321))
    fields = struct.unpack("<IIIIQQQQII", memory.read(0x6000, 56))
    magic, version, flags, modules, module_list, cmdline, rsdp, table, entries, reserved = fields
    assert (magic, version, flags, reserved) == (0x336EC578, 1, 0, 0)
    assert (cmdline, rsdp) == (0x20000, 0xE0000)
    assert (modules, module_list) == (1, 0x6040)
    assert struct.unpack("<QQQQ", memory.read(module_list, 32)) == (0xBFFF0000, 0x4321, 0, 0)
    found = [struct.unpack("<QQII", memory.read(table + 24 * index, 24)) for index in range(entries)]
    assert found == [(*entry, 0) for entry in boot.memory_map(memory)]


def test_pvh_without_initrd_has_no_modules() -> None:
    memory = guest(128)
    boot.write_start_info(memory, initrd=None)
    assert struct.unpack("<IQ", memory.read(0x600C, 4) + memory.read(0x6010, 8)) == (0, 0)


@pytest.mark.parametrize("kernel", [LINUX64, PVH])
@pytest.mark.parametrize("vcpus", [1, 32])
@pytest.mark.parametrize("mib", [1, 64, 5120])
def test_a_whole_system_is_written(kernel: LoadedKernel, vcpus: int, mib: int) -> None:
    memory = guest(mib)
    devices = [DeviceInfo(0xC0001000 + index * 0x1000, 0x1000, 5 + index) for index in range(19)]
    configure_system(memory, kernel=kernel, cmdline=b"quiet", initrd=None, vcpu_count=vcpus, devices=devices)
    assert memory.read(0x20000, 6) == b"quiet\0"
    assert memory.read(0x9FC00, 4) == b"_MP_"
    assert memory.read(0xE0000, 8) == b"RSD PTR "
    assert memory.read(0x500, 16) == bytes(16)
    assert memory.read(0x510, 8) != bytes(8)
    assert (memory.read(0x6000, 4) == b"\x78\xc5\x6e\x33") == (kernel is PVH)
    assert (memory.read(0x9000, 8) != bytes(8)) == (kernel is LINUX64)


@pytest.mark.parametrize("vcpus", [0, 33, -1])
def test_the_number_of_vcpus_is_limited(vcpus: int) -> None:
    with pytest.raises(ConfigError, match=f"between 1 and 32, not {vcpus}"):
        configure_system(guest(1), kernel=LINUX64, cmdline=b"", initrd=None, vcpu_count=vcpus, devices=[])


def test_a_command_line_that_would_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="2048 characters, at most 2047"):
        configure_system(guest(1), kernel=LINUX64, cmdline=b"x" * 2048, initrd=None, vcpu_count=1, devices=[])


def test_the_bios_reset_vector_resets_through_the_keyboard_controller() -> None:
    memory = guest(1)
    boot.write_reset_vector(memory)
    assert memory.read(0xFFFF0, 7) == bytes.fromhex("b0 fe e6 64 f4 eb fd")


def test_a_kernel_loaded_over_the_reset_vector_keeps_it() -> None:
    memory = guest(1)
    memory.write(0xFFFF6, b"k")
    boot.write_reset_vector(memory)
    assert memory.read(0xFFFF0, 16) == bytes(6) + b"k" + bytes(9)
