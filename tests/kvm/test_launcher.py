"""A guest started by crackle-launch: all is imported beforehand, and devices are opened where the launcher is."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from pathlib import Path

import pytest
from tests.kvm.conftest import PATIENCE, Client, Process, configuration

from support.launcher import LAUNCHER, ZygoteProcess, own_kib
from support.network import Namespace

pytestmark = pytest.mark.skipif(not LAUNCHER.exists(), reason="`make build` makes crackle-launch")

# What a child imports is told on its standard error.
RECORDING = """
import os, sys
from crackle.cli import vmm, zygote
from crackle.runtime.zygote import Zygote, listen
zygote.load()
def run(arguments, shell):
    sys.addaudithook(lambda event, given: event == "import" and os.write(2, given[0].encode() + b"\\n"))
    return vmm.run(arguments, shell)
Zygote(listen(sys.argv[1]), run).serve()
"""


def test_a_guest_with_every_device_starts_where_the_launcher_is(
    guests: Path, tmp_path: Path, namespace: Namespace
) -> None:
    tap = namespace.tap()
    drives = []
    for engine in ("Sync", "Async"):
        (tmp_path / engine).write_bytes(bytes(1 << 20))
        drives.append({"path_on_host": engine, "drive_id": engine, "io_engine": engine})
    config = configuration(guests / "idle.elf", "", drives, 64, 1)
    config["network-interfaces"] = [{"iface_id": "eth0", "host_dev_name": tap}]
    config["vsock"] = {"guest_cid": 3, "uds_path": "v.sock"}
    config["mmds-config"] = {"network_interfaces": ["eth0"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "script").write_text(RECORDING)
    zygote = ZygoteProcess(tmp_path / "zygote", str(tmp_path / "script"), str(tmp_path / "zygote"))
    process = subprocess.Popen(
        namespace.command(*zygote.command, "--no-api", "--config-file", "config.json", "--level", "Off"),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0]
        assert process.stdout.readline().startswith(b"idle")
        assert (tmp_path / "v.sock").exists()
        process.terminate()
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == -15
    finally:
        process.kill()
        process.communicate()
        assert zygote.end() == ""


def faults(child: int) -> int:
    """Page faults of the child that needed no disk (proc(5), stat 10)."""
    return int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[7])


def test_a_child_whose_guest_has_started_gives_memory_back_and_the_guest_goes_on(
    guests: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(configuration(guests / "count.elf", "cpus=2 tick=100", [], 64, 2))
    )
    zygote = ZygoteProcess(tmp_path / "zygote")
    process = subprocess.Popen(
        [*zygote.command, "--api-sock", "api", "--config-file", "config.json", "--level", "Off"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"count begins\n"
        (child,) = zygote.monitors()
        # Of the pages that it has had to copy, it has most no more.
        deadline = time.monotonic() + PATIENCE
        while own_kib(child) > 0.45 * 4 * faults(child):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # It may have been in the middle; it counts on, and its monitor still knows what it is doing.
        numbers = [int(process.stdout.readline().split()[1]) for _ in range(200)]
        assert numbers == list(range(numbers[0], numbers[0] + 200))
        api = Client(tmp_path / "api")
        for state in ("Paused", "Resumed", "Paused", "Resumed"):
            api.ask("PATCH", "/vm", {"state": state}, expect=204)
        assert process.stdout.readline().startswith(b"count ")
        process.terminate()
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == -15
    finally:
        process.kill()
        process.communicate()
        assert zygote.end() == ""


def kvm_descriptors(pid: int) -> list[str]:
    """Numbers and names of what is KVM's, whose machines the kernel does not count twice."""
    found = [(fd, os.readlink(f"/proc/{pid}/fd/{fd}")) for fd in os.listdir(f"/proc/{pid}/fd")]
    return sorted(f"{fd} {name}" for fd, name in found if "kvm" in name)


def spare_with_a_machine(zygote: ZygoteProcess) -> tuple[int, list[str]]:
    """The one spare of a zygote, once it has all that it makes ahead."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ValueError):
            (pid,) = zygote.children()
            found = kvm_descriptors(pid)
            if len(found) == 3:
                return pid, found
        time.sleep(0.01)
    raise TimeoutError("there is no spare with a machine")


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_spare_has_a_machine_before_its_launcher_comes_and_uses_it_where_it_fits(
    guests: Path, tmp_path: Path, vcpus: int
) -> None:
    zygote = ZygoteProcess(tmp_path / "zygote", spares=1)
    try:
        pid, before = spare_with_a_machine(zygote)
        # Its log would come between the guest's letters.
        process = Process(tmp_path, "--level", "Off", command=zygote.command)
        try:
            assert zygote.monitors() == {pid}
            assert kvm_descriptors(pid) == before
            process.boot(guests / "idle.elf", "", vcpu_count=vcpus, mem_size_mib=128)
            deadline = time.monotonic() + PATIENCE
            # One that does not fit is closed meanwhile.
            while "idle\n" not in process.text or len(kvm_descriptors(pid)) != 2 + vcpus:
                assert time.monotonic() < deadline, process.text
                process.read(0.01)
            assert (kvm_descriptors(pid) == before) is (vcpus == 1)
        finally:
            process.kill()
    finally:
        assert zygote.end() == ""


def test_a_spare_gives_its_machine_up_for_a_launcher_that_has_its_numbers(
    guests: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(configuration(guests / "idle.elf", "", [], 128, 1)))
    zygote = ZygoteProcess(tmp_path / "zygote", spares=1)
    try:
        pid, before = spare_with_a_machine(zygote)
        taken = max(int(each.split()[0]) for each in before)
        quiet = ["--no-api", "--config-file", "config.json", "--level", "Off"]
        script = f'exec {taken}<{tmp_path}/config.json; exec "$@"'
        process = subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", *zygote.command, *quiet],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            assert any(line == b"idle\n" for line in process.stdout)
            assert zygote.monitors() == {pid}
            assert os.readlink(f"/proc/{pid}/fd/{taken}") == str(tmp_path / "config.json")
            assert len(kvm_descriptors(pid)) == 3
            process.terminate()
            assert process.communicate(timeout=60)[1] == b""
        finally:
            process.kill()
            process.communicate()
    finally:
        assert zygote.end() == ""
