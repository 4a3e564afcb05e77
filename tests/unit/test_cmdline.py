"""The kernel command line: rules, and what the monitor adds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.arch.x86_64 import DeviceInfo
from crackle.arch.x86_64.cmdline import DEFAULT_BOOT_ARGS, Cmdline, build
from crackle.errors import ConfigError


def test_what_is_appended_follows_after_one_space() -> None:
    line = Cmdline("  console=ttyS0 ")
    line.append(" pci=off ")
    assert bytes(line) == b"console=ttyS0 pci=off"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("console=ttyS0 -- single -v", "console=ttyS0 X -- single -v"),
        ("a -- b -- c", "a X -- b -- c"),
        ("-- single", "X -- single"),
        ("  --  single ", "X --  single"),
        ("quiet --", "quiet X --"),
        ("a\t--\nb", "a X --\nb"),
        ('a "--" b', 'a X "--" b'),
        # These are no separators.
        ("a=--b --c", "a=--b --c X"),
        ("foo --bar", "foo --bar X"),
        ('run="set -- a b" quiet', 'run="set -- a b" quiet X'),
        ('a="x y"--"z" b', 'a="x y"--"z" b X'),
        ('"a -- b"', '"a -- b" X'),
        ("a\tb", "a\tb X"),
        ("a b\n", "a b X"),
        # The quote is never closed: all that follows belongs to its word.
        ('a b="c d', 'a X b="c d'),
        ('a "c -- d', 'a X "c -- d'),
        ('a b="c -- d" e"', 'a b="c -- d" X e"'),
    ],
)
def test_what_is_appended_comes_before_what_is_not_the_kernels(text: str, expected: str) -> None:
    line = Cmdline(text)
    line.append("X")
    assert bytes(line).decode() == expected


def test_bytes_that_are_no_ascii_are_kept_and_one_of_them_is_white_space_to_the_kernel() -> None:
    line = Cmdline("caf\u00e9 \u00e0-- \u00e0 -- x")
    line.append("X")
    # The second byte of \u00e0 is 0xa0: its word ends there, and what follows begins another, here the separator.
    assert bytes(line) == b"caf\xc3\xa9 \xc3\xa0 X -- \xc3\xa0 -- x"


@pytest.mark.parametrize(
    ("text", "words"), [("a\0b", "Null terminator .* position 1"), ("a\ud800", "encoded")]
)
def test_what_is_no_string_of_bytes_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Cmdline(text)


def test_the_longest_line_leaves_room_for_the_nul() -> None:
    assert len(bytes(Cmdline("x" * 2047))) == 2047
    with pytest.raises(ConfigError, match="2048 bytes, 2047 is the most"):
        Cmdline("x" * 2048)


def test_a_refused_append_changes_nothing() -> None:
    line = Cmdline("x" * 2040 + " -- i")
    before = bytes(line)
    with pytest.raises(ConfigError):
        line.append("root=/dev/vda")
    assert bytes(line) == before


def test_root_device_and_its_mode() -> None:
    assert build("q", root="/dev/vda") == b"q pci=off root=/dev/vda rw"
    assert build("q", root="/dev/vda", read_only=True) == b"q pci=off root=/dev/vda ro"
    assert build("q", root="PARTUUID=0eaa91a0-01") == b"q pci=off root=PARTUUID=0eaa91a0-01 rw"


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


def next_arg(text: bytes) -> list[bytes]:
    """The words of lib/cmdline.c, up to the one that ends the kernel's."""
    words = []
    at = 0
    while True:
        while at < len(text) and text[at : at + 1] in SPACES:
            at += 1
        if at == len(text):
            return words
        begin, quoted = at, False
        while at < len(text) and (quoted or text[at : at + 1] not in SPACES):
            quoted ^= text[at : at + 1] == b'"'
            at += 1
        word = text[begin:at]
        if word.strip(b'"') == b"--" and word in (b"--", b'"--"', b'"--'):
            return words
        words.append(word)


SPACES = [bytes([code]) for code in b" \t\n\v\f\r\xa0"]


@given(st.text(st.sampled_from('ab-" \t\n='), max_size=40))
def test_the_kernel_reads_its_words_and_ours_and_init_gets_the_rest(text: str) -> None:
    line = Cmdline(text)
    line.append("X Y")
    before, after = next_arg(text.encode()), next_arg(bytes(line))
    assert {b"X", b"Y"} <= set(after)
    assert [word for word in after if word not in (b"X", b"Y")] == [word.rstrip() for word in before]
    assert bytes(line).replace(b"X Y", b"").split() == text.encode().split()
