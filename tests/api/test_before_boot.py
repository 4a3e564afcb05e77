"""Every endpoint of a microVM that has not started: what it answers, and every way to be refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from crackle.api.routes import ROUTES
from crackle.version import FIRECRACKER_VERSION, VERSION

if TYPE_CHECKING:
    from pathlib import Path

    from tests.api.conftest import Vmm

BEFORE = "The requested operation is not supported before starting the microVM."
MISMATCH = "The id from the path does not match the id from the body! "
JSON_ERROR = "An error occurred when deserializing the json body of a request: "


def test_the_instance_and_its_version(vmm: Vmm) -> None:
    assert vmm.request("GET", "/").json == {
        "id": "anonymous-instance",
        "state": "Not started",
        "vmm_version": FIRECRACKER_VERSION,
        "app_name": "Crackle",
        "crackle_version": VERSION,
    }
    versions = {"firecracker_version": FIRECRACKER_VERSION, "crackle_version": VERSION}
    assert vmm.request("GET", "/version").json == versions


def test_the_machine_of_nobodys_wish(vmm: Vmm) -> None:
    assert vmm.request("GET", "/machine-config").json == {
        "vcpu_count": 1,
        "mem_size_mib": 128,
        "smt": False,
        "track_dirty_pages": False,
        "huge_pages": "None",
    }


def test_the_machine_is_put_and_patched(vmm: Vmm) -> None:
    assert (
        vmm.request("PUT", "/machine-config", {"vcpu_count": 4, "mem_size_mib": 64, "smt": True}).status
        == 204
    )
    assert vmm.request("PATCH", "/machine-config", {"mem_size_mib": 96}).status == 204
    machine = vmm.request("GET", "/machine-config").json
    assert (machine["vcpu_count"], machine["mem_size_mib"], machine["smt"]) == (4, 96, True)
    assert vmm.request("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64}).status == 204
    assert vmm.request("GET", "/machine-config").json["smt"] is False


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({}, JSON_ERROR + "missing field `vcpu_count` at line 1 column "),
        ({"vcpu_count": 1}, JSON_ERROR + "missing field `mem_size_mib` at line 1 column "),
        (
            {"vcpu_count": 0, "mem_size_mib": 64},
            "Machine config error: The number of vCPUs must be greater than 0",
        ),
        (
            {"vcpu_count": 33, "mem_size_mib": 64},
            "Machine config error: The number of vCPUs must be greater than 0",
        ),
        ({"vcpu_count": 3, "mem_size_mib": 64, "smt": True}, "Machine config error: The number of vCPUs"),
        ({"vcpu_count": 1, "mem_size_mib": 0}, "Machine config error: The memory size (MiB) is either 0"),
        (
            {"vcpu_count": 1, "mem_size_mib": 63, "huge_pages": "2M"},
            "Machine config error: The memory size (MiB) is either 0, or not a multiple",
        ),
        (
            {"vcpu_count": "2", "mem_size_mib": 64},
            JSON_ERROR + 'Expected `int`, got `str`, at `$.vcpu_count` (given: "2") at line 1 column ',
        ),
        (
            {"vcpu_count": -1, "mem_size_mib": 64},
            JSON_ERROR + "Expected `int` >= 0, at `$.vcpu_count` (given: -1) at line 1 column ",
        ),
        (
            {"vcpu_count": 1, "mem_size_mib": 64, "cpus": 2},
            JSON_ERROR + "unknown field `cpus`, expected one of",
        ),
        ({"vcpu_count": 1, "mem_size_mib": 64, "huge_pages": "4M"}, JSON_ERROR + "unknown variant `4M`"),
        ({"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "T3"}, JSON_ERROR + "unknown variant `T3`"),
        (b"{", JSON_ERROR + "Input data was truncated at line 1 column "),
        (b"nonsense", JSON_ERROR + "JSON is malformed"),
        (b"[1, 128]", JSON_ERROR + "Expected `object`, got `array` at line 1 column "),
    ],
)
def test_a_machine_that_cannot_be_is_refused(vmm: Vmm, body: Any, fault: str) -> None:
    before = vmm.request("GET", "/machine-config").body
    answer = vmm.request("PUT", "/machine-config", body)
    assert answer.status == 400
    assert answer.fault.startswith(fault)
    assert vmm.request("GET", "/machine-config").body == before


@pytest.mark.parametrize("body", [{}, {"vcpu_count": None}])
def test_a_patch_of_nothing_is_refused(vmm: Vmm, body: dict[str, None]) -> None:
    assert vmm.request("PATCH", "/machine-config", body).fault == "Empty PATCH request."


def test_a_deprecated_field_is_answered_with_a_header(vmm: Vmm) -> None:
    machine = {"vcpu_count": 1, "mem_size_mib": 64}
    for body, deprecated in (({**machine, "cpu_template": "None"}, True), (machine, False)):
        answer = vmm.request("PUT", "/machine-config", body)
        assert answer.status == 204
        assert (answer.headers.get("deprecation") == "true") is deprecated


def test_boot_source_drives_and_serial_show_in_the_configuration(vmm: Vmm, kernel: Path, disk: Path) -> None:
    root = {"drive_id": "root", "is_root_device": True, "path_on_host": str(disk), "is_read_only": True}
    data = {
        "drive_id": "data_1",
        "is_root_device": False,
        "path_on_host": str(disk),
        "cache_type": "Writeback",
    }
    source = {"kernel_image_path": str(kernel), "boot_args": "quiet"}
    assert vmm.request("PUT", "/drives/data_1", data).status == 204
    assert vmm.request("PUT", "/drives/root", root).status == 204
    assert vmm.request("PUT", "/boot-source", source).status == 204
    assert vmm.request("PUT", "/serial", {"serial_out_path": "/tmp/x"}).status == 204
    config = vmm.request("GET", "/vm/config").json
    assert config["boot-source"] == {**source, "initrd_path": None}
    absent = {"partuuid": None, "rate_limiter": None, "socket": None, "io_engine": "Sync"}
    assert config["drives"] == [
        {**root, **absent, "cache_type": "Unsafe"},
        {**data, **absent, "is_read_only": False},
    ]
    assert config["machine-config"]["vcpu_count"] == 1
    assert config["network-interfaces"] == []
    assert config["vsock"] is None


@pytest.mark.parametrize(
    ("path", "body", "fault"),
    [
        ("/boot-source", {}, JSON_ERROR + "missing field `kernel_image_path` at line 1 column "),
        (
            "/boot-source",
            {"kernel_image_path": "/none"},
            "Boot source error: The kernel file cannot be opened: No such file or directory (os error 2): "
            "/none",
        ),
        (
            "/boot-source",
            {"kernel_image_path": "/dev/null", "initrd_path": "/none"},
            "Boot source error: The initrd",
        ),
        (
            "/boot-source",
            {"kernel_image_path": "/dev/null", "boot_args": "x" * 2048},
            "Boot source error: The kernel command line is invalid: Invalid cmdline capacity provided.",
        ),
        ("/drives", {"drive_id": "a"}, "The ID cannot be empty."),
        ("/drives/", {"drive_id": "a"}, "The ID cannot be empty."),
        ("/drives/a-b", {}, "API Resource IDs can only contain alphanumeric characters and underscores."),
        ("/drives/a", {"drive_id": "a"}, JSON_ERROR + "missing field `is_root_device` at line 1 column "),
        (
            "/drives/a",
            {"drive_id": "b", "is_root_device": False},
            MISMATCH,
        ),
        ("/drives/a", {"drive_id": "a", "is_root_device": False}, "Drive config error: Unable to create"),
        (
            "/drives/a",
            {"drive_id": "a", "is_root_device": False, "path_on_host": "/none"},
            "Drive config error: Unable to create the virtio block device: Virtio backend error: Error "
            "manipulating the backing file: No such file or directory (os error 2) /none",
        ),
        (
            "/drives/a",
            {"drive_id": "a", "is_root_device": False, "socket": "/s"},
            "Drive config error: Unable to create the virtio block device: Vhost user backend error: Vhost-user error: "
            "Failed to connect to UDS Unix stream: No such file or directory (os error 2): cannot connect to the "
            "vhost-user back end at '/s'",
        ),
        (
            "/logger",
            {"level": "loud"},
            JSON_ERROR + "Invalid LevelFilter at line 1 column 11: 'loud' is not",
        ),
        ("/logger", {"log_path": "/none/log"}, "Logger error: Failed to open target file: No such file"),
        ("/logger", {"colour": True}, JSON_ERROR + "unknown field `colour`"),
        ("/metrics", {}, JSON_ERROR + "missing field `metrics_path` at line 1 column "),
        ("/metrics", {"metrics_path": "/none/m"}, "Metrics error: Cannot initialize the metrics system"),
        ("/serial", {"baud": 9600}, JSON_ERROR + "unknown field `baud`"),
        ("/actions", {}, JSON_ERROR + "missing field `action_type` at line 1 column "),
        ("/actions", {"action_type": "Reboot"}, JSON_ERROR + "unknown variant `Reboot`, expected one of"),
        ("/actions", {"action_type": "FlushMetrics"}, BEFORE),
        ("/actions", {"action_type": "SendCtrlAltDel"}, BEFORE),
        (
            "/actions",
            {"action_type": "InstanceStart"},
            "Start microvm error: Cannot start microvm without kernel",
        ),
        ("/snapshot", {}, "Missing snapshot operation type."),
        ("/snapshot/erase", {}, "Invalid request method and/or path: PUT /snapshot/erase."),
        ("/snapshot/load", {"snapshot_path": "s"}, JSON_ERROR + "missing field: either `mem_backend`"),
        ("/balloon/statistics", {}, JSON_ERROR + "missing field `amount_mib`"),
        ("/mmds/other", {"a": 1}, "Unrecognized PUT request path `other`."),
        ("/hotplug", {"a": 1}, "Invalid request method and/or path: PUT hotplug."),
    ],
)
def test_what_a_put_is_refused_for(vmm: Vmm, path: str, body: Any, fault: str) -> None:
    before = vmm.request("GET", "/vm/config").body
    answer = vmm.request("PUT", path, body)
    assert answer.status == 400
    assert answer.fault.startswith(fault)
    assert vmm.request("GET", "/vm/config").body == before


@pytest.mark.parametrize(
    ("path", "body", "fault"),
    [
        ("/vm", {"state": "Paused"}, BEFORE),
        ("/vm", {"state": "Resumed"}, BEFORE),
        (
            "/vm",
            {"state": "Stopped"},
            JSON_ERROR + "unknown variant `Stopped`, expected `Paused` or `Resumed`",
        ),
        ("/vm", {}, JSON_ERROR + "missing field `state` at line 1 column "),
        ("/drives/a", {"drive_id": "a", "path_on_host": "/dev/null"}, BEFORE),
        (
            "/drives/a",
            {"path_on_host": "/dev/null"},
            JSON_ERROR + "missing field `drive_id` at line 1 column ",
        ),
        ("/drives/a", {"drive_id": "a", "is_read_only": True}, JSON_ERROR + "unknown field `is_read_only`"),
        ("/balloon/statistics", {"stats_polling_interval_s": 1}, BEFORE),
        ("/balloon/hinting/stop", None, BEFORE),
    ],
)
def test_what_a_patch_is_refused_for(vmm: Vmm, path: str, body: Any, fault: str) -> None:
    assert vmm.request("PATCH", path, body).fault.startswith(fault)


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("GET", "/floppy", "Invalid request method and/or path: GET floppy."),
        ("GET", "/vm", "Invalid request method and/or path: GET vm."),
        ("GET", "/drives", "Invalid request method and/or path: GET drives."),
        ("GET", "/balloon", "Balloon config error: No balloon device found."),
        ("GET", "/balloon/air", "Unrecognized GET request path `air`."),
        ("GET", "/balloon/hinting", "Unrecognized GET request path `/hinting/`."),
        ("PATCH", "/balloon/hinting/hot", "Unrecognized PATCH request path `/hinting/hot`."),
        ("PATCH", "/balloon/air", "Empty PATCH request."),
        ("PUT", "/floppy", "Empty PUT request."),
        ("PATCH", "/floppy", "Empty PATCH request."),
        ("PUT", "/machine-config", "Empty PUT request."),
        ("PATCH", "/vm", "Empty PATCH request."),
        ("DELETE", "/vm", "Invalid request method and/or path: DELETE vm."),
        ("DELETE", "/drives", "The ID cannot be empty."),
        ("DELETE", "/drives/a", BEFORE),
    ],
)
def test_what_a_request_without_a_body_is_refused_for(vmm: Vmm, method: str, path: str, fault: str) -> None:
    answer = vmm.request(method, path)
    assert (answer.status, answer.fault) == (400, fault)


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        ("GET", "GET request cannot have a body."),
        ("DELETE", "Empty Delete request."),
        ("PUT", "Invalid request method and/or path: PUT floppy."),
        ("PATCH", "Invalid request method and/or path: PATCH floppy."),
    ],
)
def test_an_unknown_path_with_a_body(vmm: Vmm, method: str, fault: str) -> None:
    assert vmm.request(method, "/floppy", {}).fault == fault


# A body that fits, for each endpoint that is not built yet.
LATER = [
    ("PUT", "/hotplug/memory", {"total_size_mib": 1024}),
]


@pytest.mark.parametrize(("method", "path", "body"), LATER)
def test_an_endpoint_of_later_work_says_so(vmm: Vmm, method: str, path: str, body: Any) -> None:
    answer = vmm.request(method, path, body)
    assert answer.status == 400
    assert answer.fault.startswith("Crackle does not support ")
    assert answer.fault.endswith(" yet.")


# The two schemas that, as in Firecracker, let unknown fields pass.
LENIENT = ("MetricsConfig", "BalloonHintingStart")
STRICT = [key for key, route in ROUTES.items() if route.body and route.body not in LENIENT]


@pytest.mark.parametrize(("method", "key"), STRICT)
def test_an_unknown_field_is_refused_everywhere(vmm: Vmm, method: str, key: str) -> None:
    path = f"/{key}" + ("/x" if ROUTES[method, key].id_field else "")
    assert vmm.request(method, path, {"no_such_field": 1}).fault.startswith(JSON_ERROR)


def test_a_vsock_device_is_configured_and_shown(vmm: Vmm, tmp_path) -> None:
    path = str(tmp_path / "v.sock")
    assert vmm.request("PUT", "/vsock", {"guest_cid": 3, "uds_path": "/tmp/other"}).status == 204
    assert vmm.request("PUT", "/vsock", {"vsock_id": "v", "guest_cid": 4, "uds_path": path}).status == 204
    assert vmm.request("GET", "/vm/config").json["vsock"] == {"guest_cid": 4, "uds_path": path}
    assert not os.path.exists(path)


@pytest.mark.parametrize(("cid", "path"), [(0, "v"), (2, "v"), (0xFFFFFFFF, "v"), (3, "")])
def test_what_firecracker_takes_for_a_vsock_device_is_taken(vmm: Vmm, cid: int, path: str, tmp_path) -> None:
    path = path and str(tmp_path / path)
    assert vmm.request("PUT", "/vsock", {"guest_cid": cid, "uds_path": path}).status == 204
    assert vmm.request("GET", "/vm/config").json["vsock"] == {"guest_cid": cid, "uds_path": path}
    assert ("reserved" if path else "no host program can connect") in vmm.log.read_text()


@pytest.mark.parametrize(
    ("cid", "path", "fault"),
    [
        (
            3,
            "/tmp/" + "x" * 103,
            "path must be shorter than SUN_LEN: it may have 107 bytes, and has 108: /tmp/xxx",
        ),
        (3, "/none/v", "No such file or directory (os error 2): /none/v"),
        (3, "/dev/null", "Address already in use (os error 98): /dev/null"),
        (3, "a\0b", "paths must not contain interior null bytes: 'a\\x00b'"),
    ],
)
def test_a_vsock_device_that_cannot_be_had_is_refused(vmm: Vmm, cid: int, path: str, fault: str) -> None:
    answer = vmm.request("PUT", "/vsock", {"guest_cid": cid, "uds_path": path})
    assert answer.status == 400
    problem = "Vsock config error: Cannot create backend for vsock device: Error binding to the host-side Unix socket: "
    assert answer.fault.startswith(problem + fault)
    assert vmm.request("GET", "/vm/config").json["vsock"] is None
