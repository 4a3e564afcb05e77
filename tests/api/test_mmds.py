"""Metadata from the host's side: the document, its limit, and the service's configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.network import Namespace

if TYPE_CHECKING:
    from .conftest import Vmm

    Start = Callable[..., Vmm]

NOT_INITIALIZED = "MMDS error: The MMDS data store is not initialized."
TOO_LARGE = "MMDS limit exceeded error: The MMDS patch request doesn't fit."
DOCUMENT = {"latest": {"meta-data": {"ami-id": "dummy"}}}


@pytest.fixture
def networked(start: Start, namespace: Namespace) -> Iterator[Vmm]:
    """A process with the interfaces eth0 and eth1."""
    for number in range(2):
        namespace.tap(f"tap{number}")
    with namespace.entered():
        vmm = start(fake=True)
    for number in range(2):
        body = {"iface_id": f"eth{number}", "host_dev_name": f"tap{number}"}
        assert vmm.request("PUT", f"/network-interfaces/eth{number}", body).status == 204
    yield vmm
    # The TAPs, which it holds, keep their namespace alive.
    vmm.end()


def test_a_document_is_put_patched_and_read(vmm: Vmm) -> None:
    assert vmm.request("GET", "/mmds").json == {}
    refused = vmm.request("PATCH", "/mmds", DOCUMENT)
    assert (refused.status, refused.fault) == (400, NOT_INITIALIZED)
    assert vmm.request("PUT", "/mmds", DOCUMENT).status == 204
    assert vmm.request("GET", "/mmds").json == DOCUMENT
    patch = {"latest": {"meta-data": {"ami-id": None, "b": [1.5, None, True]}, "user": "x"}}
    assert vmm.request("PATCH", "/mmds", patch).status == 204
    answer = vmm.request("GET", "/mmds")
    assert answer.headers["content-type"] == "application/json"
    assert answer.body == b'{"latest":{"meta-data":{"b":[1.5,null,true]},"user":"x"}}'


@pytest.mark.parametrize("document", [[1, 2], "text", 5, True])
def test_any_json_is_a_document(vmm: Vmm, document: Any) -> None:
    assert vmm.request("PUT", "/mmds", document).status == 204
    assert vmm.request("GET", "/mmds").json == document


def test_null_is_an_empty_document(vmm: Vmm) -> None:
    assert vmm.request("PUT", "/mmds", b"null").status == 204
    assert vmm.request("GET", "/mmds").json == {}
    assert vmm.request("PATCH", "/mmds", {"a": 1}).status == 204
    assert vmm.request("PATCH", "/mmds", b"null").status == 204
    assert vmm.request("GET", "/mmds").json == {}


@pytest.mark.parametrize(
    ("method", "body"), [("PUT", b"{bad"), ("PATCH", b"\xff"), ("PUT", b"[" * 200 + b"]" * 200)]
)
def test_what_is_no_json_changes_nothing(vmm: Vmm, method: str, body: bytes) -> None:
    vmm.request("PUT", "/mmds", DOCUMENT)
    assert vmm.request(method, "/mmds", body).status == 400
    assert vmm.request("GET", "/mmds").json == DOCUMENT


def test_a_document_over_the_limit_is_refused_whole(start: Start) -> None:
    vmm = start("--http-api-max-payload-size", "512000", "--mmds-size-limit", "51200", fake=True)

    def document(size: int, key: str = "secret_key") -> Any:
        return {"latest": {"meta-data": {"ami-id": "smth", key: "a" * size}}}

    vmm.request("PUT", "/mmds", DOCUMENT)
    for method, size in (("PUT", 51200), ("PATCH", 51143)):
        refused = vmm.request(method, "/mmds", document(size))
        assert (refused.status, refused.fault) == (413, TOO_LARGE)
    assert vmm.request("GET", "/mmds").json == DOCUMENT
    assert vmm.request("PATCH", "/mmds", document(51142)).status == 204
    assert vmm.request("PATCH", "/mmds", document(10, "another")).status == 413
    assert vmm.request("PATCH", "/mmds", document(1)).status == 204
    assert vmm.request("PATCH", "/mmds", document(10, "another")).status == 204


def test_the_limit_is_that_of_a_request_unless_it_is_given(start: Start) -> None:
    vmm = start("--http-api-max-payload-size", "100", fake=True)
    assert vmm.request("PUT", "/mmds", {"a": "x" * 60}).status == 204
    assert vmm.request("PATCH", "/mmds", {"b": "x" * 60}).status == 413


def test_a_file_of_metadata_is_there_from_the_start(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(DOCUMENT))
    vmm = start("--metadata", str(path), fake=True)
    assert vmm.request("GET", "/mmds").json == DOCUMENT


def test_a_configuration_file_may_say_it_all(
    start: Start, namespace: Namespace, kernel: Path, tmp_path: Path, told: Callable[[], list[str]]
) -> None:
    namespace.tap("tap0")
    (tmp_path / "metadata.json").write_text(json.dumps(DOCUMENT))
    config = {
        "boot-source": {"kernel_image_path": str(kernel)},
        "drives": [],
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}],
        "mmds-config": {"network_interfaces": ["eth0"], "version": "V2", "ipv4_address": "169.254.170.2"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with namespace.entered():
        vmm = start(
            *("--config-file", str(tmp_path / "config.json"), "--metadata", str(tmp_path / "metadata.json")),
            fake=True,
        )
    assert vmm.request("GET", "/mmds").json == DOCUMENT
    assert told() == ["metadata eth0 169.254.170.2 V2", "start"]
    vmm.end()


def test_a_guest_that_started_without_metadata_has_none(started: Vmm) -> None:
    for method, body in (("GET", None), ("PUT", DOCUMENT), ("PATCH", DOCUMENT)):
        answer = started.request(method, "/mmds", body)
        assert (answer.status, answer.fault) == (400, NOT_INITIALIZED)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"network_interfaces": []},
            "The list of network interface IDs that allow forwarding MMDS requests is empty.",
        ),
        (
            {"network_interfaces": ["eth0", "foo"]},
            "The list of network interface IDs provided contains at least one ID that does not correspond to any "
            "existing network interface. It is 'foo'.",
        ),
        (
            {"network_interfaces": ["eth0"], "ipv4_address": "1.1.1.1"},
            "The MMDS IPv4 address is not link local. It is 1.1.1.1; one from 169.254.1.0 to 169.254.254.255 can be "
            "used.",
        ),
        (
            {"network_interfaces": ["eth0"], "ipv4_address": "169.254.0.7"},
            "The MMDS IPv4 address is not link local.",
        ),
        (
            {"network_interfaces": ["eth0"], "ipv4_address": "169.254.255.7"},
            "The MMDS IPv4 address is not link local.",
        ),
    ],
)
def test_a_service_that_cannot_be_reached_is_refused(networked: Vmm, config: Any, message: str) -> None:
    answer = networked.request("PUT", "/mmds/config", config)
    assert answer.status == 400
    assert answer.fault.startswith(f"MMMDS config error: {message}")
    assert networked.request("GET", "/vm/config").json["mmds-config"] is None


@pytest.mark.parametrize("address", ["", "169.254.169", "169.254.169.256", "fe80::1"])
def test_an_address_that_is_none_is_refused_in_one_sentence(networked: Vmm, address: str) -> None:
    config = {"network_interfaces": ["eth0"], "ipv4_address": address}
    assert networked.request("PUT", "/mmds/config", config).fault == (
        "An error occurred when deserializing the json body of a request: invalid syntax, at `$.ipv4_address` "
        f'(given: "{address}") at line 1 column 50.'
    )


def test_the_configuration_is_shown_with_what_was_left_out(networked: Vmm) -> None:
    assert (
        networked.request("PUT", "/mmds/config", {"network_interfaces": ["eth1", "eth0", "eth1"]}).status
        == 204
    )
    shown = {
        "network_interfaces": ["eth0", "eth1"],
        "version": "V1",
        "ipv4_address": "169.254.169.254",
        "imds_compat": False,
    }
    assert networked.request("GET", "/vm/config").json["mmds-config"] == shown
    given = {
        "network_interfaces": ["eth0"],
        "version": "V2",
        "ipv4_address": "169.254.170.2",
        "imds_compat": True,
    }
    assert networked.request("PUT", "/mmds/config", given).status == 204
    assert networked.request("GET", "/vm/config").json["mmds-config"] == given
    assert networked.request("GET", "/mmds").json == {}


def test_version_1_is_deprecated(networked: Vmm) -> None:
    for version, deprecated in ((None, True), ("V1", True), ("V2", False)):
        body = {"network_interfaces": ["eth0"]} | ({} if version is None else {"version": version})
        answer = networked.request("PUT", "/mmds/config", body)
        assert answer.status == 204
        assert (answer.headers.get("deprecation") == "true") is deprecated
    assert "V1 is deprecated." in networked.log.read_text()


def test_a_running_guest_is_served_and_its_document_can_be_changed(
    networked: Vmm, kernel: Path, told: Callable[[], list[str]]
) -> None:
    config = {"network_interfaces": ["eth1"], "version": "V2"}
    assert networked.request("PUT", "/mmds/config", config).status == 204
    assert networked.request("PUT", "/boot-source", {"kernel_image_path": str(kernel)}).status == 204
    assert networked.request("PUT", "/actions", {"action_type": "InstanceStart"}).status == 204
    assert told() == ["metadata eth1 169.254.169.254 V2", "start"]
    assert networked.request("GET", "/mmds").json == {}
    assert networked.request("PUT", "/mmds", DOCUMENT).status == 204
    assert networked.request("PATCH", "/mmds", {"a": 1}).status == 204
    assert networked.request("GET", "/mmds").json == DOCUMENT | {"a": 1}
    assert networked.request("PUT", "/mmds/config", config).fault == (
        "The requested operation is not supported after starting the microVM."
    )
