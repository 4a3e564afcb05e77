"""The kernel command line: rules, and what the monitor adds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.arch.x86_64 import DeviceInfo
from crackle.arch.x86_64.cmdline import DEFAULT_BOOT_ARGS, Cmdline, build
from crackle.errors import ConfigError

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=300)


def test_what_is_appended_follows_after_one_space() -> None:
    line = Cmdline("  console=ttyS0 ")
    line.append(" pci=off ")
    assert str(line) == "console=ttyS0 pci=off"
    assert bytes(line) == b"console=ttyS0 pci=off"


def test_arguments_for_init_stay_last() -> None:
    line = Cmdline("console=ttyS0 -- single -v")
    line.append("pci=off")
    assert str(line) == "console=ttyS0 pci=off -- single -v"


def test_two_dashes_inside_a_word_separate_nothing() -> None:
    line = Cmdline("a=--b --c")
    line.append("d")
    assert str(line) == "a=--b --c d"


def test_a_trailing_separator_has_no_arguments_behind_it() -> None:
    assert str(Cmdline("quiet --")) == "quiet"


@pytest.mark.parametrize("text", ["-- single", "  -- single"])
def test_arguments_for_init_alone_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="init only"):
        Cmdline(text)


@pytest.mark.parametrize(
    ("text", "position"), [("quiet\n", 5), ("a\tb", 1), ("caf\u00e9", 3), ("a\0", 1), ("\x7f", 0)]
)
def test_only_printable_ascii_is_accepted_and_the_error_says_where(text: str, position: int) -> None:
    with pytest.raises(ConfigError, match=f"position {position}"):
        Cmdline(text)


def test_the_longest_line_leaves_room_for_the_nul() -> None:
    assert len(bytes(Cmdline("x" * 2047))) == 2047
    with pytest.raises(ConfigError, match="2048 characters, at most 2047"):
        Cmdline("x" * 2048)


def test_a_refused_append_changes_nothing() -> None:
    line = Cmdline("x" * 2040 + " -- i")
    before = str(line)
    with pytest.raises(ConfigError):
        line.append("root=/dev/vda")
    assert str(line) == before


def test_root_device_and_its_mode() -> None:
    assert build("q", root=True) == b"q pci=off root=/dev/vda rw"
    assert build("q", root=True, read_only=True) == b"q pci=off root=/dev/vda ro"
    assert build("q", root=True, partuuid="0eaa91a0-01") == b"q pci=off root=PARTUUID=0eaa91a0-01 rw"


def test_devices_are_declared_in_order_for_kernels_without_acpi() -> None:
    devices = [DeviceInfo(0xC0001000, 0x1000, 5), DeviceInfo(0xC0002000, 0x1000, 6)]
    expected = b"q pci=off virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=4K@0xc0002000:6"
    assert build("q", devices=devices) == expected


@pytest.mark.parametrize("size", [0, 100, -1024])
def test_a_window_that_is_no_number_of_kib_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=str(size)):
        Cmdline().append_device(0xC0001000, size, 5)


def test_boot_arguments_have_a_default_and_may_be_empty() -> None:
    assert build(None) == DEFAULT_BOOT_ARGS.encode() + b" pci=off"
    assert build("") == b"pci=off"


@given(PRINTABLE, PRINTABLE)
def test_any_printable_text_is_kept_word_for_word(first: str, second: str) -> None:
    words = first.split()
    if "--" in words or "--" in second.split():
        return
    line = Cmdline(first)
    line.append(second)
    assert str(line).split() == words + second.split()
