"""Disks under a Linux guest that means it: file systems, fio, discard and limits, on both engines."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import BOOT_ARGS, Guest
from tests.linux.test_devices import Api, disk

from crackle.schema import Drive, RateLimiter, TokenBucket

Boot = Callable[..., Guest]
MIB = 1 << 20

pytestmark = pytest.mark.parametrize("engine", ["Sync", "Async"])


def drive(path: Path, engine: str, **options: object) -> Drive:
    return Drive("data", False, path_on_host=str(path), io_engine=engine, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [None, RateLimiter(TokenBucket(MIB // 5, 100), TokenBucket(50, 100))])
def test_fio_finds_what_it_wrote(
    boot: Boot, tools: dict[str, object], tmp_path: Path, engine: str, limit: RateLimiter | None
) -> None:
    image = disk(tmp_path / "data", 16 * MIB)
    data = drive(image, engine, cache_type="Writeback", rate_limiter=limit)
    guest = boot(**tools, drives=[data], cpus=2).wait_shell()
    guest.sh(
        "cd /tmp && fio --name=verify --filename=/dev/vdb --rw=randrw --bsrange=512-64k --bs_unaligned=0 "
        "--direct=1 --ioengine=psync --thread --numjobs=4 --size=4m --offset_increment=4m --fsync=32 "
        "--verify=crc32c --verify_fatal=1 --do_verify=1",
        timeout=150,
    )
    counters = guest.vm.metrics()["block_data"]
    assert counters["write_bytes"] > 4 * MIB
    assert counters["flush_count"] > 0
    assert counters["execute_fails"] == counters["invalid_reqs_count"] == 0
    assert (counters["rate_limiter_throttled_events"] > 0) == (limit is not None)


def test_the_journal_makes_good_what_a_killed_monitor_left(
    boot: Boot,
    kernels: dict[str, Path],
    tools: dict[str, object],
    images: dict[str, Path],
    tmp_path: Path,
    engine: str,
) -> None:
    """SIGKILL amid writes: the file system is whole, and so is every file that the guest was told is written."""
    image, serial = disk(tmp_path / "data", 48 * MIB), tmp_path / "serial"
    job = (
        "/usr/bin/mke2fs -q -t ext4 /dev/vdb && mount /dev/vdb /mnt; i=0; while :; do "
        "dd if=/data/payload of=/mnt/$i bs=64k count=3 conv=fsync 2>/dev/null; echo written $i; i=$((i+1)); done"
    )
    source = {"kernel_image_path": str(kernels["acpi"]), "boot_args": f'{BOOT_ARGS} crackle.run="{job}"'}
    api = Api(tmp_path)
    try:
        for path, body in (
            ("/machine-config", {"vcpu_count": 1, "mem_size_mib": tools["memory"]}),
            ("/boot-source", source),
            ("/serial", {"serial_out_path": str(serial)}),
            (
                "/drives/root",
                {
                    "drive_id": "root",
                    "path_on_host": str(tools["rootfs"]),
                    "is_root_device": True,
                    "is_read_only": True,
                },
            ),
            (
                "/drives/data",
                {
                    "drive_id": "data",
                    "path_on_host": str(image),
                    "is_root_device": False,
                    "is_read_only": False,
                    "io_engine": engine,
                    "cache_type": "Writeback",
                },
            ),
            ("/actions", {"action_type": "InstanceStart"}),
        ):
            assert api.request("PUT", path, body) == (204, {})
        deadline = time.monotonic() + 120
        while "written 12\n" not in (text := serial.read_text().replace("\r", "") if serial.exists() else ""):
            assert time.monotonic() < deadline, text
            time.sleep(0.02)
    finally:
        api.close()
    written = serial.read_text().count("written")
    recovered = subprocess.run(["/sbin/e2fsck", "-p", str(image)], capture_output=True, text=True)
    assert "recovering journal" in recovered.stdout
    assert recovered.returncode in (0, 1), recovered.stdout
    checked = subprocess.run(["/sbin/e2fsck", "-f", "-n", str(image)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    payload = images["payload"].read_bytes()[: 3 << 16]
    for n in range(written):
        copy = tmp_path / "copy"
        command = ["/sbin/debugfs", "-R", f"dump /{n} {copy}", str(image)]
        subprocess.run(command, check=True, capture_output=True)
        assert copy.read_bytes() == payload


def test_what_the_guest_discards_takes_no_room_on_the_host(
    boot: Boot, tools: dict[str, object], tmp_path: Path, engine: str
) -> None:
    image = tmp_path / "data"
    image.write_bytes(os.urandom(16 * MIB))
    room = lambda: image.stat().st_blocks * 512  # noqa: E731
    assert room() >= 16 * MIB
    guest = boot(**tools, drives=[drive(image, engine)]).wait_shell()
    guest.sh("/usr/bin/mke2fs -q -t ext4 -O ^has_journal /dev/vdb")
    assert room() < 4 * MIB
    guest.sh("mount /dev/vdb /mnt && dd if=/data/payload of=/mnt/file bs=64k && sync")
    assert room() > 8 * MIB
    guest.sh("rm /mnt/file && sync && fstrim /mnt && sync")
    assert room() < 4 * MIB
    guest.sh("umount /mnt && blkdiscard /dev/vdb")
    assert room() == 0
    assert image.read_bytes() == bytes(16 * MIB)
    assert guest.vm.metrics()["block_data"]["discard_count"] > 0


def test_a_disk_keeps_to_its_limits(boot: Boot, rootfs: Path, tmp_path: Path, engine: str) -> None:
    """Over five seconds, by bytes and by operations; the limits are set and changed while the guest reads."""
    guest = boot(rootfs=rootfs, drives=[drive(disk(tmp_path / "data"), engine)]).wait_shell()
    guest.console.write("while :; do dd if=/dev/vdb of=/dev/null bs=32k iflag=direct 2>/dev/null; done\n")

    def rate(name: str) -> float:
        # Without what the bucket held.
        time.sleep(2.0)
        begin, before = time.monotonic(), guest.vm.metrics()["block_data"][name]
        time.sleep(5.0)
        return float((guest.vm.metrics()["block_data"][name] - before) / (time.monotonic() - begin))

    def kept(name: str, limit: float) -> bool:
        # Never above; below only where the machine had no time for the guest.
        found = [rate(name)]
        while found[-1] < 0.95 * limit and len(found) < 4:
            found.append(rate(name))
        assert max(found) <= 1.05 * limit, found
        return found[-1] >= 0.95 * limit

    nothing = TokenBucket(0, 0)
    guest.vm.update_drive("data", rate_limiter=RateLimiter(bandwidth=TokenBucket(MIB // 10, 200)))
    assert kept("read_bytes", MIB // 2)
    guest.vm.update_drive("data", rate_limiter=RateLimiter(nothing, TokenBucket(4, 200)))
    assert kept("read_count", 20)
    assert guest.vm.metrics()["block_data"]["rate_limiter_throttled_events"] > 0
    guest.vm.update_drive("data", rate_limiter=RateLimiter(ops=nothing))
    assert rate("read_count") > 30


def test_a_new_size_is_noticed_amid_requests(boot: Boot, rootfs: Path, tmp_path: Path, engine: str) -> None:
    small, large = disk(tmp_path / "small", 4 * MIB), disk(tmp_path / "large", 16 * MIB, b"large")
    guest = boot(rootfs=rootfs, drives=[drive(small, engine)], cpus=2).wait_shell()
    guest.sh("(while :; do dd if=/dev/vdb of=/dev/null bs=64k iflag=direct 2>/dev/null; done) & true")
    for image in (large, small, large):
        guest.vm.update_drive("data", image)
        size = image.stat().st_size // 512
        guest.sh(f"until [ $(cat /sys/block/vdb/size) = {size} ]; do sleep 0.1; done", timeout=30)
    assert guest.sh("dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | head -c 5") == "large"
