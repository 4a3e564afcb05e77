"""`crackle run` with its options, on bare-metal guests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crackle import MicroVM
from crackle.cli import boot
from crackle.errors import CrackleError, GuestError
from crackle.runtime.loop import Loop
from crackle.vmm import console, probe
from crackle.vmm.silence import Silence
from support.mounts import with_mounts

COMMAND = (sys.executable, "-m", "crackle.cli.main", "run")


def test_kernel_and_root_disk_are_the_arguments(guests: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    command = [*COMMAND, guests / "hello.elf", tmp_path / "disk", "--memory", "32M", "-a", "more"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_api_is_served_as_well_and_its_socket_goes_with_the_guest(guests: Path, tmp_path: Path) -> None:
    config = {
        "boot-source": {"kernel_image_path": os.fspath(guests / "idle.elf"), "boot_args": "first"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
        "drives": [],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "api.sock"
    vsock = ["--vsock", tmp_path / "v.sock", "--entropy", "--balloon", "3"]
    command = [
        *COMMAND,
        "--config",
        tmp_path / "config.json",
        "--api-sock",
        path,
        "--append",
        "second",
        *vsock,
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        client = http.client.HTTPConnection("localhost")
        client.sock = socket.socket(socket.AF_UNIX)
        client.sock.settimeout(30)
        deadline = time.monotonic() + 60
        while client.sock.connect_ex(os.fspath(path)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        client.request("GET", "/vm/config")
        told = json.loads(client.getresponse().read())
        assert told["boot-source"]["boot_args"] == "first second"
        assert told["machine-config"]["mem_size_mib"] == 64
        assert told["balloon"]["amount_mib"] == 3
        assert told["entropy"] == {"rate_limiter": None}
        assert told["vsock"]["uds_path"] == os.fspath(tmp_path / "v.sock")
        client.request("PATCH", "/vm", json.dumps({"state": "Paused"}))
        assert client.getresponse().status == 204
        client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert not path.exists()


def attend(vm: MicroVM) -> None:
    loop = Loop()
    loop.call_later(1, loop.stop)
    with boot.attending(None, vm, loop):
        loop.run()
    loop.close()


def test_a_guest_that_fell_silent_is_told_of_where_kvm_runs_no_linux(
    guests: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Silence, "PERIOD_S", 0.3)
    monkeypatch.setattr(probe, "why_no_linux", lambda: "This host's KVM is to blame.")
    with MicroVM(guests / "idle.elf", memory=32, console=(-1, -1)) as vm:
        attend(vm)
    assert "the guest has said nothing for 0.3 s. This host's KVM is to blame." in capfd.readouterr().err
    monkeypatch.setattr(probe, "why_no_linux", lambda: None)
    with MicroVM(guests / "idle.elf", memory=32, console=(-1, -1)) as vm:
        attend(vm)
    assert capfd.readouterr().err == ""


def test_what_fails_where_kvm_runs_no_linux_says_so_first(
    guests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "why_no_linux", lambda: "This host's KVM is to blame.")
    with (
        MicroVM(guests / "faults.elf", memory=32, boot_args="f=triple") as vm,
        pytest.raises(GuestError, match=r"^This host.s KVM is to blame\. vCPU 0: .*rip"),
    ):
        vm.wait(60)


def test_waiting_in_vain_names_the_host_that_is_to_blame(
    guests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_LONG", 0.2)
    monkeypatch.setattr(probe, "why_no_linux", lambda: "This host's KVM is to blame.")
    with (
        MicroVM(guests / "idle.elf", memory=32) as vm,
        pytest.raises(CrackleError, match=r"nothing in 0\.2 s\. This host's KVM is to blame\."),
    ):
        vm.console.expect("login", 0.2)


@pytest.mark.parametrize("door", ["run", "vmm", "library"])
def test_without_a_kvm_every_door_says_what_to_do(guests: Path, tmp_path: Path, door: str) -> None:
    kernel = guests / "hello.elf"
    config = {"boot-source": {"kernel_image_path": os.fspath(kernel)}, "drives": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = f"from crackle import MicroVM\nMicroVM({os.fspath(kernel)!r}).start()"
    command = {
        "run": [*COMMAND, kernel],
        "vmm": [
            sys.executable,
            "-m",
            "crackle.cli.vmm",
            "--no-api",
            "--config-file",
            tmp_path / "config.json",
        ],
        "library": [sys.executable, "-c", program],
    }[door]
    done = subprocess.run(
        [*with_mounts("mount --bind /dev/null /dev/kvm"), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode
    assert "`crackle doctor` tells more; tools/emuhost is a host that has a KVM" in done.stdout
