"""What a configuration has open: the files of PUT are those of the start, and disks are locked."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from crackle import schema
from crackle.errors import ConfigError
from crackle.telemetry.logger import OFF, Logger
from crackle.vmm.commands import Command
from crackle.vmm.controller import Controller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

IN_USE = r"Resource temporarily unavailable \(os error 11\) .*another microVM"


class Machine:
    """Has a duplicate of each disk's descriptor, as the real one does."""

    exit_fd = -1
    state = "Running"

    def __init__(self, held: Mapping[tuple[str, str], Any]) -> None:
        self.seen = dict(held)
        self.disks = {name: disk.duplicate() for (kind, name), disk in held.items() if kind == "block"}
        self.refuses = False

    def start(self) -> None:
        pass

    def update(self, _kind: str, identifier: str, _resource: Any, held: Any = None) -> None:
        if self.refuses:
            raise ConfigError("the device refuses")
        self.disks[identifier].close()
        self.disks[identifier] = held.duplicate()

    def metrics(self) -> dict[str, dict[str, int]]:
        return {}

    def stop(self) -> None:
        for disk in self.disks.values():
            disk.close()


class Vm:
    """One microVM as far as its configuration."""

    def __init__(self, kernel: Path, **options: Any) -> None:
        self.machine: Any = None
        self.kernel = kernel
        self.failure: Exception | None = None
        self.controller = Controller(self._build, logger=Logger(level=OFF), **options)

    def _build(self, _config: object, _shell: object, held: Mapping[tuple[str, str], Any]) -> Any:
        self.machine = Machine(held)
        if self.failure is not None:
            self.machine.stop()
            raise self.failure
        return self.machine

    def drive(self, name: str, path: Path, **fields: Any) -> None:
        drive = schema.Drive(name, False, **{"path_on_host": str(path), "is_read_only": False, **fields})
        self.controller.execute(Command("put_drive", drive))

    def start(self) -> None:
        self.controller.execute(Command("put_boot_source", schema.BootSource(str(self.kernel))))
        self.controller.execute(Command("start"))

    def patch(self, name: str, path: Path) -> None:
        self.controller.execute(Command("patch_drive", schema.DriveUpdate(name, str(path))))


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Callable[..., Vm]]:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"kernel")
    made: list[Vm] = []

    def make(**options: Any) -> Vm:
        made.append(Vm(kernel, **options))
        return made[-1]

    before = set(os.listdir("/proc/self/fd"))
    yield make
    for one in made:
        one.controller.stop()
    assert set(os.listdir("/proc/self/fd")) == before, "descriptors are left"


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("first", "second")]
    for path in paths:
        path.write_bytes(bytes(4096))
    return paths


def inode(disk: Any) -> int:
    return os.fstat(disk.fd).st_ino


# What was checked is what is used


def test_the_files_of_put_are_those_of_the_start_whatever_their_paths_are_then(vm, disks: list[Path]) -> None:
    one = vm()
    one.drive("a", disks[0])
    one.drive("b", disks[1])
    inodes = [path.stat().st_ino for path in (*disks, one.kernel)]
    source = schema.BootSource(str(one.kernel), str(one.kernel))
    one.controller.execute(Command("put_boot_source", source))
    disks[0].unlink()
    other = disks[1].with_name("other")
    other.write_bytes(bytes(8192))
    other.rename(disks[1])
    one.kernel.unlink()
    one.controller.execute(Command("start"))
    seen = one.machine.seen
    files = [seen["block", "a"], seen["block", "b"], seen["boot", "kernel"]]
    assert inodes[:2] == [inode(disk) for disk in files[:2]]
    # The machine has read them: they are closed once it runs.
    assert [seen["boot", name].fd for name in ("kernel", "initrd")] == [-1, -1]


def test_a_start_that_failed_is_tried_again_with_the_same_files(vm, disks: list[Path]) -> None:
    one = vm()
    one.drive("a", disks[0])
    first = disks[0].stat().st_ino
    one.failure = ConfigError("not yet")
    with pytest.raises(ConfigError, match="not yet"):
        one.start()
    disks[0].unlink()
    one.failure = None
    one.controller.execute(Command("start"))
    assert inode(one.machine.disks["a"]) == first


def test_a_boot_source_that_is_replaced_or_refused_leaves_no_descriptor(vm, tmp_path: Path) -> None:
    one = vm()
    put = one.controller.execute
    put(Command("put_boot_source", schema.BootSource(str(one.kernel), str(one.kernel))))
    count = len(os.listdir("/proc/self/fd"))
    for source in (
        schema.BootSource(str(one.kernel), str(tmp_path / "missing")),
        schema.BootSource(str(tmp_path / "missing")),
        schema.BootSource(str(one.kernel), str(one.kernel), "x" * 4096),
    ):
        with pytest.raises(ConfigError):
            put(Command("put_boot_source", source))
        assert len(os.listdir("/proc/self/fd")) == count
    put(Command("put_boot_source", schema.BootSource(str(one.kernel))))
    assert len(os.listdir("/proc/self/fd")) == count - 1


# Locks


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_many_may_read_a_disk_or_one_may_write_it(vm, disks, first: bool, second: bool, both: bool) -> None:
    vm().drive("a", disks[0], is_read_only=first)
    other = vm()
    if both:
        other.drive("a", disks[0], is_read_only=second)
        return
    with pytest.raises(ConfigError, match=IN_USE):
        other.drive("a", disks[0], is_read_only=second)
    # Another name of the same file is the same file, and another file is another.
    alias = disks[0].with_name("alias")
    os.link(disks[0], alias)
    with pytest.raises(ConfigError, match=IN_USE):
        other.drive("a", alias, is_read_only=second)
    other.drive("a", disks[1], is_read_only=second)


def test_another_process_is_refused_too(vm, disks: list[Path]) -> None:
    vm().drive("a", disks[0])
    text = (
        "import sys; from crackle.vmm.files import open_disk\n"
        "try: open_disk(sys.argv[1], False, True, [])\n"
        "except Exception as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", text, disks[0]], capture_output=True, text=True, check=True)
    assert "another microVM" in run.stdout


def test_the_lock_goes_with_the_microvm_or_with_the_drive(vm, disks: list[Path]) -> None:
    one, other = vm(), vm()
    one.drive("a", disks[0])
    one.drive("a", disks[1])
    other.drive("a", disks[0])
    one.start()
    with pytest.raises(ConfigError, match=IN_USE):
        other.drive("b", disks[1])
    one.controller.stop()
    other.drive("b", disks[1])


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    """A block device, from linux/loop.h: LOOP_CTL_GET_FREE, LOOP_SET_FD, LOOP_CLR_FD."""
    file = tmp_path / "behind"
    file.write_bytes(bytes(1 << 20))
    try:
        with (
            open("/dev/loop-control", "rb+", buffering=0) as control,
            file.open("rb+", buffering=0) as behind,
        ):
            device = Path(f"/dev/loop{fcntl.ioctl(control, 0x4C82)}")
            with device.open("rb+", buffering=0) as opened:
                fcntl.ioctl(opened, 0x4C00, behind.fileno())
    except OSError as error:
        pytest.skip(f"no loop device can be had: {error}")
    yield device
    with device.open("rb+", buffering=0) as opened:
        fcntl.ioctl(opened, 0x4C01)


def test_a_block_device_is_locked_as_a_file_is(vm, loop_device: Path) -> None:
    one, other = vm(), vm()
    one.drive("a", loop_device)
    with pytest.raises(ConfigError, match=IN_USE):
        other.drive("b", loop_device)
    with pytest.raises(ConfigError, match=IN_USE):
        other.drive("b", loop_device, is_read_only=True)
    one.drive("a", loop_device, is_read_only=True)
    other.drive("b", loop_device, is_read_only=True)
    with pytest.raises(ConfigError, match=IN_USE):
        one.drive("a", loop_device)
    other.controller.stop()
    one.drive("a", loop_device)
    # Another process has the lock in its way as well.
    check = (
        "import sys; from crackle.virtio.block.backing import open_backing; "
        "sys.exit(open_backing(sys.argv[1], True).lock())"
    )
    assert subprocess.run([sys.executable, "-c", check, str(loop_device)], check=False).returncode == 0
    one.controller.stop()
    assert subprocess.run([sys.executable, "-c", check, str(loop_device)], check=False).returncode == 1


def test_a_live_change_takes_the_new_lock_and_gives_the_old_one_back(vm, disks: list[Path]) -> None:
    one, other = vm(), vm()
    one.drive("a", disks[0])
    one.start()
    one.patch("a", disks[1])
    other.drive("a", disks[0])
    with pytest.raises(ConfigError, match=f"Unable to patch the block device: Block: .*{IN_USE}"):
        one.patch("a", disks[0])
    with pytest.raises(ConfigError, match=IN_USE):
        other.drive("b", disks[1])
    # One that the device refuses changes nothing.
    third = disks[0].with_name("third")
    third.write_bytes(bytes(4096))
    one.machine.refuses = True
    with pytest.raises(ConfigError, match="the device refuses"):
        one.patch("a", third)
    other.drive("c", third)
    with pytest.raises(ConfigError, match=IN_USE):
        other.drive("b", disks[1])
    one.machine.refuses = False
    one.patch("a", disks[1])
    assert inode(one.machine.disks["a"]) == disks[1].stat().st_ino


def test_the_drives_of_one_microvm_may_share_a_file_and_their_lock(vm, disks: list[Path]) -> None:
    one, other = vm(), vm()
    one.drive("a", disks[0])
    one.drive("b", disks[0])
    one.drive("c", disks[0], is_read_only=True)
    for leaving in ("a", "b"):
        with pytest.raises(ConfigError, match=IN_USE):
            other.drive("a", disks[0], is_read_only=True)
        one.drive(leaving, disks[1], is_read_only=True)
    # Only the reader is left: others may read it as well, and not write.
    other.drive("a", disks[0], is_read_only=True)
    with pytest.raises(ConfigError, match=IN_USE):
        other.drive("b", disks[0])
    with pytest.raises(ConfigError, match=IN_USE):
        one.drive("a", disks[0])
    with pytest.raises(ConfigError, match=IN_USE):
        vm().drive("a", disks[0])


def test_a_drive_may_be_given_again_with_the_same_file(vm, disks: list[Path]) -> None:
    one, other = vm(), vm()
    for read_only in (False, False, True, True, False):
        one.drive("a", disks[0], is_read_only=read_only)
    with pytest.raises(ConfigError, match=IN_USE):
        other.drive("a", disks[0], is_read_only=True)
    one.drive("a", disks[0], is_read_only=True)
    other.drive("a", disks[0], is_read_only=True)
    with pytest.raises(ConfigError, match=IN_USE):
        one.drive("a", disks[0])
    # What was refused has left the old lock as it was.
    with pytest.raises(ConfigError, match=IN_USE):
        other.drive("a", disks[0])


def test_the_lock_can_be_switched_off_for_a_drive_or_for_all(vm, disks: list[Path]) -> None:
    vm().drive("a", disks[0])
    vm().drive("a", disks[0], lock=False)
    other = vm(lock_drives=False)
    other.drive("a", disks[0])
    with pytest.raises(ConfigError, match=IN_USE):
        other.drive("b", disks[0], lock=True)
