"""vhost-user drives as the controller configures, starts and changes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crackle import schema
from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.telemetry.logger import OFF, Logger
from crackle.telemetry.metrics import Metrics
from crackle.vmm.commands import Command
from crackle.vmm.controller import Controller
from crackle.vmm.devices import KINDS, kind_of_drive, make
from support.vhost_user import Impostor, config_space


class Machine:
    """Has the drives only."""

    exit_fd = -1
    state = "Running"

    def __init__(self, config: schema.VmConfig, held: Mapping[tuple[str, str], Any]) -> None:
        self.memory = GuestMemory([(0, 1 << 20)], backing="memfd")
        self.devices = {}
        for drive in config.drives:
            key = kind_of_drive(drive), drive.drive_id
            self.devices[key] = make(self.memory, key[0], drive, held.get(key))

    def start(self) -> None:
        pass

    def update(self, kind: str, identifier: str, resource: Any, held: Any = None) -> None:
        update = KINDS[kind].update
        assert update is not None
        update(self.devices[kind, identifier], resource, *(() if held is None else (held,)))

    def metrics(self) -> dict[str, dict[str, Any]]:
        return {f"{kind}_{name}": device.counters() for (kind, name), device in self.devices.items()}

    def stop(self) -> None:
        for device in self.devices.values():
            device.close()
        self.memory.close()


class Bench:
    def __init__(self, directory: Path) -> None:
        self.kernel = directory / "kernel"
        self.kernel.touch()
        self.file = directory / "file"
        self.file.write_bytes(bytes(4096))
        self.shells: list[tuple[int, bool]] = []
        self.machine: Machine | None = None
        self.controller = Controller(self._build, self._prepare, logger=Logger(level=OFF))  # type: ignore[arg-type]

    def _build(self, config: schema.VmConfig, _shell: object, held: Mapping[tuple[str, str], Any]) -> Machine:
        self.machine = Machine(config, held)
        return self.machine

    def _prepare(self, machine: schema.MachineConfig, shared: bool, _base: None) -> None:
        self.shells.append((machine.mem_size_mib, shared))

    def do(self, name: str, resource: object = None) -> Any:
        return self.controller.execute(Command(name, resource))

    def put(self, drive_id: str, socket: str, **fields: Any) -> None:
        self.do("put_drive", schema.Drive(drive_id, False, socket=socket, **fields))

    def start(self) -> Machine:
        self.do("put_boot_source", schema.BootSource(str(self.kernel)))
        self.do("start")
        assert self.machine is not None
        return self.machine


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.controller.stop()


def test_a_drive_is_connected_when_it_is_configured_and_that_connection_is_used(
    bench: Bench, impostor: Callable[..., Impostor]
) -> None:
    backend = impostor()
    bench.put("data", backend.path)
    assert backend.names().count("SET_OWNER") == 1
    machine = bench.start()
    assert backend.names().count("SET_OWNER") == 1
    assert machine.devices["vhost_user_block", "data"].config_generation > 0


def test_the_configuration_shows_what_was_given_and_no_more(
    bench: Bench, impostor: Callable[..., Impostor]
) -> None:
    backend = impostor()
    bench.put("data", backend.path, cache_type="Writeback", partuuid="x")
    shown = msgspec.to_builtins(bench.do("get_config"))["drives"]
    assert shown == [
        {
            "drive_id": "data",
            "partuuid": "x",
            "is_root_device": False,
            "cache_type": "Writeback",
            "is_read_only": None,
            "path_on_host": None,
            "rate_limiter": None,
            "io_engine": None,
            "socket": backend.path,
        }
    ]


def test_dirty_pages_are_not_tracked_where_a_back_end_writes_too(
    bench: Bench, impostor: Callable[..., Impostor]
) -> None:
    backend = impostor()
    tracking = schema.MachineConfigUpdate(track_dirty_pages=True)
    bench.do("patch_machine", tracking)
    with pytest.raises(ConfigError, match="track_dirty_pages is of no use with a vhost-user drive"):
        bench.put("data", backend.path)
    assert bench.do("get_config").drives == []
    bench.do("patch_machine", schema.MachineConfigUpdate(track_dirty_pages=False))
    bench.put("data", backend.path)
    with pytest.raises(ConfigError, match="Machine config error: track_dirty_pages is of no use"):
        bench.do("patch_machine", tracking)
    assert bench.do("get_machine").track_dirty_pages is False


@pytest.mark.parametrize(
    "field",
    [
        {"path_on_host": "/dev/null"},
        {"is_read_only": True},
        {"is_read_only": False},
        {"io_engine": "Sync"},
        {"rate_limiter": schema.RateLimiter(ops=schema.TokenBucket(1, 1))},
    ],
)
def test_what_the_back_end_decides_cannot_be_given(
    bench: Bench, impostor: Callable[..., Impostor], field: dict[str, Any]
) -> None:
    backend = impostor()
    with pytest.raises(
        ConfigError, match=r"Invalid block config\. A drive with a socket has no|rate limiters"
    ):
        bench.put("data", backend.path, **field)
    assert bench.controller.config.drives == []
    assert backend.told == []


def test_a_back_end_that_is_no_use_is_refused_at_once(bench: Bench, tmp_path: Path) -> None:
    words = "Drive config error: Unable to create the virtio block device: Vhost user backend error: Vhost-user error"
    with pytest.raises(ConfigError, match=words):
        bench.put("data", str(tmp_path / "nothing"))
    assert bench.controller.config.drives == []


def test_memory_is_shared_as_soon_and_as_long_as_a_drive_needs_it(
    bench: Bench, impostor: Callable[..., Impostor]
) -> None:
    bench.do("put_boot_source", schema.BootSource(str(bench.kernel)))
    bench.put("data", impostor().path)
    bench.put("more", impostor().path)
    bench.do("put_drive", schema.Drive("data", False, path_on_host=str(bench.file)))
    assert bench.shells == [(128, False), (128, True)]
    bench.do("put_drive", schema.Drive("more", False, path_on_host=str(bench.file)))
    assert bench.shells[2:] == [(128, False)]


def test_configuring_a_drive_again_hangs_up_first(bench: Bench, impostor: Callable[..., Impostor]) -> None:
    backend = impostor()
    bench.put("data", backend.path)
    # This back end serves one at a time: it would not answer while the first connection lasts.
    bench.put("data", backend.path, cache_type="Writeback")
    assert backend.names().count("SET_OWNER") == 2
    assert [drive.cache_type for drive in bench.controller.config.drives] == ["Writeback"]


def test_after_a_failed_start_the_back_end_is_connected_to_again(
    bench: Bench, impostor: Callable[..., Impostor]
) -> None:
    first, second = impostor(), impostor()
    bench.put("a", first.path)
    bench.put("b", second.path)
    second.answers["GET_CONFIG"] = None
    with pytest.raises(ConfigError, match=r"Start microvm error: .*hung up at GET_CONFIG"):
        bench.start()
    del second.answers["GET_CONFIG"]
    assert len(bench.start().devices) == 2
    assert second.names().count("SET_OWNER") == 2


def test_a_patch_that_names_the_drive_alone_reads_its_size_again(
    bench: Bench, impostor: Callable[..., Impostor]
) -> None:
    backend = impostor()
    bench.put("data", backend.path)
    device: Any = bench.start().devices["vhost_user_block", "data"]
    backend.config = config_space(9999)
    bench.do("patch_drive", schema.DriveUpdate("data"))
    assert device.size == 9999 * 512
    backend.answers["GET_CONFIG"] = None
    with pytest.raises(
        ConfigError, match=r"Unable to patch the block device: the vhost-user back end .* hung up"
    ):
        bench.do("patch_drive", schema.DriveUpdate("data"))


def test_a_patch_for_the_other_kind_of_drive_is_refused(
    bench: Bench, impostor: Callable[..., Impostor]
) -> None:
    bench.put("socket", impostor().path)
    bench.do("put_drive", schema.Drive("file", False, path_on_host=str(bench.file)))
    bench.start()
    for update in (schema.DriveUpdate("socket", str(bench.file)), schema.DriveUpdate("file")):
        with pytest.raises(ConfigError, match="Running method expected different backend"):
            bench.do("patch_drive", update)


def test_metrics_have_firecrackers_names_and_no_sum(bench: Bench, impostor: Callable[..., Impostor]) -> None:
    bench.put("data", impostor().path)
    machine = bench.start()
    metrics = Metrics()
    metrics.sources.append(machine.metrics)
    tree = metrics.collect()
    assert set(tree["vhost_user_block_data"]) == {
        "activate_fails",
        "cfg_fails",
        "init_time_us",
        "activate_time_us",
        "config_change_time_us",
    }
    assert tree["vhost_user_block_data"]["init_time_us"] > 0
    assert "vhost_user_block" not in tree
    assert tree["block"]["read_count"] == 0
