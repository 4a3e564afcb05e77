"""A Linux guest's disk that QEMU's storage daemon serves."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.linux.conftest import Guest

from crackle.schema.drive import Drive
from support.vhost_user import DAEMON, Relay, StorageDaemon

Boot = Callable[..., Guest]
MIB = 1 << 20

pytestmark = pytest.mark.skipif(DAEMON is None, reason="no qemu-storage-daemon")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., StorageDaemon]]:
    running: list[StorageDaemon] = []

    def start(image: Path, **options: bool) -> StorageDaemon:
        running.append(StorageDaemon(image, tmp_path, **options))
        return running[-1]

    yield start
    for each in running:
        each.close()


def drive(socket: Path, drive_id: str = "served", *, root: bool = False, cache_type: str = "Unsafe") -> Drive:
    return Drive(drive_id, root, socket=str(socket), cache_type=cache_type)  # type: ignore[arg-type]


def test_a_file_system_on_it_is_whole(
    boot: Boot, rootfs: Path, serve: Callable[..., StorageDaemon], tmp_path: Path
) -> None:
    image = tmp_path / "data.ext4"
    subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", image, "24M"], check=True)
    backend = serve(image)
    guest = boot(rootfs=rootfs, drives=[drive(backend.socket, cache_type="Writeback")]).wait_shell()
    assert guest.sh("cat /sys/block/vdb/queue/write_cache") == "write back"
    guest.sh("mount -t ext4 /dev/vdb /mnt && cp /data/payload /mnt/copy && mkdir /mnt/d && sync")
    guest.sh("for i in $(seq 50); do echo $i > /mnt/d/$i; done; umount /mnt")
    guest.sh("echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/vdb /mnt")
    assert guest.sh("cmp /data/payload /mnt/copy && echo same") == "same"
    assert guest.sh("cat /mnt/d/* | wc -l; umount /mnt") == "50"
    counters = guest.vm.metrics()["vhost_user_block_served"]
    assert counters["activate_fails"] == counters["cfg_fails"] == 0
    assert counters["init_time_us"] > 0
    assert counters["activate_time_us"] > 0
    guest.vm.stop()
    checked = subprocess.run(["/sbin/e2fsck", "-f", "-n", image], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_it_can_be_the_root_and_grow(
    boot: Boot, rootfs: Path, images: dict[str, Path], serve: Callable[..., StorageDaemon], tmp_path: Path
) -> None:
    content = os.urandom(4 * MIB)
    image = tmp_path / "image"
    image.write_bytes(content)
    root, data = serve(rootfs, writable=False), serve(image)
    with Relay(data) as relay:
        drives = [drive(root.socket, "root", root=True), drive(relay.socket)]
        guest = boot(drives=drives).wait_shell()
        assert "root=/dev/vda ro" in guest.sh("cat /proc/cmdline")
        assert guest.sh("cat /sys/block/vda/ro") == "1"
        assert guest.sh("sha256sum < /dev/vdb").split()[0] == hashlib.sha256(content).hexdigest()
        data.resize(12 * MIB)
        guest.vm.update_drive("served")
        assert guest.sh("sleep 1; cat /sys/block/vdb/size") == str(12 * MIB // 512)
        guest.sh("dd if=/data/payload of=/dev/vdb bs=1M seek=8 count=4 conv=fsync")
        guest.vm.pause()
        guest.vm.resume()
        guest.sh("sync")
    assert image.read_bytes()[8 * MIB :] == images["payload"].read_bytes()[: 4 * MIB]
