"""crackle-vmm's arguments and configuration file, and the status it ends with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import pytest

from crackle.version import FIRECRACKER_VERSION, VERSION
from support.launcher import REAL

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.api.conftest import Vmm

    Run = Callable[..., subprocess.CompletedProcess[str]]

LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9} \[[^]]*\] ")


def test_help_and_version(run_to_end: Run) -> None:
    version = run_to_end("--version")
    assert version.returncode == 0
    assert version.stdout.split("\n") == [
        f"Firecracker v{FIRECRACKER_VERSION}",
        "",
        f"Crackle v{VERSION}",
        "",
    ]
    told = run_to_end("--help", "--nonsense")
    assert told.returncode == 0
    assert "--api-sock <path>" in told.stdout


def test_metadata_that_is_no_json_is_told_of_in_a_sentence(run_to_end: Run, tmp_path: Path) -> None:
    # The socket is there by then, and stays behind.
    done = run_to_end("--metadata", "/dev/null", "--api-sock", str(tmp_path / "socket"))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: MMDS error: metadata provided not valid json:")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        (
            [],
            "RunWithApiError error: Failed to build MicroVM: Populating MMDS from file failed: The MMDS patch request",
        ),
        (
            ["--no-api", "--config-file", "vm.json"],
            "RunWithoutApiError error: Failed to build MicroVM from Json: Configuration for VMM from one single json "
            "failed: MMDS error: The MMDS patch request doesn't fit",
        ),
    ],
)
def test_metadata_that_do_not_fit_are_told_of_in_firecrackers_words(
    run_to_end: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vm.json").write_text('{"boot-source": {"kernel_image_path": "vm.json"}, "drives": []}')
    (tmp_path / "metadata").write_text(json.dumps({"a": "x" * 100}))
    done = run_to_end("--metadata", "metadata", "--mmds-size-limit", "50", "--api-sock", "s", *configured)
    assert done.returncode == 1
    assert message in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--nonsense"], 153, "Found argument 'nonsense' which wasn't expected"),
        (["--id"], 153, "The argument 'id' requires a value, but none was supplied."),
        (["--no-api"], 153, "Argument 'config-file' required, but not found."),
        (["--id", "a_b"], 153, "Invalid instance ID: invalid character (_) at position 1."),
        (
            ["--level", "loud"],
            152,
            "Invalid value for logger level: Failed to parse string to level filter: 'loud'",
        ),
        (
            ["--log-path", "/none/log"],
            1,
            "Could not initialize logger: Failed to open target file: No such file",
        ),
        (
            ["--metrics-path", "/none/m"],
            1,
            "Could not initialize metrics: Cannot initialize the metrics system due to bad user input: No such",
        ),
        (
            ["--config-file", "/none.json"],
            1,
            "Unable to open or read from the configuration file: No such file or directory",
        ),
        (["--api-sock", "/none/socket"], 1, "Failed to bind and run the HTTP server: IO error: No such file"),
        (
            ["--api-sock", "x" * 200],
            1,
            "Failed to bind and run the HTTP server: IO error: AF_UNIX path too long: xxx",
        ),
        (["--enable-pci"], 1, "Argument 'enable-pci': Crackle does not support PCI yet."),
        (
            ["--metadata", "/none"],
            1,
            "Unable to open or read from the mmds content file: No such file or directory",
        ),
        (
            ["--describe-snapshot", "/none"],
            1,
            "When printing Snapshot Data format: Unable to open snapshot state file: Failed to open",
        ),
    ],
)
def test_a_bad_command_line_ends_with_one_sentence(
    run_to_end: Run, arguments: list[str], status: int, message: str
) -> None:
    done = run_to_end(*arguments)
    assert done.returncode == status
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert message in done.stdout, "the log has it too"
    assert f"exit_code={status}" in done.stdout
    assert all(LOG_LINE.match(line) for line in done.stdout.splitlines())


def test_a_socket_that_exists_is_left_alone(run_to_end: Run, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "taken"))
        other.listen()
        done = run_to_end("--api-sock", "taken")
        assert done.returncode == 1
        assert "Failed to open the API socket at: taken. Check that it is not already used." in done.stderr
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "taken"))


def test_a_file_in_the_place_of_the_socket_is_left_alone(run_to_end: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert run_to_end("--api-sock", "file").returncode == 1
    assert (tmp_path / "file").read_text() == "precious"


def test_an_interrupt_during_start_up_shows_no_traceback() -> None:
    script = (
        "import os, signal; import crackle.cli.vmm as vmm\n"
        "vmm._serve = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "vmm.run([])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


def test_the_id_is_shown(start: Callable[..., Vmm]) -> None:
    vmm = start("--id", "vm-17", "--show-level", fake=True)
    assert vmm.request("GET", "/").json["id"] == "vm-17"
    assert f"[vm-17:main:INFO] Running Crackle v{VERSION}" in vmm.log.read_text()


def test_switches_that_change_nothing_yet_are_accepted(start: Callable[..., Vmm]) -> None:
    arguments = ["--no-seccomp", "--boot-timer", "--start-time-us", "1", "--start-time-cpu-us", "1"]
    assert (
        start(*arguments, "--parent-cpu-time-us", "2", "--mmds-size-limit", "9", fake=True)
        .request("GET", "/")
        .status
        == 200
    )


def test_the_log_goes_to_its_file_with_level_and_origin(start: Callable[..., Vmm], tmp_path: Path) -> None:
    log = tmp_path / "log"
    vmm = start("--log-path", str(log), "--level", "Debug", "--show-level", "--show-log-origin", fake=True)
    vmm.request("GET", "/floppy")
    assert vmm.log.read_text() == ""
    lines = log.read_text().splitlines()
    assert any(
        re.search(r"\[anonymous-instance:main:ERROR:.*server\.py:\d+\] Invalid request", line)
        for line in lines
    )


# Configuration files


@pytest.fixture
def config(kernel: Path, disk: Path) -> dict[str, Any]:
    return {
        "boot-source": {"kernel_image_path": str(kernel), "boot_args": "good"},
        "drives": [{"drive_id": "root", "is_root_device": True, "path_on_host": str(disk)}],
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 64},
    }


def write(directory: Path, config: Any) -> str:
    path = directory / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def test_a_configuration_file_starts_the_microvm_and_the_api_serves_it(
    start: Callable[..., Vmm], tmp_path: Path, config: dict[str, Any], told: Callable[[], list[str]]
) -> None:
    vmm = start("--config-file", write(tmp_path, config), fake=True)
    assert vmm.request("GET", "/").json["state"] == "Running"
    assert vmm.request("GET", "/machine-config").json["vcpu_count"] == 2
    assert vmm.request("GET", "/vm/config").json["drives"][0]["drive_id"] == "root"
    assert told() == ["start"]


@pytest.mark.parametrize("switch", [[], ["--exit-on-failed-load"]])
def test_a_failed_load_ends_the_process_where_that_is_asked_for(
    start: Callable[..., Vmm], switch: list[str]
) -> None:
    vmm = start(*switch, fake=True)
    load = {"snapshot_path": "none", "mem_backend": {"backend_path": "none", "backend_type": "File"}}
    malformed = vmm.request("PUT", "/snapshot/load", {"snapshot_path": "none"})
    assert malformed.status == 400
    answer = vmm.request("PUT", "/snapshot/load", load)
    assert answer.fault.startswith("Load snapshot error: Failed to restore from snapshot")
    if switch:
        assert vmm.wait() == 1
        assert "Loading snapshot failed" in vmm.log.read_text()
    else:
        assert vmm.request("GET", "/").json["state"] == "Not started"


def test_what_the_api_shows_is_a_configuration_file(
    start: Callable[..., Vmm], started: Vmm, tmp_path: Path
) -> None:
    shown = started.request("GET", "/vm/config")
    started.end()
    (tmp_path / "api.socket").unlink()
    vmm = start("--config-file", write(tmp_path, shown.body.decode()), fake=True)
    assert vmm.request("GET", "/vm/config").body == shown.body


@pytest.mark.parametrize("api", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boot-source": None}, "Invalid JSON: Expected `object`, got `null`, at `$.boot-source`"),
        (
            {"boot-source": {"kernel_image_path": "/none"}},
            "Boot source error: The kernel file cannot be opened",
        ),
        ({"drives": [{"drive_id": "x", "is_root_device": 1}]}, "Expected `bool`, got `int`, at `$.drives[0]"),
        (
            {"machine-config": {"vcpu_count": 33, "mem_size_mib": 64}},
            "Failed to build MicroVM from Json: Configuration for VMM from one single json failed: "
            "VM config error: The number of vCPUs",
        ),
        ({"machine-config": {"cpus": 1}}, "unknown field `cpus`"),
        ({"logger": {"log_path": "/none/log"}}, "Logger error: Failed to open target file"),
        ({"metrics": {"metrics_path": "/none/m"}}, "Metrics error: Cannot initialize the metrics system"),
        ({"memory-hotplug": {"total_size_mib": 1024}}, "Crackle does not support memory hotplug yet."),
        (
            {"cpu-config": "/none"},
            "The CPU template cannot be read: No such file or directory (os error 2): /none",
        ),
        ({"cpu-config": {"kvm_capabilities": ["x"]}}, "Failed to parse string [x] as a kvm capability"),
        ({"vsock": {"guest_cid": 3, "uds_path": "/none/v"}}, "Vsock device error: Cannot create backend"),
        (
            {"boot-source": {"kernel_image_path": "/dev/null", "boot_args": "unbootable"}},
            "Start microvm error: this",
        ),
    ],
)
def test_a_configuration_file_that_cannot_be_honoured_ends_the_process(
    run_to_end: Run, tmp_path: Path, config: dict[str, Any], change: dict[str, Any], message: str, api: bool
) -> None:
    door = ["--api-sock", "s"] if api else ["--no-api"]
    done = run_to_end(*door, "--config-file", write(tmp_path, {**config, **change}))
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{", "no json", "[]", '{"drives": []}'])
def test_a_configuration_file_that_is_none(run_to_end: Run, tmp_path: Path, text: str) -> None:
    done = run_to_end("--no-api", "--config-file", write(tmp_path, text))
    assert done.returncode == 1
    assert "Invalid JSON: " in done.stderr


def test_two_root_drives_in_a_configuration_file(
    run_to_end: Run, tmp_path: Path, config: dict[str, Any]
) -> None:
    config["drives"].append({**config["drives"][0], "drive_id": "other"})
    done = run_to_end("--no-api", "--config-file", write(tmp_path, config))
    assert done.returncode == 1
    assert "A root block device already exists!" in done.stderr


def test_a_host_without_kvm_is_told_of_in_one_sentence(tmp_path: Path, config: dict[str, Any]) -> None:
    # A process that may open nothing new has no /dev/kvm either.
    script = (
        "import os, sys; import crackle.vmm.shell as shell\n"
        "from crackle.kvm import Kvm\n"
        "shell.Kvm = lambda: Kvm('/none/kvm')\n"
        "from crackle.cli.vmm import run; sys.exit(run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--no-api", "--config-file", write(tmp_path, config)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert "Start microvm error: " in done.stderr
    assert "/none/kvm" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_standard_streams_that_are_closed_become_the_null_device(tmp_path: Path) -> None:
    path = str(tmp_path / "api")
    shell = 'exec "$@" <&- >&- 2>&-'
    process = subprocess.Popen(["sh", "-c", shell, "sh", *REAL, "--api-sock", path])
    try:
        deadline = time.monotonic() + 30
        while not os.path.exists(path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for fd in range(3):
            assert os.readlink(f"/proc/{process.pid}/fd/{fd}") == "/dev/null"
    finally:
        process.kill()
        process.wait()


def test_the_socket_appears_when_it_can_be_connected_to(tmp_path: Path) -> None:
    path = tmp_path / "api.socket"
    process = subprocess.Popen(
        [*REAL, "--api-sock", str(path), "--level", "Off"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        while not path.exists():
            assert process.poll() is None
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path))
        client.close()
        assert os.listdir(tmp_path) == ["api.socket"]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("length", [100, 107])
def test_the_socket_may_have_the_longest_name_there_is(length: int) -> None:
    directory = tempfile.mkdtemp(dir="/tmp")
    path = f"{directory}/{'s' * (length - len(directory) - 1)}"
    process = subprocess.Popen(
        [*REAL, "--api-sock", path, "--level", "Off"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        while not os.path.exists(path):
            assert process.poll() is None
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        client.close()
        assert os.listdir(directory) == [os.path.basename(path)]
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)


def test_a_socket_that_cannot_be_had_leaves_nothing_behind(run_to_end: Run, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    for name, message in (
        ("taken", "Failed to open the API socket at: taken. Check that it is not already used."),
        (
            "no/where",
            "Failed to bind and run the HTTP server: IO error: No such file or directory (os error 2)",
        ),
        ("s" * 200, "Failed to bind and run the HTTP server: IO error: "),
    ):
        done = run_to_end("--api-sock", name)
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    assert os.listdir(tmp_path) == ["taken"]


def test_what_is_wrong_with_a_file_is_told_with_its_place_and_name(run_to_end: Run, tmp_path: Path) -> None:
    config = tmp_path / "vm.json"
    config.write_text('{"drives": [],\n "boot-source": {"kernel_image_path": 5}}')
    done = run_to_end("--no-api", "--config-file", "vm.json")
    assert done.returncode == 1
    assert "Invalid JSON: Expected `str`, got `int`" in done.stderr
    assert done.stderr.endswith("at line 2 column 39: vm.json\n")
    config.write_text('{"key": [1,\n}')
    done = run_to_end("--metadata", "vm.json", "--api-sock", "socket")
    assert done.returncode == 1
    assert done.stderr.endswith("at line 2 column 1: vm.json\n")


def test_a_section_that_nobody_knows_is_named_in_the_log(start: Callable[..., Vmm], kernel: Path) -> None:
    config = kernel.with_name("vm.json")
    config.write_text(
        json.dumps({"boot-source": {"kernel_image_path": str(kernel)}, "drives": [], "gpu": {"id": 1}})
    )
    vmm = start("--config-file", str(config), fake=True)
    assert vmm.request("GET", "/").json["state"] == "Running"
    assert "The configuration file's section `gpu` is unknown, and ignored." in vmm.log.read_text()


def test_an_option_that_would_do_nothing_is_refused(run_to_end: Run) -> None:
    done = run_to_end("--enable-pci", "--api-sock", "socket")
    assert done.returncode == 1
    assert "Argument 'enable-pci': Crackle does not support PCI yet." in done.stderr


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "Filter file open error: No such file or directory"),
        (b"\x03\0\0\0vmm", "is no JSON. A policy is given as seccompiler-bin's input"),
        (b"{}", "Missing thread category: vmm"),
        (b'{"vmm": 1}', "Filter deserialization failed: "),
    ],
)
def test_a_seccomp_policy_that_means_nothing_is_refused(
    run_to_end: Run, tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "filter"
    if content is not None:
        path.write_bytes(content)
    done = run_to_end("--seccomp-filter", str(path), "--api-sock", "socket")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Seccomp error: ")
    assert problem in done.stderr
