"""Drives that come and go while a guest runs: places, descriptors, what the guest is told, and what survives a copy."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crackle import ConfigError, Drive, Jail, MicroVM, NetworkInterface
from crackle.arch.x86_64 import layout
from crackle.devices.hotplug import EVENT, GENERATION, TABLE
from crackle.virtio.net.tap import open_tap
from support.network import Namespace

from .conftest import Process

MAGIC, STATUS = 0, 0x70
VIRT = int.from_bytes(b"virt", "little")
BOUND, GONE = 3, 1
"""Of a device's status: a driver has it; it has let go (ACKNOWLEDGE stays)."""

Make = Callable[..., MicroVM]


@pytest.fixture
def make(guests: Path) -> Iterator[Make]:
    """Makes a microVM that does nothing, with options."""
    made: list[MicroVM] = []

    def make(**options: object) -> MicroVM:
        made.append(MicroVM(guests / "idle.elf", boot_args="", memory=64, **options))  # type: ignore[arg-type]
        made[-1].start()
        return made[-1]

    yield make
    for vm in made:
        vm.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


def event(vm: MicroVM) -> int:
    return vm._machine().mmio.read(layout.HOTPLUG_ADDR + EVENT, 1)  # type: ignore[union-attr]


def window(vm: MicroVM) -> int:
    """Where the device is that the table says the guest has got."""
    mmio = vm._machine().mmio  # type: ignore[union-attr]
    table = bytes(mmio.read(layout.HOTPLUG_ADDR + n, 1) for n in range(256))
    return int(struct.unpack_from("<I", table, table.index(bytes.fromhex("86 09 00 01")) + 4)[0])


def register(vm: MicroVM, address: int) -> int:
    return vm._machine().mmio.read(address, 4)  # type: ignore[union-attr]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_drive_comes_is_told_of_and_goes_a_hundred_times_and_leaves_nothing(make: Make, disk: Path) -> None:
    vm = make()
    vm.detach(vm.attach(disk))
    assert event(vm) == 0, "it has gone before the guest asked"
    before = descriptors(), len(os.listdir("/proc/self/task"))
    places = set()
    for _ in range(100):
        name = vm.attach(disk)
        assert [drive.drive_id for drive in vm.config.drives] == [name]
        assert (event(vm), event(vm)) == (TABLE, 0)
        places.add(window(vm))
        assert register(vm, window(vm) + MAGIC) == VIRT
        vm.detach(name)
        assert register(vm, window(vm) + MAGIC) != VIRT
    assert len(places) == 1, "what was given back is given again"
    assert (descriptors(), len(os.listdir("/proc/self/task"))) == before
    assert vm.config.drives == []


def drive_with_driver(vm: MicroVM, disk: Path) -> int:
    """A drive that has come, and a driver has it; where it is."""
    vm.attach(Drive("data", False, path_on_host=str(disk), io_engine="Async"))
    assert event(vm) == TABLE
    address = window(vm)
    for status in (1, BOUND):
        vm._machine().mmio.write(address + STATUS, 4, status)  # type: ignore[union-attr]
    return address


def test_a_drive_that_the_driver_has_stays_until_it_has_let_go(
    make: Make, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crackle.vmm.machine.LET_GO_TIMEOUT", 0.05)
    vm = make()
    address = drive_with_driver(vm, disk)
    for asked in (TABLE, 0):
        with pytest.raises(
            ConfigError, match=r"Unable to detach the block device: the guest still uses it\. Have it let go"
        ):
            vm.detach("data")
        assert event(vm) == asked
        assert register(vm, address + MAGIC) == VIRT
    assert [drive.drive_id for drive in vm.config.drives] == ["data"]
    for status in (0, GONE):
        vm._machine().mmio.write(address + STATUS, 4, status)  # type: ignore[union-attr]
    vm.detach("data")
    with pytest.raises(ConfigError, match="There is no drive 'data'"):
        vm.detach("data")


def test_a_guest_that_lets_go_when_it_is_asked_has_the_drive_no_more(make: Make, disk: Path) -> None:
    vm = make()
    address = drive_with_driver(vm, disk)

    def let_go() -> list[int]:
        """What a guest's kernel does when it has loaded the table that asks for the device."""
        while event(vm) != TABLE:
            time.sleep(0.001)
        found = []
        for status in (0, GONE):
            vm._machine().mmio.write(address + STATUS, 4, status)  # type: ignore[union-attr]
            found.append(register(vm, address + MAGIC))
            time.sleep(0.02)
        return found

    with ThreadPoolExecutor(1) as pool:
        guest = pool.submit(let_go)
        vm.detach("data")
        assert guest.result(10) == [VIRT, VIRT], "it is there until the guest has acknowledged"
    assert register(vm, address + MAGIC) != VIRT


def test_a_guest_that_is_paused_is_not_waited_for(make: Make, disk: Path) -> None:
    vm = make()
    drive_with_driver(vm, disk)
    vm.pause()
    with pytest.raises(ConfigError, match="the guest still uses it"):
        vm.detach("data")
    assert event(vm) == 0, "nor asked"


def test_a_snapshot_has_what_came_and_what_the_guest_has_not_been_told(
    make: Make, disk: Path, tmp_path: Path
) -> None:
    vm = make()
    other = tmp_path / "other"
    other.write_bytes(bytes(512))
    first = vm.attach(disk)
    assert event(vm) == TABLE
    place = window(vm)
    vm.pause()
    second = vm.attach(other)
    vm.snapshot(tmp_path / "s")
    vm.stop()
    copy = MicroVM.restore(tmp_path / "s", resume=False)
    try:
        assert [drive.drive_id for drive in copy.config.drives] == [first, second]
        assert window(copy) == place
        assert [event(copy), event(copy), event(copy)] == [GENERATION, TABLE, 0]
        assert window(copy) == place + 0x1000
        assert [register(copy, at + MAGIC) for at in (place, place + 0x1000)] == [VIRT, VIRT]
        copy.resume()
        copy.detach(first)
        copy.detach(second)
        assert register(copy, place + MAGIC) != VIRT
        third = copy.attach(disk)
        assert event(copy) == TABLE
        assert window(copy) == place
        assert third == "drive0"
    finally:
        copy.stop()


def test_in_a_process_under_filters_drives_come_and_go_too_and_clones_have_them(
    make: Make, disk: Path, tmp_path: Path
) -> None:
    vm = make(own_process=True)
    reader = Drive("data", False, path_on_host=str(disk), is_read_only=True)
    for engine in ("Sync", "Async"):
        vm.attach(Drive("one", False, path_on_host=str(disk), io_engine=engine))
        vm.detach("one")
    vm.attach(reader)
    (clone,) = vm.fork()
    try:
        for each in (vm, clone):
            assert [drive.drive_id for drive in each.config.drives] == ["data"]
            each.detach("data")
            each.attach(reader)
            assert each.metrics()["block_data"]["cfg_fails"] == 0
    finally:
        clone.stop()


def test_an_interface_comes_and_goes_too_and_holds_its_tap_meanwhile(
    namespace: Namespace, guests: Path
) -> None:
    tap = namespace.tap()
    with namespace.entered(), MicroVM(guests / "idle.elf", boot_args="", memory=64, own_process=True) as vm:
        for _ in range(3):
            assert vm.attach(NetworkInterface("eth0", tap, guest_mac="06:f0:0d:00:00:a1")) == "eth0"
            with pytest.raises(ConfigError, match="in use"):
                open_tap(tap)
            with pytest.raises(ConfigError, match="'eth0' is there already"):
                vm.attach(NetworkInterface("eth0", tap))
            assert vm.metrics()["net_eth0"]["tx_count"] == 0
            vm.detach("eth0")
            assert vm.config.network_interfaces == []
            os.close(open_tap(tap))


def test_what_the_metadata_service_answers_on_stays(namespace: Namespace, guests: Path) -> None:
    tap = namespace.tap()
    with (
        namespace.entered(),
        MicroVM(guests / "idle.elf", boot_args="", memory=64, interfaces=[tap], metadata={}) as vm,
    ):
        with pytest.raises(ConfigError, match="The metadata service answers on 'eth0'"):
            vm.detach("eth0")
        assert [card.iface_id for card in vm.config.network_interfaces] == ["eth0"]


def test_over_the_api_devices_come_whose_kind_the_microvm_has_had(
    guests: Path, tmp_path: Path, disk: Path
) -> None:
    """Under filters code cannot be loaded any more, where no zygote has it: that is said, and nothing has changed."""
    (tmp_path / "config").write_text(
        json.dumps(
            {
                "boot-source": {"kernel_image_path": str(guests / "idle.elf"), "boot_args": ""},
                "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
                "drives": [{"drive_id": "root", "is_root_device": True, "path_on_host": str(disk)}],
            }
        )
    )
    (tmp_path / "other").write_bytes(bytes(512))
    other = {"drive_id": "other", "is_root_device": False, "path_on_host": str(tmp_path / "other")}
    vmm = Process(tmp_path, "--config-file", str(tmp_path / "config"))
    try:
        for _ in range(2):
            vmm.api.ask("PUT", "/drives/other", other)
            vmm.api.ask("DELETE", "/drives/other")
        interface = {"iface_id": "eth0", "host_dev_name": "none"}
        answer = vmm.api.ask("PUT", "/network-interfaces/eth0", interface, expect=400)
        assert answer["fault_message"].startswith(
            "Network config error: Unable to attach the net device: cannot import crackle.virtio.net.device, which a "
            "microVM that runs may not load: begin with a device of this kind"
        )
        assert vmm.api.ask("GET", "/vm/config", expect=200)["network-interfaces"] == []
        assert vmm.api.ask("DELETE", "/drives/root", expect=400)["fault_message"].endswith(
            "as long as it runs."
        )
    finally:
        vmm.process.kill()
        vmm.process.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="makes jails: needs root")
def test_in_a_jail_drives_come_whose_files_it_sees(make: Make, disk: Path, tmp_path: Path) -> None:
    user = 60_710
    os.chown(disk, user, user)
    (tmp_path / "unseen").write_bytes(bytes(512))
    vm = make(jail=Jail(uid=user, gid=user, paths=(str(disk),)))
    for engine in ("Sync", "Async"):
        vm.attach(Drive("data", False, path_on_host=str(disk), io_engine=engine))
        vm.detach("data")
    with pytest.raises(ConfigError, match="No such file or directory"):
        vm.attach(tmp_path / "unseen")
    assert vm.config.drives == []
