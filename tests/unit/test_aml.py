"""ACPI Machine Language, term by term (ACPI 6.5, chapters 6.4 and 20.2)."""

import pytest

from crackle.arch.x86_64 import aml


@pytest.mark.parametrize(
    ("size", "encoded"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "41 04"),
        (0xFFD, "4f ff"),
        (0xFFE, "81 00 01"),
        (0xF_FFFC, "8f ff ff"),
        (0xF_FFFD, "c1 00 00 01"),
        (0xFFF_FFFB, "cf ff ff ff"),
    ],
)
def test_package_length_counts_itself_in_the_fewest_bytes(size: int, encoded: str) -> None:
    assert aml.pkg_length(size) == bytes.fromhex(encoded)


def test_a_package_has_a_longest_size() -> None:
    with pytest.raises(ValueError, match="too long"):
        aml.pkg_length(0xFFF_FFFC)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a 02"),
        (255, "0a ff"),
        (256, "0b 00 01"),
        (65536, "0c 00 00 01 00"),
        (1 << 32, "0e 00 00 00 00 01 00 00 00"),
    ],
)
def test_integers_take_their_shortest_form(value: int, encoded: str) -> None:
    assert aml.integer(value) == bytes.fromhex(encoded)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("COM1", b"COM1"),
        ("_SB", b"_SB_"),
        ("\\_SB", b"\\_SB_"),
        ("\\_SB.PWRB", b"\\\x2e_SB_PWRB"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
    ],
)
def test_names_are_padded_and_paths_prefixed(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


@pytest.mark.parametrize("path", ["", "1COM", "com1", "TOOLONG", "A..B", "A-B"])
def test_what_is_no_name_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is no AML name"):
        aml.name_string(path)


def test_eisa_ids_are_packed_to_a_big_endian_integer() -> None:
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c 41 d0 05 01")
    assert aml.eisa_id("PNP0C0C") == bytes.fromhex("0c 41 d0 0c 0c")


def test_objects_are_opcode_length_name_and_terms() -> None:
    assert aml.name("_UID", aml.integer(7)) == b"\x08_UID\x0a\x07"
    assert aml.device("V000", b"xy") == b"\x5b\x82\x07V000xy"
    assert aml.scope("\\_SB", b"xy") == b"\x10\x08\\_SB_xy"
    assert aml.method("_EVT", 1, b"x", serialized=True) == b"\x14\x07_EVT\x09x"
    assert aml.method("_STA", 0) == b"\x14\x06_STA\x00"
    assert aml.package(aml.integer(5), aml.integer(0)) == b"\x12\x05\x02\x0a\x05\x00"
    assert aml.if_equal(aml.ARG0, aml.integer(3), b"x") == b"\xa0\x06\x93\x68\x0a\x03x"
    assert aml.notify("PWRB", 0x80) == b"\x86PWRB\x0a\x80"
    assert aml.string("LNRO0005") == b"\x0dLNRO0005\0"


def test_resource_descriptors() -> None:
    assert aml.memory32_fixed(0xC0001000, 0x1000) == bytes.fromhex("86 09 00 01 00 10 00 c0 00 10 00 00")
    assert aml.interrupt(5) == bytes.fromhex("89 06 00 03 01 05 00 00 00")
    assert aml.io(0x3F8, 8) == bytes.fromhex("47 01 f8 03 f8 03 01 08")


def test_a_resource_template_is_a_buffer_that_ends_with_the_end_tag() -> None:
    template = aml.resource_template(aml.io(0x60, 1))
    assert template == bytes.fromhex("11 0d 0a 0a 47 01 60 00 60 00 01 01 79 00")
