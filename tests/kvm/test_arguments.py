"""What `MicroVM` refuses of its arguments, which is what the API refuses, in the same words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crackle import (
    Balloon,
    ConfigError,
    Drive,
    EntropyDevice,
    MicroVM,
    MmdsConfig,
    NetworkInterface,
    RateLimiter,
    TokenBucket,
    VirtioDevice,
    Vsock,
)
from crackle.api.routes import RequestError, find_route, parse


class Device(VirtioDevice):
    """Never started here."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory, the present one, with an empty kernel and a disk."""
    (tmp_path / "kernel").touch()
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def api_says(method: str, path: str, body: dict[str, Any]) -> str:
    """What the API answers to a body that it refuses, but for its beginning and for the place in the text."""
    text = json.dumps(body).encode()
    with pytest.raises(RequestError) as refused:
        parse(*find_route(method, path, text), text)
    begin = "An error occurred when deserializing the json body of a request: "
    return re.sub(r" at line \d+ column \d+", "", str(refused.value).removeprefix(begin))


DRIVE = {"drive_id": "d", "is_root_device": False, "path_on_host": "disk"}
MACHINE = {"vcpu_count": 1, "mem_size_mib": 128}
CARD = {"iface_id": "eth0", "host_dev_name": "t"}
LIKE_THE_API: dict[str, tuple[dict[str, Any], tuple[str, dict[str, Any]]]] = {
    "huge pages of no size": ({"huge_pages": "1G"}, ("/machine-config", MACHINE | {"huge_pages": "1G"})),
    "memory as text": ({"memory": "128"}, ("/machine-config", MACHINE | {"mem_size_mib": "128"})),
    "memory below nothing": ({"memory": -1}, ("/machine-config", MACHINE | {"mem_size_mib": -1})),
    "vCPUs as truth": ({"cpus": True}, ("/machine-config", MACHINE | {"vcpu_count": True})),
    "half a vCPU": ({"cpus": 1.5}, ("/machine-config", MACHINE | {"vcpu_count": 1.5})),
    "no vCPUs": ({"cpus": None}, ("/machine-config", MACHINE | {"vcpu_count": None})),
    "300 vCPUs": ({"cpus": 300}, ("/machine-config", MACHINE | {"vcpu_count": 300})),
    "smt as text": ({"smt": "yes"}, ("/machine-config", MACHINE | {"smt": "yes"})),
    "boot arguments as a number": (
        {"boot_args": 5},
        ("/boot-source", {"kernel_image_path": "kernel", "boot_args": 5}),
    ),
    "read-only as text": (
        {"drives": [Drive("d", False, path_on_host="disk", is_read_only="no")]},  # type: ignore[arg-type]
        ("/drives/d", DRIVE | {"is_read_only": "no"}),
    ),
    "an engine of another name": (
        {"drives": [Drive("d", False, path_on_host="disk", io_engine="async")]},  # type: ignore[arg-type]
        ("/drives/d", DRIVE | {"io_engine": "async"}),
    ),
    "a limit within a limit": (
        {"drives": [Drive("d", False, path_on_host="disk", rate_limiter=RateLimiter(TokenBucket("1", 2)))]},  # type: ignore[arg-type]
        ("/drives/d", DRIVE | {"rate_limiter": {"bandwidth": {"size": "1", "refill_time": 2}}}),
    ),
    "a name that is no identifier": (
        {"drives": [Drive("a b", False, path_on_host="disk")]},
        ("/drives/a b", DRIVE | {"drive_id": "a b"}),
    ),
    "a card as a number": ({"interfaces": [5]}, ("/network-interfaces/eth0", CARD | {"host_dev_name": 5})),
    "no MAC address": (
        {"interfaces": [NetworkInterface("eth0", "t", guest_mac="02:00")]},
        ("/network-interfaces/eth0", CARD | {"guest_mac": "02:00"}),
    ),
    "an MTU as text": (
        {"interfaces": [NetworkInterface("eth0", "t", mtu="1500")]},  # type: ignore[arg-type]
        ("/network-interfaces/eth0", CARD | {"mtu": "1500"}),
    ),
    "a CID as text": (
        {"vsock": Vsock("3", "v.sock")},  # type: ignore[arg-type]
        ("/vsock", {"guest_cid": "3", "uds_path": "v.sock"}),
    ),
    "a balloon as text": (
        {"balloon": Balloon("1", False)},  # type: ignore[arg-type]
        ("/balloon", {"amount_mib": "1", "deflate_on_oom": False}),
    ),
    "a limit of an entropy device as text": (
        {"entropy": EntropyDevice(RateLimiter(TokenBucket("1", 2)))},  # type: ignore[arg-type]
        ("/entropy", {"rate_limiter": {"bandwidth": {"size": "1", "refill_time": 2}}}),
    ),
    "a version of its own": (
        {"mmds": MmdsConfig(["eth0"], "V3")},  # type: ignore[arg-type]
        ("/mmds/config", {"network_interfaces": ["eth0"], "version": "V3"}),
    ),
}


@pytest.mark.parametrize("name", LIKE_THE_API)
def test_a_wrong_value_gets_the_apis_sentence(files: Path, name: str) -> None:
    options, (path, body) = LIKE_THE_API[name]
    with pytest.raises(ConfigError) as refused:
        MicroVM("kernel", **options)
    assert str(refused.value).partition("error: ")[2] == api_says("PUT", path, body)


OF_THE_LIBRARY: dict[str, tuple[dict[str, Any], str]] = {
    "a class for an instance": ({"devices": [Device]}, "the class Device: give an instance, Device()"),
    "something else for a device": ({"devices": [object()]}, "devices[0] is no crackle.VirtioDevice"),
    "one device for a list": ({"devices": Device()}, "devices must be a list or tuple"),
    "one path for a list": ({"drives": "disk"}, "drives must be a list or tuple"),
    "one name for a list": ({"interfaces": "tap0"}, "interfaces must be a list or tuple"),
    "a kernel that is no path": ({"kernel": 5}, "kernel must be a path, not 5"),
    "an open disk": ({"rootfs": 0}, "rootfs must be a path, not 0"),
    "a drive that is no path": ({"drives": ["disk", 5]}, "drives[1] must be a path, not 5"),
    "a balloon that is none": ({"balloon": True}, "balloon must be a number of MiB or a crackle.Balloon"),
    "an entropy device that is none": (
        {"entropy": 5},
        "entropy must be True, False or a crackle.EntropyDevice",
    ),
    "a vsock that is no path": ({"vsock": 5}, "vsock must be a path, not 5"),
    "a console that is no pair": ({"console": 0}, "console must be the descriptors (input, output)"),
    "a console that is no numbers": ({"console": ("in", "out")}, "console must be the descriptors"),
    "read-only as text": ({"read_only": "no"}, "read_only must be True or False, not 'no'"),
    "profile as a number": ({"profile": 1}, "profile must be True or False, not 1"),
    "a name that is none": (
        {"instance_id": "a b"},
        "Invalid instance ID: invalid character ( ) at position 1",
    ),
    "a name that is no text": ({"instance_id": 5}, "instance_id must be text, not 5"),
    "another's logger": ({"logger": print}, "logger must be a crackle.Logger"),
    "metadata that is no JSON": ({"metadata": {"a": object()}}, "the metadata must be a JSON document"),
    "a limit that is none": ({"metadata_limit": -1}, "metadata_limit must be a number of bytes, not -1"),
}


@pytest.mark.parametrize("name", OF_THE_LIBRARY)
def test_what_no_resource_carries_is_checked_too(files: Path, name: str) -> None:
    options, sentence = OF_THE_LIBRARY[name]
    with pytest.raises(ConfigError) as refused:
        MicroVM(**{"kernel": "kernel", **options})
    assert sentence in str(refused.value)


@pytest.fixture
def vm(guests: Path, files: Path) -> Iterator[MicroVM]:
    """One that runs, with a drive."""
    with MicroVM(guests / "idle.elf", drives=["disk"], memory=64) as vm:
        yield vm


CHANGES: dict[str, tuple[Callable[[MicroVM], None], str]] = {
    "a path that is none": (lambda vm: vm.update_drive("drive0", 5), "path must be a path, not 5"),  # type: ignore[arg-type]
    "a drive that is no text": (lambda vm: vm.update_drive(5), "Expected `str`, got `int`"),  # type: ignore[arg-type]
    "a limiter that is none": (
        lambda vm: vm.update_drive("drive0", rate_limiter="fast"),  # type: ignore[arg-type]
        "Expected `object | null`, got `str`, at `$.rate_limiter`",
    ),
    "a card's limiter": (
        lambda vm: vm.update_interface("eth0", rx_limiter=5),  # type: ignore[arg-type]
        "Expected `object | null`, got `int`, at `$.rx_rate_limiter`",
    ),
    "a patch that is no JSON": (
        lambda vm: vm.patch_metadata({1, object()}),
        "the patch must be a JSON document",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_checked_like_arguments(vm: MicroVM, name: str) -> None:
    change, sentence = CHANGES[name]
    with pytest.raises(ConfigError) as refused:
        change(vm)
    assert sentence in str(refused.value)


def test_paths_of_any_kind_are_taken(guests: Path, files: Path) -> None:
    kernel = guests / "hello.elf"
    for path in (kernel, str(kernel), bytes(kernel)):
        with MicroVM(path, memory=64) as vm:  # type: ignore[arg-type]
            assert vm.wait(20).reason == "reset"
