"""Log and metrics of a real process: what is counted, when it is written, that a full pipe is no obstacle."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from crackle.telemetry.names import SECTIONS
from support.launcher import REAL

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.api.conftest import Vmm


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "metrics"


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start_guest(vmm: Vmm, kernel: Path) -> None:
    assert vmm.request("PUT", "/boot-source", {"kernel_image_path": str(kernel)}).status == 204
    assert vmm.request("PUT", "/actions", {"action_type": "InstanceStart"}).status == 204


def flush(vmm: Vmm) -> int:
    return vmm.request("PUT", "/actions", {"action_type": "FlushMetrics"}).status


def test_metrics_are_written_at_start_on_demand_and_at_the_end(vmm: Vmm, kernel: Path, metrics: Path) -> None:
    assert vmm.request("PUT", "/metrics", {"metrics_path": str(metrics)}).status == 204
    assert metrics.read_text() == ""
    start_guest(vmm, kernel)
    assert len(written(metrics)) == 1
    assert flush(vmm) == 204
    assert len(written(metrics)) == 2
    vmm.process.send_signal(signal.SIGHUP)
    vmm.wait()
    assert len(written(metrics)) == 3
    assert written(metrics)[-1]["signals"]["sighup"] == 1


def test_requests_and_their_failures_are_counted_since_the_last_line(
    vmm: Vmm, kernel: Path, metrics: Path
) -> None:
    assert vmm.request("PUT", "/metrics", {"metrics_path": str(metrics)}).status == 204
    vmm.request("GET", "/version")
    vmm.request("PUT", "/machine-config", {"vcpu_count": 0, "mem_size_mib": 1})
    vmm.request("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 1})
    vmm.request("PUT", "/machine-config", b"nonsense")
    vmm.request("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 1, "cpu_template": "None"})
    start_guest(vmm, kernel)
    flush(vmm)
    first, second = written(metrics)
    assert first["get_api_requests"]["vmm_version_count"] == 1
    assert first["put_api_requests"]["machine_cfg_count"] == 4
    assert first["put_api_requests"]["machine_cfg_fails"] == 2
    assert first["put_api_requests"]["metrics_count"] == 1
    assert first["deprecated_api"]["deprecated_http_api_calls"] == 1
    assert first["put_api_requests"]["actions_count"] == 1
    assert second["put_api_requests"]["machine_cfg_count"] == 0
    assert second["put_api_requests"]["actions_count"] == 1


def test_devices_and_latencies_are_reported(start: Callable[..., Vmm], kernel: Path, metrics: Path) -> None:
    vmm = start("--metrics-path", str(metrics), "--id", "vm-9", fake=True)
    start_guest(vmm, kernel)
    for state in ("Paused", "Resumed"):
        assert vmm.request("PATCH", "/vm", {"state": state}).status == 204
    flush(vmm)
    first, second = written(metrics)
    # The fake drive reads 10 more each time it is asked.
    assert [line["block_root"]["read_count"] for line in (first, second)] == [10, 10]
    assert [line["block"]["read_count"] for line in (first, second)] == [10, 10]
    latencies = second["latencies_us"]
    assert latencies["pause_vm"] >= latencies["vmm_pause_vm"] >= 0
    assert latencies["resume_vm"] > 0


def test_the_start_up_time_is_reported(start: Callable[..., Vmm], kernel: Path, metrics: Path) -> None:
    now = time.monotonic_ns() // 1000
    vmm = start(
        *("--metrics-path", str(metrics), "--start-time-us", str(now)),
        *("--start-time-cpu-us", "0", "--parent-cpu-time-us", "1000000"),
        fake=True,
    )
    start_guest(vmm, kernel)
    (line,) = written(metrics)
    assert 0 < line["api_server"]["process_startup_time_us"] < 20_000_000
    assert line["api_server"]["process_startup_time_cpu_us"] > 1_000_000


@pytest.mark.parametrize("switch", [[], ["--own-metrics"]])
def test_only_what_firecracker_counts_is_written_unless_more_is_asked_for(
    start: Callable[..., Vmm], kernel: Path, metrics: Path, switch: list[str]
) -> None:
    vmm = start("--metrics-path", str(metrics), *switch, fake=True)
    start_guest(vmm, kernel)
    (line,) = written(metrics)
    assert set(line) == {"utc_timestamp_ms", *SECTIONS, "block_root"}
    for name, section in line.items():
        if name == "utc_timestamp_ms":
            continue
        names = SECTIONS["block" if name == "block_root" else name].split()
        assert [metric for metric in section if metric in names] == names
        more = set(section) - set(names)
        assert more == ({"of_our_own"} if switch and name.startswith("block") else set()), name


def test_id_and_properties_are_written_on_request(vmm: Vmm, kernel: Path, metrics: Path) -> None:
    body = {"metrics_path": str(metrics), "emit_id": True, "properties": {"zone": "b"}}
    assert vmm.request("PUT", "/metrics", body).status == 204
    start_guest(vmm, kernel)
    (line,) = written(metrics)
    assert (line["id"], line["properties"]) == ("anonymous-instance", {"zone": "b"})


def full_pipe(path: Path) -> int:
    """A named pipe that holds nothing more, and its reader."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, b"x" * 4096)
    os.close(writer)
    return reader


def test_a_full_metrics_pipe_fails_the_flush_and_nothing_else(vmm: Vmm, kernel: Path, metrics: Path) -> None:
    reader = full_pipe(metrics)
    assert vmm.request("PUT", "/metrics", {"metrics_path": str(metrics)}).status == 204
    start_guest(vmm, kernel)
    assert flush(vmm) == 400
    assert vmm.request("GET", "/").json["state"] == "Running"
    assert os.read(reader, 65536) == b"x" * 4096
    assert flush(vmm) == 204
    # A pipe this small takes a line in two parts, the second with a later flush.
    text = b""
    while b"\n" not in text:
        try:
            text += os.read(reader, 65536)
        except BlockingIOError:
            flush(vmm)
    assert json.loads(text.partition(b"\n")[0])["logger"]["missed_metrics_count"] == 2


def test_a_full_log_pipe_stops_nothing_and_is_counted(
    start: Callable[..., Vmm], tmp_path: Path, kernel: Path, metrics: Path
) -> None:
    reader = full_pipe(tmp_path / "log")
    vmm = start("--log-path", str(tmp_path / "log"), "--metrics-path", str(metrics), fake=True)
    for _ in range(50):
        assert vmm.request("GET", "/").status == 200
    start_guest(vmm, kernel)
    (line,) = written(metrics)
    assert line["logger"]["missed_log_count"] >= 100
    os.read(reader, 65536)
    vmm.request("GET", "/version")
    assert b"/version" in os.read(reader, 65536)


def test_a_full_standard_output_stops_nothing(tmp_path: Path) -> None:
    from_guest, stdout = os.pipe()
    fcntl.fcntl(stdout, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(
        [*REAL, "--api-sock", str(tmp_path / "s")],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
    )
    try:
        client = _connect(tmp_path / "s")
        for _ in range(200):
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
    finally:
        process.kill()
        process.wait()
        os.close(stdout)
        os.close(from_guest)


def _connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    deadline = time.monotonic() + 20
    while True:
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            return client


def test_the_log_tells_requests_and_answers_but_no_secrets(start: Callable[..., Vmm], tmp_path: Path) -> None:
    log = tmp_path / "log"
    vmm = start("--log-path", str(log), fake=True)
    vmm.request("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64})
    vmm.request("PUT", "/mmds", {"password": "hunter2"})
    text = log.read_text()
    assert r'Put request on "/machine-config" with body "{\"vcpu_count\": 1, ' in text
    assert "Status code: 204 No Content" in text
    assert 'Put request on "/mmds".' in text
    assert "hunter2" not in text


def test_the_logger_can_be_set_over_the_api(vmm: Vmm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert (
        vmm.request("PUT", "/logger", {"log_path": str(log), "level": "Error", "show_level": True}).status
        == 204
    )
    vmm.request("GET", "/")
    vmm.request("GET", "/floppy")
    (line,) = log.read_text().splitlines()
    assert ":ERROR] Invalid request method and/or path: GET floppy." in line


def test_no_body_breaks_the_log_into_lines(vmm: Vmm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    vmm.request("PUT", "/logger", {"log_path": str(log)})
    before = len(log.read_text().splitlines())
    vmm.request("PUT", "/machine-config", b'{\n"vcpu_count"\n:\r1}\x1b[31m')
    assert len(log.read_text().splitlines()) == before + 2
    assert "\x1b" not in log.read_text()
