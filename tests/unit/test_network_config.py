"""Network interfaces as commands: what PUT accepts and holds, what PATCH changes, what is refused and how."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crackle import schema
from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.schema.codec import decode, explain
from crackle.telemetry.logger import OFF, Logger
from crackle.virtio.net.tap import open_tap
from crackle.vmm.commands import Command
from crackle.vmm.controller import Controller
from crackle.vmm.devices import KINDS, make
from support.network import Namespace

MAC = "06:f0:0d:00:00:a1"
BUCKET = schema.TokenBucket(1000, 100)


class FakeMachine:
    """Has the real network devices and nothing else."""

    exit_fd = -1
    state = "Running"

    def __init__(self, config: schema.VmConfig, held: Mapping[tuple[str, str], Any]) -> None:
        self.memory = GuestMemory([(0, 1 << 20)])
        self.devices: dict[str, Any] = {}
        for interface in config.network_interfaces:
            self.devices[interface.iface_id] = make(
                self.memory, "net", interface, held.get(("net", interface.iface_id))
            )

    def start(self) -> None: ...

    def attach(self, kind: str, identifier: str, resource: Any, held: Any = None) -> None:
        self.devices[identifier] = make(self.memory, kind, resource, held)

    def detach(self, _kind: str, identifier: str) -> None:
        self.devices.pop(identifier).close()

    def update(self, kind: str, identifier: str, resource: Any) -> None:
        update = KINDS[kind].update
        assert update is not None
        update(self.devices[identifier], resource)

    def metrics(self) -> dict[str, Any]:
        return {f"net_{name}": device.counters() for name, device in self.devices.items()}

    def exit_status(self) -> None:
        return None

    def stop(self) -> None:
        for device in self.devices.values():
            device.close()
        self.memory.close()


class Bench:
    def __init__(self, namespace: Namespace, tmp_path: Path) -> None:
        self.tap, self.other = namespace.tap(), namespace.tap()
        self.kernel = tmp_path / "kernel"
        self.kernel.touch()
        self.controller = Controller(
            lambda config, _, held: FakeMachine(config, held), logger=Logger(level=OFF)
        )

    def put(self, iface_id: str = "eth0", host_dev_name: str = "", **fields: Any) -> None:
        interface = schema.NetworkInterface(iface_id, host_dev_name or self.tap, **fields)
        self.controller.execute(Command("put_network", interface))

    def patch(self, iface_id: str = "eth0", **fields: Any) -> None:
        self.controller.execute(Command("patch_network", schema.NetworkInterfaceUpdate(iface_id, **fields)))

    def start(self) -> FakeMachine:
        self.controller.execute(Command("put_boot_source", schema.BootSource(str(self.kernel))))
        self.controller.execute(Command("start"))
        assert isinstance(self.controller.machine, FakeMachine)
        return self.controller.machine

    @property
    def interfaces(self) -> list[dict[str, Any]]:
        config = self.controller.execute(Command("get_config"))
        found: list[dict[str, Any]] = msgspec.json.decode(msgspec.json.encode(config))["network-interfaces"]
        return found


@pytest.fixture
def bench(namespace: Namespace, tmp_path: Path) -> Iterator[Bench]:
    with namespace.entered():
        bench = Bench(namespace, tmp_path)
        yield bench
        bench.controller.stop()


def test_an_interface_is_shown_as_it_was_configured(bench: Bench) -> None:
    bench.put(guest_mac=MAC.upper(), mtu=9000, rx_rate_limiter=schema.RateLimiter(BUCKET))
    bench.put("eth1", bench.other, tx_rate_limiter=schema.RateLimiter())
    first, second = bench.interfaces
    assert first == {
        "iface_id": "eth0",
        "host_dev_name": bench.tap,
        "guest_mac": MAC,
        "mtu": 9000,
        "rx_rate_limiter": {
            "bandwidth": {"size": 1000, "refill_time": 100, "one_time_burst": None},
            "ops": None,
        },
        "tx_rate_limiter": None,
    }
    assert (second["guest_mac"], second["tx_rate_limiter"]) == (None, None)


def test_the_tap_is_held_from_the_moment_it_is_configured(bench: Bench) -> None:
    bench.put()
    with pytest.raises(ConfigError, match="in use"):
        open_tap(bench.tap)
    machine = bench.start()
    with pytest.raises(ConfigError, match="in use"):
        open_tap(bench.tap)
    assert machine.metrics()["net_eth0"]["tx_count"] == 0
    bench.controller.stop()
    os.close(open_tap(bench.tap))


def test_a_microvm_that_never_starts_gives_its_taps_back(bench: Bench) -> None:
    bench.put()
    bench.controller.stop()
    os.close(open_tap(bench.tap))


def test_an_interface_may_be_configured_again_with_and_without_another_tap(bench: Bench) -> None:
    bench.put()
    bench.put(mtu=1400)
    bench.put(host_dev_name=bench.other)
    bench.put("eth1", bench.tap)
    assert [(one["iface_id"], one["host_dev_name"]) for one in bench.interfaces] == [
        ("eth0", bench.other),
        ("eth1", bench.tap),
    ]


def test_a_tap_that_did_not_exist_is_there_to_be_set_up_before_the_start(
    bench: Bench, namespace: Namespace
) -> None:
    bench.put(host_dev_name="fresh")
    namespace.ip("link set fresh up")
    bench.start()
    assert "fresh" in [link["ifname"] for link in namespace.show("link")]


def test_an_interface_without_a_name_has_the_one_that_the_kernel_chooses(bench: Bench) -> None:
    bench.put(host_dev_name="")
    name = bench.interfaces[0]["host_dev_name"]
    assert name.startswith("tap")
    bench.put(iface_id="eth1", host_dev_name="odd\0name")
    assert [interface["host_dev_name"] for interface in bench.interfaces] == [name, "odd"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            lambda b: {"iface_id": "eth1", "host_dev_name": b.tap},
            "os error 16.*in use by the interface 'eth0'",
        ),
        (
            lambda b: {"iface_id": "eth1", "host_dev_name": b.other, "guest_mac": MAC.upper()},
            f"The MAC address is already in use: {MAC}",
        ),
        (lambda _: {"mtu": 67}, r"MTU 67 is out of range \[68, 65535\]"),
        (lambda _: {"host_dev_name": "name-that-is-too-long"}, "21 bytes"),
        (lambda _: {"host_dev_name": "lo"}, "os error 22.*is no TAP"),
        (lambda _: {"drop_spoofed_mac": True}, "guest_mac"),
        (lambda _: {"rx_rate_limiter": schema.RateLimiter(schema.TokenBucket(1, -1))}, "refill_time"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_sentence_and_changes_nothing(
    bench: Bench, fields: Callable[[Bench], dict[str, Any]], words: str
) -> None:
    bench.put(guest_mac=MAC)
    before = bench.interfaces
    with pytest.raises(ConfigError, match=f"^Network config error: .*{words}") as caught:
        bench.put(**fields(bench))
    assert "\n" not in str(caught.value)
    assert bench.interfaces == before
    bench.start()


@pytest.mark.parametrize("mac", ["", "06:f0:0d:00:00", "06:f0:0d:00:00:0g", "060d", "06-f0-0d-00-00-a1"])
def test_a_bad_mac_is_refused_by_name(mac: str) -> None:
    body = msgspec.json.encode({"iface_id": "e", "host_dev_name": "t", "guest_mac": mac})
    with pytest.raises(msgspec.ValidationError) as caught:
        decode(body, schema.NetworkInterface)
    said = explain(caught.value, schema.NetworkInterface, body)
    assert said.startswith("The provided MAC address is invalid: six pairs")
    assert f'"{mac}"' in said


def test_limits_change_while_the_guest_runs(bench: Bench) -> None:
    bench.put(rx_rate_limiter=schema.RateLimiter(BUCKET, BUCKET))
    device = bench.start().devices["eth0"]
    assert (device.rx_limiter.limited, device.tx_limiter.limited) == (True, False)
    none = schema.TokenBucket(0, 0)
    bench.patch(
        rx_rate_limiter=schema.RateLimiter(none, none), tx_rate_limiter=schema.RateLimiter(None, BUCKET)
    )
    assert (device.rx_limiter.limited, device.tx_limiter.limited) == (False, True)
    assert bench.interfaces[0]["tx_rate_limiter"]["ops"]["size"] == 1000


def test_a_change_that_cannot_be_is_refused(bench: Bench) -> None:
    bench.put()
    bench.start()
    with pytest.raises(ConfigError, match="no network interface 'eth7'"):
        bench.patch("eth7")
    with pytest.raises(ConfigError, match="refill_time"):
        bench.patch(
            rx_rate_limiter=schema.RateLimiter(BUCKET),
            tx_rate_limiter=schema.RateLimiter(schema.TokenBucket(1, -1)),
        )
    assert bench.interfaces[0]["rx_rate_limiter"] is None
