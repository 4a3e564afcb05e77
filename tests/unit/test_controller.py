"""The controller: which command is allowed when, what it checks, and what it asks of the machine."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle import schema
from crackle.errors import ConfigError, CrackleError, KvmError, StateError
from crackle.telemetry.logger import OFF, Logger
from crackle.vmm.commands import ALLOWED, NOT_STARTED, NOT_YET, PAUSED, RUNNING, STOPPED, Command
from crackle.vmm.configuration import Configuration
from crackle.vmm.controller import Controller, commands_of
from crackle.vmm.devices import ASKS, KINDS, PATCHES, PUTS, configured

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BEFORE = "The requested operation is not supported before starting the microVM."
AFTER = "The requested operation is not supported after starting the microVM."


class FakeMachine:
    """Notes what it is told."""

    exit_fd = -1

    def __init__(self, config: schema.VmConfig, shell: object) -> None:
        self.config = config
        self.shell = shell
        self.told: list[object] = []
        self.failure: Exception | None = None
        self.state = RUNNING

    def start(self) -> None:
        self.told.append("start")
        if self.failure is not None:
            raise self.failure

    def pause(self) -> None:
        self.told.append("pause")
        if self.failure is not None:
            raise self.failure
        self.state = PAUSED

    def resume(self) -> None:
        self.told.append("resume")
        self.state = RUNNING

    def send_ctrl_alt_del(self) -> None:
        self.told.append("send_ctrl_alt_del")

    def update(self, kind: str, identifier: str, resource: Any, _held: object = None) -> None:
        self.told.append((kind, identifier, resource))

    def attach(self, kind: str, identifier: str, resource: Any, held: object = None) -> None:
        self.told.append(("attach", kind, identifier))
        assert resource is not None
        assert held is not None
        if self.failure is not None:
            raise self.failure

    def detach(self, kind: str, identifier: str) -> None:
        self.told.append(("detach", kind, identifier))
        if self.failure is not None:
            raise self.failure

    def metrics(self) -> dict[str, dict[str, int]]:
        assert "stop" not in self.told, "a stopped machine knows nothing"
        return {"block_data": {"read_count": 7}}

    def exit_status(self) -> None:
        return None

    def stop(self) -> None:
        self.told.append("stop")


class FakeShell:
    """Remembers for which machine it was made, and whether it was closed."""

    def __init__(self, machine: schema.MachineConfig, shared: bool) -> None:
        self.machine = machine
        self.shared = shared
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Bench:
    """A controller whose machines are fake, and what is needed to configure it."""

    def __init__(self, tmp_path: Path) -> None:
        self.kernel = tmp_path / "kernel"
        self.kernel.write_bytes(b"kernel")
        self.disk = tmp_path / "disk"
        self.disk.write_bytes(bytes(4096))
        self.machines: list[FakeMachine] = []
        self.shells: list[FakeShell] = []
        self.failure: Exception | None = None
        self.warned: list[str] = []
        self.controller = Controller(self._build, self._prepare, logger=Logger(level=OFF))
        self.controller._configuration._warn = self.warned.append

    def _build(self, config: schema.VmConfig, shell: object, _held: object) -> FakeMachine:
        machine = FakeMachine(config, shell)
        machine.failure = self.failure
        self.machines.append(machine)
        return machine

    def _prepare(self, machine: schema.MachineConfig, shared: bool, base: FakeShell | None) -> FakeShell:
        if base is not None:
            base.close()
        self.shells.append(FakeShell(machine, shared))
        return self.shells[-1]

    def do(self, name: str, resource: object = None) -> Any:
        return self.controller.execute(Command(name, resource))

    def drive(self, drive_id: str, root: bool = False, **fields: Any) -> schema.Drive:
        return schema.Drive(drive_id, root, **{"path_on_host": str(self.disk), **fields})

    def start(self) -> FakeMachine:
        self.do("put_boot_source", schema.BootSource(str(self.kernel)))
        self.do("start")
        return self.machines[-1]

    def drive_ids(self) -> list[str]:
        return [drive.drive_id for drive in self.controller.config.drives]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def bring_to(bench: Bench, state: str) -> None:
    """Put the microVM into ``state`` by the ordinary way."""
    if state == NOT_STARTED:
        return
    bench.start()
    if state == PAUSED:
        bench.do("pause")
    elif state == STOPPED:
        bench.controller.stop()
    assert bench.controller.state == state


# The table


@pytest.mark.parametrize("name", ALLOWED)
def test_every_command_is_either_carried_out_or_refused_as_not_supported_yet(name: str) -> None:
    missing = set(NOT_YET)
    generic = name in PUTS or name in PATCHES or name in ASKS
    assert (generic or hasattr(Configuration, name) or hasattr(Controller, f"_{name}")) != (name in missing)


def test_a_row_in_the_registry_is_all_that_a_device_needs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(pmem: schema.Pmem, _warn: object) -> schema.Pmem:
        if not pmem.path_on_host:
            raise ConfigError("no path")
        return msgspec.structs.replace(pmem, read_only=True)

    row = KINDS["pmem"]
    assert row.resource is not None
    resource = msgspec.structs.replace(row.resource, words="Pmem config error")
    made: Any = lambda *_: None  # noqa: E731
    row = msgspec.structs.replace(row, make=made, update=made, check=check, resource=resource)
    monkeypatch.setitem(KINDS, "pmem", row)
    monkeypatch.setitem(PUTS, "put_pmem", "pmem")
    monkeypatch.setitem(PATCHES, "patch_pmem", "pmem")
    monkeypatch.delattr(Configuration, "put_pmem")
    for name in ("put", "patch", "delete"):
        monkeypatch.delattr(Controller, f"_{name}_pmem")

    for identifier, path in (("a", "x"), ("b", "y"), ("a", "z")):
        bench.do("put_pmem", schema.Pmem(identifier, path))
    with pytest.raises(ConfigError, match=r"^Pmem config error: no path$"):
        bench.do("put_pmem", schema.Pmem("b", ""))
    config = bench.controller.config
    assert config.pmem == [schema.Pmem("a", "z", read_only=True), schema.Pmem("b", "y", read_only=True)]
    assert [(kind, name) for kind, name, _ in configured(config)] == [("pmem", "a"), ("pmem", "b")]
    assert [command.name for command in commands_of(config)].count("put_pmem") == 2

    machine = bench.start()
    update = schema.PmemUpdate("b", schema.RateLimiter(ops=schema.TokenBucket(5, 100)))
    bench.do("patch_pmem", update)
    assert machine.told[-1] == ("pmem", "b", update)
    assert config.pmem[1].rate_limiter == update.rate_limiter
    with pytest.raises(ConfigError, match="There is no pmem 'c'"):
        bench.do("patch_pmem", schema.PmemUpdate("c"))


OUT_OF_PLACE = [
    (name, state)
    for name, allowed in ALLOWED.items()
    for state in (NOT_STARTED, RUNNING, PAUSED, STOPPED)
    if state not in allowed
]


@pytest.mark.parametrize(("name", "state"), OUT_OF_PLACE)
def test_a_command_out_of_place_is_refused_and_changes_nothing(bench: Bench, name: str, state: str) -> None:
    bring_to(bench, state)
    told = [list(machine.told) for machine in bench.machines]
    message = {NOT_STARTED: BEFORE, STOPPED: "the microVM has stopped"}.get(state, AFTER)
    with pytest.raises(StateError, match=message):
        bench.do(name)
    assert bench.controller.state == state
    assert [machine.told for machine in bench.machines] == told


@pytest.mark.parametrize(
    "name",
    [name for name in NOT_YET if NOT_STARTED in ALLOWED[name]],
)
def test_what_is_not_built_yet_says_so(bench: Bench, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^Crackle does not support .* yet\.$|No balloon device found"):
        bench.do(name)


def test_the_life_of_a_microvm(bench: Bench) -> None:
    machine = bench.start()
    states = [bench.do("get_instance").state]
    for command in ("pause", "resume", "pause"):
        bench.do(command)
        states.append(bench.do("get_instance").state)
    bench.controller.stop()
    assert states == [RUNNING, PAUSED, RUNNING, PAUSED]
    assert machine.told == ["start", "pause", "resume", "pause", "stop"]


def test_a_pause_that_fails_changes_nothing_and_may_be_tried_again(bench: Bench) -> None:
    bring_to(bench, RUNNING)
    machine = bench.machines[-1]
    machine.failure = KvmError("vCPU 0 did not stand still")
    with pytest.raises(KvmError, match="vCPU 0 did not stand still"):
        bench.do("pause")
    assert bench.do("get_instance").state == RUNNING
    machine.failure = None
    bench.do("resume")
    bench.do("pause")
    assert bench.do("get_instance").state == PAUSED
    assert machine.told == ["start", "pause", "pause"]


def test_pause_and_resume_may_be_repeated(bench: Bench) -> None:
    machine = bench.start()
    for command in ("resume", "pause", "pause", "resume", "resume"):
        bench.do(command)
    assert bench.controller.state == RUNNING
    # A running machine that is told to resume would wait for its vCPUs, which may sleep for ever.
    assert machine.told == ["start", "pause", "resume"]


def test_stopping_twice_stops_the_machine_once(bench: Bench) -> None:
    machine = bench.start()
    bench.controller.stop()
    bench.controller.stop()
    assert machine.told == ["start", "stop"]


def test_the_metrics_of_a_stopped_machine_are_its_last(bench: Bench) -> None:
    bench.start()
    bench.controller.stop()
    assert bench.controller.metrics.collect()["block_data"]["read_count"] == 7


# Starting


def test_a_microvm_without_a_kernel_does_not_start(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="Start microvm error: Cannot start microvm without kernel"):
        bench.do("start")
    assert bench.controller.state == NOT_STARTED


def test_a_machine_that_fails_to_start_is_stopped_and_can_be_tried_again(bench: Bench) -> None:
    bench.failure = KvmError("no vCPU for you")
    with pytest.raises(KvmError, match=r"^Start microvm error: no vCPU for you$"):
        bench.start()
    assert bench.machines[0].told == ["start", "stop"]
    assert bench.controller.state == NOT_STARTED
    bench.failure = None
    bench.do("start")
    assert bench.controller.state == RUNNING


def test_the_machine_is_built_from_all_that_was_configured(bench: Bench) -> None:
    bench.do("put_machine", schema.MachineConfig(4, 512))
    bench.do("put_drive", bench.drive("data"))
    bench.do(
        "put_serial", schema.Serial(serial_out_path="/tmp/console", rate_limiter=schema.TokenBucket(9, 1))
    )
    config = bench.start().config
    assert config.machine_config == schema.MachineConfig(4, 512)
    assert [drive.drive_id for drive in config.drives] == ["data"]
    assert config.boot_source.kernel_image_path == str(bench.kernel)
    assert config.serial is not None
    assert (config.serial.serial_out_path, config.serial.rate_limiter) == (
        "/tmp/console",
        schema.TokenBucket(9, 1),
    )


# Making ready ahead of time


def test_a_shell_is_made_with_the_first_configuration_and_goes_to_the_machine(bench: Bench) -> None:
    bench.do("get_instance")
    assert bench.shells == []
    bench.do("put_machine", schema.MachineConfig(2, 256))
    bench.do("put_drive", bench.drive("data"))
    machine = bench.start()
    assert [shell.machine for shell in bench.shells] == [schema.MachineConfig(2, 256)]
    assert machine.shell is bench.shells[0]
    assert not bench.shells[0].closed


def test_a_shell_that_no_longer_fits_is_what_another_is_made_of(bench: Bench) -> None:
    bench.do("put_drive", bench.drive("data"))
    bench.do("patch_machine", schema.MachineConfigUpdate(mem_size_mib=64))
    assert [shell.closed for shell in bench.shells] == [True, False]
    assert bench.start().shell is bench.shells[1]


def test_a_refused_configuration_makes_no_shell(bench: Bench) -> None:
    with pytest.raises(ConfigError):
        bench.do("put_machine", schema.MachineConfig(0, 128))
    assert bench.shells == []


def test_a_shell_is_closed_when_the_microvm_is_given_up(bench: Bench) -> None:
    bench.do("put_drive", bench.drive("data"))
    bench.controller.stop()
    assert bench.shells[0].closed


def test_a_host_without_kvm_can_still_be_configured(tmp_path: Path) -> None:
    def no_kvm(_machine: schema.MachineConfig) -> None:
        raise KvmError("there is no /dev/kvm")

    bench = Bench(tmp_path)
    bench.controller = Controller(bench._build, no_kvm, logger=Logger(level=OFF))
    bench.do("put_machine", schema.MachineConfig(2, 256))
    assert bench.do("get_machine").vcpu_count == 2


# Machine configuration


def test_a_refused_machine_leaves_the_one_before(bench: Bench) -> None:
    bench.do("put_machine", schema.MachineConfig(2, 256))
    with pytest.raises(ConfigError, match=r"^Machine config error: The number of vCPUs"):
        bench.do("patch_machine", schema.MachineConfigUpdate(vcpu_count=33, mem_size_mib=64))
    assert bench.do("get_machine") == schema.MachineConfig(2, 256)


def test_the_cpu_template_that_came_last_is_used(bench: Bench) -> None:
    template = schema.CpuConfig(kvm_capabilities=["1"])
    bench.do("put_machine", schema.MachineConfig(1, 128, cpu_template="T2"))
    bench.do("put_cpu_config", template)
    assert bench.do("get_machine").cpu_template is msgspec.UNSET
    assert bench.controller.config.cpu_config == template
    bench.do("patch_machine", schema.MachineConfigUpdate(mem_size_mib=256))
    assert bench.controller.config.cpu_config == template
    bench.do("patch_machine", schema.MachineConfigUpdate(cpu_template="T2A"))
    assert bench.do("get_machine").cpu_template == "T2A"
    assert bench.controller.config.cpu_config is None
    bench.do("put_machine", schema.MachineConfig(1, 128, cpu_template="None"))
    assert bench.do("get_machine").cpu_template is msgspec.UNSET


def test_custom_templates_are_not_reported(bench: Bench) -> None:
    bench.do("put_cpu_config", schema.CpuConfig(kvm_capabilities=["1"]))
    assert bench.do("get_config").cpu_config is None


# Boot source


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kernel_image_path": "/no/kernel"},
            r"The kernel file cannot be opened: No such file .*: /no/kernel",
        ),
        (
            {"initrd_path": "/no/initrd"},
            r"The initrd file cannot be opened .* permissions\. No such file .*: /no/initrd",
        ),
        (
            {"kernel_image_path": "a\0b"},
            r"The kernel file cannot be opened: file name contained an unexpected NUL",
        ),
        ({"boot_args": "x" * 2048}, r"The kernel command line is invalid: .*2048"),
    ],
)
def test_a_boot_source_is_checked_at_once(bench: Bench, fields: dict[str, str], message: str) -> None:
    good = schema.BootSource(str(bench.kernel), boot_args="console=ttyS0")
    bench.do("put_boot_source", good)
    with pytest.raises(ConfigError, match=f"^Boot source error: {message}"):
        bench.do("put_boot_source", msgspec.structs.replace(good, **fields))
    assert bench.do("get_config").boot_source == good


def test_the_longest_command_line_has_2047_characters(bench: Bench) -> None:
    bench.do("put_boot_source", schema.BootSource(str(bench.kernel), boot_args="x" * 2047))


# Drives


def test_the_root_drive_comes_first_and_the_others_in_their_order(bench: Bench) -> None:
    for name in ("a", "b"):
        bench.do("put_drive", bench.drive(name))
    bench.do("put_drive", bench.drive("root", root=True))
    bench.do("put_drive", bench.drive("c"))
    assert bench.drive_ids() == ["root", "a", "b", "c"]


def test_a_drive_given_again_replaces_the_one_with_its_id(bench: Bench) -> None:
    for name in ("a", "b", "c"):
        bench.do("put_drive", bench.drive(name))
    bench.do("put_drive", bench.drive("b", is_read_only=True))
    assert bench.drive_ids() == ["a", "b", "c"]
    assert [drive.is_read_only for drive in bench.controller.config.drives] == [False, True, False]


def test_a_drive_given_again_as_root_moves_to_the_front(bench: Bench) -> None:
    for name in ("a", "b"):
        bench.do("put_drive", bench.drive(name))
    bench.do("put_drive", bench.drive("b", root=True))
    assert bench.drive_ids() == ["b", "a"]


def test_there_is_one_root_drive(bench: Bench) -> None:
    bench.do("put_drive", bench.drive("root", root=True))
    bench.do("put_drive", bench.drive("data"))
    for name in ("data", "other"):
        with pytest.raises(ConfigError, match=f"A root block device already exists! It is 'root'; '{name}'"):
            bench.do("put_drive", bench.drive(name, root=True))
    assert bench.drive_ids() == ["root", "data"]


def test_the_root_drive_can_be_given_again_and_can_stop_being_root(bench: Bench) -> None:
    bench.do("put_drive", bench.drive("root", root=True))
    bench.do("put_drive", bench.drive("root", root=True, is_read_only=True))
    bench.do("put_drive", bench.drive("root"))
    bench.do("put_drive", bench.drive("other", root=True))
    assert bench.drive_ids() == ["other", "root"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/disk", r"No such file or directory \(os error 2\) /no/disk"),
        ("/", r"Is a directory \(os error 21\) /"),
    ],
)
def test_a_drive_needs_a_file(bench: Bench, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^Drive config error: .*backing file: {message}"):
        bench.do("put_drive", bench.drive("data", path_on_host=path))
    with pytest.raises(ConfigError, match="path_on_host is missing"):
        bench.do("put_drive", bench.drive("data", path_on_host=None))
    assert bench.drive_ids() == []


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1000])
def test_a_drive_of_less_than_whole_sectors_is_taken_and_told_of(bench: Bench, size: int) -> None:
    bench.disk.write_bytes(bytes(size))
    bench.do("put_drive", bench.drive("data"))
    assert bench.drive_ids() == ["data"]
    told = (
        f"{bench.disk} has {size} bytes: the guest sees a disk of {size // 512} whole sectors of 512 bytes."
    )
    assert (told in bench.warned) is (size != 512)


@pytest.mark.parametrize("path", ["/", "/dev/null"])
def test_what_has_no_blocks_is_an_empty_disk_that_is_told_of_and_not_locked(bench: Bench, path: str) -> None:
    for name in ("a", "b"):
        bench.do("put_drive", bench.drive(name, path_on_host=path, is_read_only=path == "/"))
    held = bench.controller._configuration.held
    assert [(backing.size, backing.locking) for backing in held.values()] == [(0, False)] * 2  # type: ignore[union-attr]
    assert bench.warned == [f"{path} is neither a file nor a block device: the guest sees an empty disk."] * 2


@pytest.mark.parametrize("engine", [None, "Sync", "Async"])
def test_a_drive_has_the_engine_that_it_was_given(bench: Bench, engine: str | None) -> None:
    bench.do("put_drive", bench.drive("data", io_engine=engine))
    assert bench.controller.config.drives[0].io_engine == (engine or "Sync")


NO_BUCKET = schema.TokenBucket(0, 100)


@pytest.mark.parametrize(
    "limiter", [schema.RateLimiter(), schema.RateLimiter(NO_BUCKET), schema.RateLimiter(NO_BUCKET, NO_BUCKET)]
)
def test_a_rate_limiter_that_limits_nothing_is_as_good_as_none(
    bench: Bench, limiter: schema.RateLimiter
) -> None:
    bench.do("put_drive", bench.drive("data", rate_limiter=limiter))
    assert bench.controller.config.drives[0].rate_limiter is None


def test_a_limit_without_a_refill_time_limits_nothing_and_the_log_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(bench.controller._configuration, "_warn", warned.append)
    limiter = schema.RateLimiter(ops=schema.TokenBucket(5, 0))
    bench.do("put_drive", bench.drive("data", rate_limiter=limiter))
    assert bench.controller.config.drives[0].rate_limiter is None
    bench.start()
    bench.do("patch_drive", schema.DriveUpdate("data", rate_limiter=limiter))
    assert bench.controller.config.drives[0].rate_limiter == schema.RateLimiter()
    assert warned == ["The ops bucket of 5 tokens has a refill_time of 0 ms: it limits nothing."] * 2


def test_the_limits_of_a_running_drive_change_bucket_by_bucket(bench: Bench) -> None:
    ops, bandwidth = schema.TokenBucket(5, 100), schema.TokenBucket(1000, 10)
    bench.do("put_drive", bench.drive("data", rate_limiter=schema.RateLimiter(ops=ops)))
    bench.start()
    for change, left in (
        (schema.RateLimiter(bandwidth=bandwidth), schema.RateLimiter(bandwidth, ops)),
        (schema.RateLimiter(ops=NO_BUCKET), schema.RateLimiter(bandwidth)),
    ):
        update = schema.DriveUpdate("data", rate_limiter=change)
        bench.do("patch_drive", update)
        assert bench.machines[0].told[-1] == ("block", "data", update)
        assert bench.controller.config.drives[0].rate_limiter == left


@pytest.mark.parametrize("state", [RUNNING, PAUSED])
def test_a_drive_comes_and_goes_while_the_guest_runs(bench: Bench, tmp_path: Path, state: str) -> None:
    root, other = bench.drive("root", root=True), tmp_path / "other"
    other.write_bytes(bytes(512))
    bench.do("put_drive", root)
    bring_to(bench, state)
    machine = bench.machines[-1]
    for _ in range(3):
        bench.do("put_drive", bench.drive("data", path_on_host=str(other)))
        assert bench.drive_ids() == ["root", "data"]
        assert machine.told[-1] == ("attach", "block", "data")
        assert ("block", "data") in bench.controller._configuration.held
        bench.do("delete_drive", "data")
        assert bench.drive_ids() == ["root"]
        assert machine.told[-1] == ("detach", "block", "data")
        assert ("block", "data") not in bench.controller._configuration.held


def test_a_drive_that_cannot_come_or_go_changes_nothing(bench: Bench) -> None:
    bench.do("put_drive", bench.drive("root", root=True))
    machine = bench.start()
    told = list(machine.told)
    words = "^Drive config error: Unable to attach the block device: "
    for drive, reason in (
        (bench.drive("root", is_read_only=True), "The drive 'root' is there already"),
        (bench.drive("more", root=True), "The guest has started: 'more' cannot be its root device"),
        (
            schema.Drive("more", False, socket="/tmp/none"),
            "A vhost-user drive needs guest memory that is shared",
        ),
    ):
        with pytest.raises(ConfigError, match=words + reason):
            bench.do("put_drive", drive)
    with pytest.raises(ConfigError, match=r"^Drive config error: .* No such file"):
        bench.do("put_drive", bench.drive("more", path_on_host="/none"))
    for name, reason in (("root", "is the root device, which a guest keeps"), ("none", "Device not found")):
        with pytest.raises(ConfigError, match=reason):
            bench.do("delete_drive", name)
    assert machine.told == told
    machine.failure = ConfigError("there is no descriptor left")
    with pytest.raises(ConfigError, match=words + "there is no descriptor left$"):
        bench.do("put_drive", bench.drive("more"))
    machine.failure = None
    assert bench.drive_ids() == ["root"]
    assert list(bench.controller._configuration.held) == [("block", "root")]
    bench.do("put_drive", bench.drive("more"))
    machine.failure = ConfigError("the guest still uses it")
    with pytest.raises(ConfigError, match=r"Unable to detach the block device: the guest still uses it$"):
        bench.do("delete_drive", "more")
    assert bench.drive_ids() == ["root", "more"]


def test_a_running_drive_gets_another_file(bench: Bench, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(512))
    bench.do("put_drive", bench.drive("data"))
    machine = bench.start()
    update = schema.DriveUpdate("data", str(other))
    bench.do("patch_drive", update)
    assert machine.told[-1] == ("block", "data", update)
    assert bench.do("get_config").drives[0].path_on_host == str(other)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (schema.DriveUpdate("none", "/dev/null"), "There is no drive 'none'"),
        (schema.DriveUpdate("data"), "nothing to change"),
        (schema.DriveUpdate("data", "/no/disk"), "No such file or directory"),
    ],
)
def test_a_drive_update_that_cannot_be_done_changes_nothing(
    bench: Bench, update: schema.DriveUpdate, message: str
) -> None:
    bench.do("put_drive", bench.drive("data"))
    machine = bench.start()
    with pytest.raises(ConfigError, match=f"^Drive config error: .*{message}"):
        bench.do("patch_drive", update)
    assert machine.told == ["start"]
    assert bench.do("get_config").drives[0].path_on_host == str(bench.disk)


# Outputs and answers


def test_the_id_and_the_operators_properties_are_in_every_line_on_request(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "metrics"
    bench.do("put_metrics", schema.MetricsConfig(str(path), emit_id=True, properties={"zone": "b"}))
    bench.controller.metrics.flush()
    line = json.loads(path.read_text())
    assert (line["id"], line["properties"]) == (bench.controller.instance_id, {"zone": "b"})


def test_metrics_are_configured_once(bench: Bench, tmp_path: Path) -> None:
    bench.do("put_metrics", schema.MetricsConfig(str(tmp_path / "metrics")))
    with pytest.raises(ConfigError, match=r"^Metrics error: .*Reinitialization of metrics not allowed"):
        bench.do("put_metrics", schema.MetricsConfig(str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("command", "resource"),
    [
        ("put_logger", schema.LoggerConfig(log_path="/no/dir/log")),
        ("put_metrics", schema.MetricsConfig("/no/dir/metrics")),
    ],
)
def test_an_output_that_cannot_be_opened_is_refused(bench: Bench, command: str, resource: object) -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory \(os error 2\): /no/dir/"):
        bench.do(command, resource)


def test_the_answers(bench: Bench) -> None:
    info = bench.do("get_instance")
    assert (info.id, info.state, info.app_name) == ("anonymous-instance", "Not started", "Crackle")
    assert bench.do("get_version").firecracker_version == info.vmm_version
    assert bench.do("get_machine") == schema.MachineConfig(1, 128)


def test_the_configuration_shown_can_be_given_as_a_file(bench: Bench, tmp_path: Path) -> None:
    bench.do("put_machine", schema.MachineConfig(2, 64, smt=True))
    bench.do("put_drive", bench.drive("root", root=True))
    bench.do("put_boot_source", schema.BootSource(str(bench.kernel)))
    shown = msgspec.json.encode(bench.do("get_config"))
    bench.controller.stop()
    other = Bench(tmp_path)
    other.controller.configure(msgspec.json.decode(shown, type=schema.VmConfig))
    assert msgspec.json.encode(other.do("get_config")) == shown


def test_a_configuration_file_stands_for_commands_with_the_outputs_first(bench: Bench) -> None:
    config = schema.VmConfig(
        drives=[bench.drive("a"), bench.drive("b")],
        boot_source=schema.BootSource(str(bench.kernel)),
        logger=schema.LoggerConfig(),
        machine_config=schema.MachineConfig(1, 128),
        vsock=schema.Vsock(3, "/tmp/v"),
    )
    names = [command.name for command in commands_of(config)]
    assert names == ["put_logger", "put_machine", "put_boot_source", "put_drive", "put_drive", "put_vsock"]


def _step(bench: Bench) -> dict[str, Callable[[], object]]:
    return {
        "pause": lambda: bench.do("pause"),
        "resume": lambda: bench.do("resume"),
        "start": lambda: bench.do("start"),
        "kernel": lambda: bench.do("put_boot_source", schema.BootSource(str(bench.kernel))),
        "machine": lambda: bench.do("put_machine", schema.MachineConfig(2, 64)),
        "ctrl_alt_del": lambda: bench.do("send_ctrl_alt_del"),
        "stop": bench.controller.stop,
    }


@given(
    st.lists(
        st.sampled_from(["pause", "resume", "start", "kernel", "machine", "ctrl_alt_del", "stop"]),
        max_size=12,
    )
)
def test_whatever_the_order_there_is_one_machine_and_it_is_told_sensible_things(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    bench = Bench(tmp_path_factory.mktemp("order"))
    for step in steps:
        with contextlib.suppress(CrackleError):
            _step(bench)[step]()
    assert len(bench.machines) <= 1
    for machine in bench.machines:
        assert machine.told[0] == "start"
        assert machine.told.count("start") == 1
        assert "stop" not in machine.told[:-1]
    running = bench.controller.machine is not None
    assert running == (bench.controller.state in (RUNNING, PAUSED))
