"""A microVM that runs: what it allows, what it is told, how it ends. Its machine only takes notes."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.api.conftest import Vmm

AFTER = "The requested operation is not supported after starting the microVM."


def action(vmm: Vmm, name: str) -> int:
    return vmm.request("PUT", "/actions", {"action_type": name}).status


def state(vmm: Vmm, name: str) -> int:
    return vmm.request("PATCH", "/vm", {"state": name}).status


def test_start_pause_and_resume(started: Vmm, told: Callable[[], list[str]]) -> None:
    shown = [started.request("GET", "/").json["state"]]
    for name in ("Paused", "Paused", "Resumed", "Resumed", "Paused"):
        assert state(started, name) == 204
        shown.append(started.request("GET", "/").json["state"])
    assert shown == ["Running", "Paused", "Paused", "Running", "Running", "Paused"]
    assert told() == ["start", "pause", "resume", "pause"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64}),
        ("PATCH", "/machine-config", {"vcpu_count": 1}),
        ("PUT", "/boot-source", {"kernel_image_path": "/dev/null"}),
        ("PUT", "/logger", {"level": "Error"}),
        ("PUT", "/metrics", {"metrics_path": "/tmp/x"}),
        ("PUT", "/serial", {}),
        ("PUT", "/actions", {"action_type": "InstanceStart"}),
        ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "/tmp/v"}),
        ("PUT", "/snapshot/load", {"snapshot_path": "s", "mem_file_path": "m"}),
    ],
)
def test_what_is_configured_before_boot_is_refused_after(
    started: Vmm, method: str, path: str, body: dict[str, Any]
) -> None:
    before = started.request("GET", "/vm/config").body
    for name in ("Resumed", "Paused"):
        assert state(started, name) == 204
        answer = started.request(method, path, body)
        assert (answer.status, answer.fault) == (400, AFTER)
    assert started.request("GET", "/vm/config").body == before


def test_drives_come_and_go_while_the_guest_runs(started: Vmm, told: Callable[[], list[str]]) -> None:
    drive = {"drive_id": "x", "is_root_device": False, "path_on_host": "/dev/null"}
    for _ in range(2):
        assert started.request("PUT", "/drives/x", drive).status == 204
        answer = started.request("PUT", "/drives/x", drive)
        assert answer.status == 400
        assert answer.fault.endswith(
            "The drive 'x' is there already. Give the new one another drive_id, or PATCH this one."
        )
        shown = started.request("GET", "/vm/config").json["drives"]
        assert [each["drive_id"] for each in shown] == ["root", "x"]
        assert started.request("DELETE", "/drives/x").status == 204
        assert [each["drive_id"] for each in started.request("GET", "/vm/config").json["drives"]] == ["root"]
    assert told() == ["start", *(["attach block x", "detach block x"] * 2)]
    for path, words in (
        ("/drives/x", "There is no drive 'x'."),
        ("/drives/root", "which a guest keeps as long as it runs."),
        ("/network-interfaces/x", "There is no network interface 'x'."),
    ):
        answer = started.request("DELETE", path)
        assert answer.status == 400
        assert answer.fault.endswith(words)


NOT_FOUND = "Failed perform action on device: Device not found"


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("GET", "/balloon", None, "Internal VMM error"),
        ("GET", "/balloon/statistics", None, "Internal VMM error"),
        ("GET", "/balloon/hinting/status", None, "Balloon update error"),
        ("GET", "/hotplug/memory", None, "Internal VMM error"),
        ("PATCH", "/balloon", {"amount_mib": 1}, "Balloon update error"),
        ("PATCH", "/balloon/statistics", {"stats_polling_interval_s": 1}, "Balloon update error"),
        ("PATCH", "/balloon/hinting/start", None, "Balloon update error"),
        ("PATCH", "/balloon/hinting/stop", None, "Balloon update error"),
        ("PATCH", "/hotplug/memory", {"requested_size_mib": 2}, "Memory hotplug update error"),
        ("PATCH", "/pmem/x", {"id": "x"}, "Pmem config error: Unable to patch the pmem device"),
    ],
)
def test_a_device_that_there_is_not_is_not_found(
    started: Vmm, method: str, path: str, body: dict[str, Any] | None, words: str
) -> None:
    answer = started.request(method, path, body)
    assert answer.status == 400
    assert answer.fault.startswith(f"{words}: {NOT_FOUND}")


def test_a_drive_gets_another_file(started: Vmm, tmp_path: Path, told: Callable[[], list[str]]) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(512))
    assert (
        started.request("PATCH", "/drives/root", {"drive_id": "root", "path_on_host": str(other)}).status
        == 204
    )
    assert told()[-1] == f"update block root {other}"
    assert started.request("GET", "/vm/config").json["drives"][0]["path_on_host"] == str(other)


@pytest.mark.parametrize(
    ("drive", "body", "fault"),
    [
        ("none", {"path_on_host": "/dev/null"}, "There is no drive 'none'"),
        (
            "root",
            {},
            "Running method expected different backend. Please verify the request arguments. There is",
        ),
        ("root", {"path_on_host": "/none"}, "No such file or directory (os error 2) /none"),
        ("root", {"path_on_host": "refused"}, "this file is refused"),
        (
            "root",
            {"rate_limiter": {"ops": {"size": 1, "refill_time": 1 << 64}}},
            "`refill_time` must be an `int` <= 18446744073709551615 (given: 18446744073709551616)",
        ),
    ],
)
def test_a_drive_keeps_its_file_when_the_other_cannot_be_used(
    started: Vmm, tmp_path: Path, drive: str, body: dict[str, Any], fault: str
) -> None:
    (tmp_path / "refused").write_bytes(bytes(512))
    if body.get("path_on_host") == "refused":
        body = {"path_on_host": str(tmp_path / "refused")}
    before = started.request("GET", "/vm/config").body
    answer = started.request("PATCH", f"/drives/{drive}", {"drive_id": drive, **body})
    assert answer.status == 400
    assert fault in answer.fault
    assert started.request("GET", "/vm/config").body == before


def test_a_start_that_fails_can_be_tried_again(vmm: Vmm, kernel: Path) -> None:
    for boot_args, status in (("unbootable", 400), ("good", 204)):
        source = {"kernel_image_path": str(kernel), "boot_args": boot_args}
        assert vmm.request("PUT", "/boot-source", source).status == 204
        answer = vmm.request("PUT", "/actions", {"action_type": "InstanceStart"})
        assert answer.status == status
        if status == 400:
            assert answer.fault == "Start microvm error: this kernel does not boot"
            assert vmm.request("GET", "/").json["state"] == "Not started"
    assert vmm.request("GET", "/").json["state"] == "Running"


def test_a_guest_that_ends_ends_the_process_with_success(started: Vmm, told: Callable[[], list[str]]) -> None:
    assert action(started, "SendCtrlAltDel") == 204
    assert started.wait() == 0
    assert told() == ["start", "ctrl-alt-del", "stop"]
    assert "exit_code=0" in started.log.read_text()
    assert os.path.exists(started.socket), "the socket file stays, as Firecracker's does"


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGHUP, 156),
        (signal.SIGXCPU, 154),
        (signal.SIGXFSZ, 151),
        (signal.SIGSYS, 148),
        (signal.SIGTERM, -signal.SIGTERM),
        (signal.SIGINT, -signal.SIGINT),
    ],
)
def test_a_signal_ends_the_process_in_order(
    started: Vmm, told: Callable[[], list[str]], number: int, status: int
) -> None:
    assert state(started, "Paused") == 204
    started.process.send_signal(number)
    assert started.wait() == status
    assert told()[-1] == "stop"
    assert f"intercepting signal {int(number)}" in started.log.read_text()


def test_a_broken_pipe_ends_nothing(started: Vmm) -> None:
    started.process.send_signal(signal.SIGPIPE)
    assert started.request("GET", "/").status == 200
