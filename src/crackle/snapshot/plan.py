"""What the clones of a fork are to be: completed, and checked before anybody stands still for them."""

from __future__ import annotations

import os

import msgspec

from crackle.errors import ConfigError
from crackle.schema.snapshot import VsockOverride
from crackle.telemetry.logger import instance_id_problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from crackle.schema import VmConfig
    from crackle.schema.fork import Clone


def plan(clones: list[Clone], config: VmConfig, api_sock: str) -> list[Clone]:
    """The clones with what they do not say filled in. ConfigError when two would have the same, or one has too little.

    api_sock: the parent's.
    """
    complete = [_completed(clone, config, api_sock) for clone in clones]
    for clone in complete:
        _check(clone, config)
    _check_distinct(complete)
    return complete


def _completed(clone: Clone, config: VmConfig, api_sock: str) -> Clone:
    name = f"clone-{os.urandom(8).hex()}" if clone.id is None else clone.id
    vsock = clone.vsock_override
    if vsock is None and config.vsock is not None and config.vsock.uds_path:
        vsock = VsockOverride(f"{config.vsock.uds_path}.{name}")
    complete: Clone = msgspec.structs.replace(
        clone,
        id=name,
        api_sock=_beside(api_sock, f"{name}.sock") if clone.api_sock is None else clone.api_sock,
        vsock_override=vsock,
    )
    return complete


def _beside(path: str, name: str) -> str:
    return os.path.join(os.path.dirname(path), name)


def _check(clone: Clone, config: VmConfig) -> None:
    name = clone.id or ""
    if (problem := instance_id_problem(name)) is not None:
        raise ConfigError(problem)
    taps = [override.iface_id for override in clone.network_overrides]
    files = [override.drive_id for override in clone.drive_overrides]
    interfaces = [interface.iface_id for interface in config.network_interfaces]
    _check_known(taps, interfaces, "network interface")
    _check_known(files, [drive.drive_id for drive in config.drives], "drive")
    if clone.vsock_override is not None and config.vsock is None:
        raise ConfigError("The microVM has no vsock device whose path could be another.")
    if clone.mmds is not msgspec.UNSET and config.mmds_config is None:
        raise ConfigError("The microVM has no metadata service that could have a document.")
    for interface in interfaces:
        if interface not in taps:
            raise ConfigError(
                f"The clone {name!r} cannot have the TAP device of the interface {interface!r} too: name another in "
                "its network_overrides."
            )
    for drive in config.drives:
        if drive.path_on_host is not None and not drive.is_read_only and drive.drive_id not in files:
            raise ConfigError(
                f"The clone {name!r} cannot write to the file of the drive {drive.drive_id!r} too: name a copy of it "
                "in its drive_overrides."
            )


def _check_known(given: list[str], known: list[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"The microVM has no {what} {name!r}.")
        if given.count(name) > 1:
            raise ConfigError(f"The {what} {name!r} is overridden twice for one clone.")


def _check_distinct(clones: list[Clone]) -> None:
    sockets = [clone.vsock_override.uds_path for clone in clones if clone.vsock_override is not None]
    for what, names in (
        ("id", [clone.id for clone in clones]),
        ("api_sock", [clone.api_sock for clone in clones]),
        ("TAP device", [tap.host_dev_name for clone in clones for tap in clone.network_overrides]),
        ("vsock path", [path for path in sockets if path]),
        ("serial_out_path", [clone.serial_out_path for clone in clones]),
        ("metrics_path", [clone.metrics_path for clone in clones]),
    ):
        if (twice := _twice(name for name in names if name is not None)) is not None:
            raise ConfigError(f"Two clones cannot have the same {what}: {twice}")


def _twice(names: Iterable[str]) -> str | None:
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
