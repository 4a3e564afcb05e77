"""A Linux guest's disks, and what it means to be paused."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

import pytest
from tests.linux.conftest import BOOT_ARGS, Guest

from crackle import ConfigError

Boot = Callable[..., Guest]
MIB = 1 << 20


def disk(path: Path, size: int = 8 * MIB, content: bytes = b"") -> Path:
    path.write_bytes(content)
    os.truncate(path, size)
    return path


def test_what_the_guest_writes_is_in_the_file_and_what_is_in_the_file_the_guest_reads(
    boot: Boot, rootfs: Path, tmp_path: Path
) -> None:
    content = os.urandom(8 * MIB)
    source, target = disk(tmp_path / "source", content=content), disk(tmp_path / "target")
    guest = boot(rootfs=rootfs, drives=[source, target]).wait_shell()
    assert guest.sh("sha256sum < /dev/vdb").split()[0] == hashlib.sha256(content).hexdigest()
    guest.sh("dd if=/dev/vdb of=/dev/vdc bs=64k && sync")
    assert target.read_bytes() == content
    counters = guest.vm.metrics()["block_drive1"]
    assert counters["write_bytes"] == 8 * MIB
    assert counters["execute_fails"] == counters["invalid_reqs_count"] == 0


def test_a_file_system_survives(boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs).wait_shell()
    guest.sh(
        "mkdir /made && for i in $(seq 100); do echo $i > /made/$i; done; cp /data/payload /made/copy; sync"
    )
    guest.console.write("reboot -f\n")
    guest.vm.wait(60)
    guest.vm.stop()
    checked = subprocess.run(["/sbin/e2fsck", "-f", "-n", str(rootfs)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    again = boot(rootfs=rootfs).wait_shell()
    assert again.sh("ls /made | wc -l") == "101"
    assert again.sh("cmp /data/payload /made/copy && echo same") == "same"


def test_the_disks_serial_number_tells_the_backing_file(boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs).wait_shell()
    status = rootfs.stat()
    assert guest.sh("cat /sys/block/vda/serial") == f"{status.st_dev}{status.st_rdev}{status.st_ino}"[:20]


def test_another_file_can_be_put_behind_a_running_drive(boot: Boot, rootfs: Path, tmp_path: Path) -> None:
    small = disk(tmp_path / "small", 4 * MIB, b"small" + bytes(507))
    large = disk(tmp_path / "large", 16 * MIB, b"large" + bytes(507))
    guest = boot(rootfs=rootfs, drives=[small]).wait_shell()
    assert guest.sh("cat /sys/block/vdb/size") == str(4 * MIB // 512)
    with pytest.raises(ConfigError, match="No such file"):
        guest.vm.update_drive("drive0", tmp_path / "missing")
    guest.vm.update_drive("drive0", large)
    assert guest.sh("sleep 1; cat /sys/block/vdb/size") == str(16 * MIB // 512)
    assert guest.sh("dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | head -c 5") == "large"


def test_more_devices_than_interrupt_lines_work_at_the_same_time(
    boot: Boot, rootfs: Path, tmp_path: Path
) -> None:
    disks = [disk(tmp_path / f"disk{n:02}", MIB, f"disk{n:02}".encode() + bytes(506)) for n in range(40)]
    guest = boot(rootfs=rootfs, drives=disks).wait_shell()
    names = "$(ls -d vd? vd?? | grep -v vda$)"
    found = guest.sh(
        f"cd /dev; for d in {names}; do dd if=$d bs=6 count=1 of=/tmp/$d 2>/dev/null; done; cat /tmp/vd? /tmp/vd??"
    )
    assert found == "".join(f"disk{n:02}" for n in range(40))
    guest.sh(f"for d in {names}; do dd if=$d of=/dev/null bs=64k iflag=direct 2>/dev/null & done; wait")
    shared = [line for line in guest.sh("cat /proc/interrupts").splitlines() if line.count("virtio") > 1]
    assert len(shared) == 18


def test_a_paused_guest_stands_still_and_goes_on_where_it_was(boot: Boot, rootfs: Path) -> None:
    guest = boot(rootfs=rootfs, cpus=2).wait_shell()
    guest.console.write("i=0; while [ $i -lt 100000 ]; do echo tick $i; i=$((i + 1)); done\n")
    guest.console.expect("tick 5\r", 120)
    guest.vm.pause()
    length = len(guest.console.output)
    time.sleep(1.0)
    assert len(guest.console.output) == length
    last = int(guest.console.output.rsplit(b"tick ", 1)[1].split()[0] or b"0")
    guest.vm.resume()
    guest.console.expect(f"tick {last + 20}\r", 120)
    ticks = [int(line.split()[1]) for line in guest.console.text.split("\r\n") if line.startswith("tick ")][
        :-1
    ]
    assert ticks == list(range(len(ticks)))


class Api:
    """crackle-vmm with its API socket."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "api.socket"
        self.log = open(directory / "vmm.log", "wb")  # noqa: SIM115
        command = [sys.executable, "-m", "crackle.cli.vmm", "--api-sock", str(self.socket)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def request(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, object]]:
        connection = HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 30
        while connection.sock.connect_ex(str(self.socket)):
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.01)
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text) if text else {}

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()


def wait_in(path: Path, text: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text(errors="replace"):
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.1)


def test_the_whole_life_of_a_guest_over_the_api(
    boot: Boot, kernels: dict[str, Path], rootfs: Path, tmp_path: Path
) -> None:
    serial, metrics = tmp_path / "serial", tmp_path / "metrics"
    api = Api(tmp_path)
    try:
        put = lambda path, body: api.request("PUT", path, body)[0]  # noqa: E731
        assert put("/metrics", {"metrics_path": str(metrics)}) == 204
        assert put("/machine-config", {"vcpu_count": 2, "mem_size_mib": 128}) == 204
        source = {"kernel_image_path": str(kernels["acpi"]), "boot_args": BOOT_ARGS}
        assert put("/boot-source", source) == 204
        drive = {"drive_id": "root", "path_on_host": str(rootfs), "is_root_device": True}
        assert put("/drives/root", {**drive, "is_read_only": False}) == 204
        assert put("/serial", {"serial_out_path": str(serial)}) == 204
        assert put("/actions", {"action_type": "InstanceStart"}) == 204
        wait_in(serial, " # ")
        assert api.request("GET", "/")[1]["state"] == "Running"
        assert put("/boot-source", source) == 400
        assert api.request("PATCH", "/vm", {"state": "Paused"})[0] == 204
        assert api.request("GET", "/")[1]["state"] == "Paused"
        assert api.request("PATCH", "/vm", {"state": "Resumed"})[0] == 204
        assert (
            api.request("PATCH", "/drives/root", {"drive_id": "root", "path_on_host": str(rootfs)})[0] == 204
        )
        assert put("/actions", {"action_type": "FlushMetrics"}) == 204
        line = json.loads(metrics.read_text().splitlines()[-1])
        assert line["block_root"]["read_count"] > 0
        assert line["vcpu"]["exit_io_out"] > 0
        assert put("/actions", {"action_type": "SendCtrlAltDel"}) == 204
        assert api.process.wait(60) == 0
        flushed = [json.loads(each) for each in metrics.read_text().splitlines()]
        assert sum(each["uart"]["write_count"] for each in flushed) == serial.stat().st_size
    finally:
        api.close()
