"""The metadata document: replacing, patching, finding, and what does not fit."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError, TooLargeError
from crackle.mmds.store import MAX_DEPTH, NotFoundError, Store, UnsupportedError, find, merged
from support.metadata import store_of

DOCUMENT = {
    "latest": {
        "meta-data": {"ami-id": "ami-1", "tags": {"a/b": "slash", "c~d": "tilde"}, "empty": ""},
        "list": ["first", {"x": "y"}],
        "number": 512,
    }
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=15,
)


def test_before_anything_is_put_it_is_an_empty_object_that_cannot_be_patched() -> None:
    store = Store(100)
    assert store.get() == {}
    with pytest.raises(ConfigError, match=r"^The MMDS data store is not initialized\.$"):
        store.patch({"a": "b"})
    assert store.get() == {}


def test_a_put_replaces_everything() -> None:
    store = store_of({"a": 1})
    store.put({"b": [1, 2.5, None, True]})
    assert store.get() == {"b": [1, 2.5, None, True]}


# RFC 7396, appendix A.
@pytest.mark.parametrize(
    ("original", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_a_merge_patch_does_what_its_specification_says(original: Any, patch: Any, result: Any) -> None:
    store = store_of(original)
    store.patch(patch)
    assert store.get() == ({} if result is None else result)


@given(JSON, JSON)
def test_a_patch_leaves_the_old_tree_as_it_was(original: Any, patch: Any) -> None:
    before = msgspec.json.encode(original)
    result = merged(original, patch)
    assert msgspec.json.encode(original) == before
    assert merged(result, patch) == result


@given(JSON)
def test_every_value_is_found_by_its_pointer(document: Any) -> None:
    def check(value: Any, pointer: str) -> None:
        assert find(document, pointer) == value
        if isinstance(value, dict):
            for key, item in value.items():
                check(item, f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                check(item, f"{pointer}/{index}")

    check(document, "")


@pytest.mark.parametrize(
    ("path", "json", "text"),
    [
        ("/", None, "latest/"),
        ("/latest", None, "list\nmeta-data/\nnumber"),
        ("/latest/meta-data/", None, "ami-id\nempty\ntags/"),
        ("/latest/meta-data/ami-id", '"ami-1"', "ami-1"),
        ("/latest/meta-data/ami-id/", '"ami-1"', "ami-1"),
        ("/latest/meta-data/tags/a~1b", '"slash"', "slash"),
        ("/latest/meta-data/tags/c~0d", '"tilde"', "tilde"),
        ("/latest/meta-data/empty", '""', ""),
        ("/latest/list/0", '"first"', "first"),
        ("/latest/list/1", '{"x":"y"}', "x"),
    ],
)
def test_what_the_guest_reads_in_both_forms(path: str, json: str | None, text: str) -> None:
    store = store_of(DOCUMENT)
    assert store.text(path, as_json=False) == text
    if json is not None:
        assert store.text(path, as_json=True) == json


@pytest.mark.parametrize("path", ["/latest/number", "/latest/list"])
def test_only_strings_and_objects_have_a_plain_form(path: str) -> None:
    with pytest.raises(UnsupportedError):
        store_of(DOCUMENT).text(path, as_json=False)


@pytest.mark.parametrize(
    "path", ["/late", "/latest/list/2", "/latest/list/01", "/latest/list/-1", "x", "/latest//"]
)
def test_what_is_not_there_is_not_found(path: str) -> None:
    with pytest.raises(NotFoundError):
        store_of(DOCUMENT).text(path, as_json=True)


def test_keys_are_listed_in_order_whatever_order_they_came_in() -> None:
    store = store_of({"b": 1, "a": {"z": 1, "y": 2}})
    store.patch({"aa": 3})
    assert store.text("/", as_json=True) == '{"a":{"y":2,"z":1},"aa":3,"b":1}'


def test_a_document_as_large_as_the_limit_fits_and_no_larger() -> None:
    store = Store(len('{"a":"12345"}'))
    store.put({"a": "12345"})
    for change in (store.put, store.patch):
        with pytest.raises(TooLargeError, match=r"^The MMDS patch request doesn't fit\.$"):
            change({"a": "123456"})
    with pytest.raises(TooLargeError):
        store.patch({"b": 1})
    assert store.get() == {"a": "12345"}


def test_a_document_nested_too_deeply_is_refused() -> None:
    document: Any = "leaf"
    for _ in range(MAX_DEPTH):
        document = {"a": document}
    store = store_of(document)
    assert store.text("/a" * MAX_DEPTH, as_json=False) == "leaf"
    with pytest.raises(ConfigError, match="nested more than 127 levels"):
        store.put([document])
