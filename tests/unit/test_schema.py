"""The resources: what decodes, what is refused and how it is said."""

from __future__ import annotations

import json
import re
from typing import TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle import schema
from crackle.errors import ConfigError
from crackle.schema.codec import decode, explain, unknown_fields
from crackle.schema.machine import default_machine_config, updated
from crackle.schema.position import offset_of

T = TypeVar("T")


def refusal(resource: type, text: bytes) -> str:
    """What is said of a body that does not decode."""
    with pytest.raises(msgspec.DecodeError) as caught:
        decode(text, resource)
    return explain(caught.value, resource)


def attempt(resource: type[T], text: bytes) -> tuple[T | None, str]:
    """The resource, or None and what is said of the text."""
    try:
        return decode(text, resource), ""
    except msgspec.DecodeError as error:
        return None, explain(error, resource)


@pytest.mark.parametrize("name", schema.NAMES)
def test_every_resource_can_be_imported_by_its_name(name: str) -> None:
    assert issubclass(getattr(schema, name), msgspec.Struct)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Floppy'"):
        _ = schema.Floppy


def test_a_missing_field_is_named() -> None:
    assert refusal(schema.MachineConfig, b'{"vcpu_count": 1}') == "missing field `mem_size_mib`"


@pytest.mark.parametrize(
    ("resource", "text", "said"),
    [
        ("MachineConfig", b'{"vcpu_count": 256, "mem_size_mib": 1}', "(given: 256)"),
        ("MachineConfig", b'{"vcpu_count": "1", "mem_size_mib": 1}', '(given: "1")'),
        ("MachineConfig", b'{"vcpu_count": [1], "mem_size_mib": 1}', "`$.vcpu_count`"),
        ("BootSource", b'{"kernel_image_path": -1.5}', "(given: -1.5)"),
        (
            "VmConfig",
            b'{"boot-source": {"kernel_image_path": "k"}, "drives": [{"drive_id": null}]}',
            "(given: null)",
        ),
    ],
)
def test_a_wrong_value_is_repeated(resource: str, text: bytes, said: str) -> None:
    with pytest.raises(msgspec.DecodeError) as caught:
        decode(text, getattr(schema, resource))
    assert said in explain(caught.value, getattr(schema, resource), text)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (b"", "truncated"),
        (b'{"drives": [],\n', "at line 2 column 1"),
        (b'{"drives": [],\n  x}', "at line 2 column 3"),
        (b'{"drives": [],\r\n\t"boot-source": {"kernel_image_path": 5}}', "at line 2 column 39"),
        (b'{"drives": [{}, 1], "boot-source": {"kernel_image_path": "k"}}', "at line 1 column 13"),
        (b'\n{"boot-source": {"kernel_image_path": "k"}}', "at line 2 column 1"),
        (b'{"boot-source": {"kernel_image_path": "k",\n "color": 1}, "drives": []}', "at line 2 column 2"),
        (b'{"drives": [], "boot-source": {"kernel_image_path": "k"}} x', "at line 1 column 60"),
        (b'{"x": "[\\"{",\n"drives": [[], {}, 7]}', "at line 2 column 12"),
        (b'{"drives":\n"\xff"}', "at line 2 column"),
    ],
)
def test_what_is_wrong_has_a_line_and_a_column(text: bytes, where: str) -> None:
    with pytest.raises(msgspec.DecodeError) as caught:
        decode(text, schema.VmConfig)
    assert where in explain(caught.value, schema.VmConfig, text)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('ab"\\{[,', max_size=3), inner),
        max_leaves=12,
    ),
    st.integers(0, 3),
)
def test_every_element_is_found_in_its_place(value, indent: int) -> None:
    text = json.dumps([0, value, "last"], indent=indent or None).encode()
    assert json.loads(text[offset_of(text, "$[2]") :].decode().rstrip("]\n ")) == "last"
    assert text[offset_of(text, "$[1]") :].startswith(json.dumps(value, indent=indent or None).encode()[:1])


def test_sections_that_nobody_knows_are_named() -> None:
    text = b'{"drives": [], "boot-source": {"kernel_image_path": "k"}, "gpu": {}, "drive": [], "vsock": null}'
    assert unknown_fields(text, schema.VmConfig) == ["gpu", "drive"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"kernel_image_path": "\xff"}', "not UTF-8"),
        (b'{"kernel_image_path": "k", "more": ' + b"[" * 20000, "unknown field|nested"),
    ],
)
def test_text_that_python_cannot_take_is_refused_as_any_other(text: bytes, said: str) -> None:
    assert re.search(said, refusal(schema.BootSource, text))


def test_a_deeply_nested_body_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError, match="nested too deeply"):
        decode(b'{"a":' * 9000 + b"1" + b"}" * 9000, dict)


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    said = refusal(schema.BootSource, b'{"kernel_image_path": "k", "kernel": "x"}')
    assert said == "unknown field `kernel`, expected one of `kernel_image_path`, `initrd_path`, `boot_args`"


def test_an_unknown_choice_is_named_with_the_choices() -> None:
    said = refusal(schema.Drive, b'{"drive_id": "d", "is_root_device": false, "cache_type": "None"}')
    assert said.startswith("unknown variant `None`, expected `Unsafe` or `Writeback`")
    assert "cache_type" in said


def test_an_error_inside_a_section_gives_the_path_to_it() -> None:
    text = b'{"boot-source": {"kernel_image_path": "k"}, "drives": [{"drive_id": "d", "is_root_device": 1}]}'
    assert "`$.drives[0].is_root_device`" in refusal(schema.VmConfig, text)


def test_an_unknown_choice_inside_a_nested_resource_lists_the_choices() -> None:
    said = refusal(
        schema.SnapshotLoad,
        b'{"snapshot_path": "s", "mem_backend": {"backend_path": "m", "backend_type": "x"}}',
    )
    assert "expected `File` or `Uffd`" in said


@pytest.mark.parametrize("value", ["-1", "256", '"2"', "1.5", "true", "null", "[]", "{}"])
def test_a_vcpu_count_is_an_unsigned_byte(value: str) -> None:
    text = f'{{"vcpu_count": {value}, "mem_size_mib": 128}}'.encode()
    assert "vcpu_count" in refusal(schema.MachineConfig, text)


@pytest.mark.parametrize("text", [b"", b"{", b"nope", b"[]", b"\xff", b"{} {}"])
def test_text_that_is_no_json_object_is_refused(text: bytes) -> None:
    assert refusal(schema.MachineConfig, text)


def test_an_absent_cpu_template_is_left_out_and_other_absent_fields_are_null() -> None:
    assert b"cpu_template" not in msgspec.json.encode(default_machine_config())
    assert b'"initrd_path":null' in msgspec.json.encode(schema.BootSource("k"))


def test_the_configuration_uses_the_names_of_the_configuration_file() -> None:
    config = schema.VmConfig(drives=[], boot_source=schema.BootSource("k"))
    assert list(msgspec.json.decode(msgspec.json.encode(config))) == [
        "balloon",
        "drives",
        "boot-source",
        "cpu-config",
        "logger",
        "machine-config",
        "metrics",
        "mmds-config",
        "network-interfaces",
        "vsock",
        "entropy",
        "pmem",
        "memory-hotplug",
    ]


@pytest.mark.parametrize("section", ["drives", "boot-source"])
def test_a_configuration_file_needs_drives_and_a_boot_source(section: str) -> None:
    sections = {"drives": [], "boot-source": {"kernel_image_path": "k"}}
    del sections[section]
    assert refusal(schema.VmConfig, msgspec.json.encode(sections)) == f"missing field `{section}`"


def test_a_configuration_file_may_have_sections_of_another_version() -> None:
    text = b'{"drives": [], "boot-source": {"kernel_image_path": "k"}, "teleporter": {}}'
    assert decode(text, schema.VmConfig).boot_source.kernel_image_path == "k"


@pytest.mark.parametrize("mac", ["06:00:AC:10:00:02", "ff:ff:ff:ff:ff:ff"])
def test_a_mac_address_is_six_pairs_of_digits(mac: str) -> None:
    text = msgspec.json.encode({"iface_id": "e", "host_dev_name": "t", "guest_mac": mac})
    assert decode(text, schema.NetworkInterface).guest_mac == mac


@pytest.mark.parametrize(
    "mac", ["06:00:AC:10:00", "06:00:AC:10:00:0", "zz:00:AC:10:00:02", "06-00-AC-10-00-02"]
)
def test_another_mac_address_is_refused(mac: str) -> None:
    text = msgspec.json.encode({"iface_id": "e", "host_dev_name": "t", "guest_mac": mac})
    assert "guest_mac" in refusal(schema.NetworkInterface, text)


@pytest.mark.parametrize("count", [0, 33, 255])
def test_a_machine_has_1_to_32_vcpus(count: int) -> None:
    with pytest.raises(ConfigError, match=f"from 1 to 32.* got {count}"):
        updated(default_machine_config(), schema.MachineConfigUpdate(vcpu_count=count))


@pytest.mark.parametrize(("count", "fits"), [(1, True), (2, True), (3, False), (31, False), (32, True)])
def test_with_smt_the_vcpus_are_one_or_pairs(count: int, fits: bool) -> None:
    update = schema.MachineConfigUpdate(vcpu_count=count, smt=True)
    if fits:
        assert updated(default_machine_config(), update).vcpu_count == count
    else:
        with pytest.raises(ConfigError, match=f"got {count} with smt"):
            updated(default_machine_config(), update)


@pytest.mark.parametrize("pages", ["Transparent", "2M"])
def test_huge_pages_need_a_multiple_of_2_mib(pages: str) -> None:
    with pytest.raises(ConfigError, match=f"is 127, with huge_pages {pages}"):
        updated(default_machine_config(), schema.MachineConfig(1, 127, huge_pages=pages))  # type: ignore[arg-type]


def test_memory_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory size is 0"):
        updated(default_machine_config(), schema.MachineConfigUpdate(mem_size_mib=0))


def test_the_template_none_removes_the_template() -> None:
    with_template = schema.MachineConfig(1, 128, cpu_template="T2")
    without = updated(with_template, schema.MachineConfigUpdate(cpu_template="None"))
    assert without.cpu_template is msgspec.UNSET


@given(
    vcpu_count=st.none() | st.integers(1, 32).filter(lambda count: count % 2 == 0),
    mem_size_mib=st.none() | st.integers(1, 1 << 20),
    smt=st.none() | st.booleans(),
    track_dirty_pages=st.none() | st.booleans(),
)
def test_an_update_changes_what_it_gives_and_nothing_else(**given_fields: object) -> None:
    before = schema.MachineConfig(2, 64, smt=True, track_dirty_pages=True)
    after = updated(before, schema.MachineConfigUpdate(**given_fields))  # type: ignore[arg-type]
    for name, value in given_fields.items():
        assert getattr(after, name) == (getattr(before, name) if value is None else value)
    assert before == schema.MachineConfig(2, 64, smt=True, track_dirty_pages=True)


@given(st.binary(max_size=200))
def test_no_text_at_all_upsets_the_decoder(text: bytes) -> None:
    decoded, said = attempt(schema.VmConfig, text)
    assert decoded is not None or said


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["drive_id", "size", "ops", "x"]), inner)
    ),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {"drive_id": JSON, "is_root_device": JSON},
        optional={"cache_type": JSON, "rate_limiter": JSON, "path_on_host": JSON, "more": JSON},
    )
)
def test_any_json_decodes_or_is_explained(body: dict[str, object]) -> None:
    drive, said = attempt(schema.Drive, json.dumps(body).encode())
    if drive is None:
        assert said
    else:
        assert isinstance(drive.drive_id, str)
        assert isinstance(drive.is_root_device, bool)
