"""Other things of the host for the devices of a microVM that goes on elsewhere."""

from __future__ import annotations

from crackle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from crackle.schema import SnapshotLoad, VmConfig
    from crackle.schema.fork import Clone

_UNKNOWN = "Failed to get snapshot state from file: Unknown {} Device. The snapshot has no {} {!r}."


def override(config: VmConfig, request: SnapshotLoad | Clone) -> None:
    """Have other things of the host for devices, as `request` says. ConfigError for one that there is not."""
    for network in request.network_overrides:
        interface = _find(config.network_interfaces, "iface_id", network.iface_id, "Network", "interface")
        interface.host_dev_name = network.host_dev_name
    for file in request.drive_overrides:
        drive = _find(config.drives, "drive_id", file.drive_id, "Block", "drive")
        drive.path_on_host = file.path_on_host
    if request.vsock_override is not None:
        if config.vsock is None:
            raise ConfigError("Failed to get snapshot state from file: Unknown Vsock Device.")
        config.vsock.uds_path = request.vsock_override.uds_path


def _find(section: list[Any], field: str, name: str, kind: str, what: str) -> Any:
    for resource in section:
        if getattr(resource, field) == name:
            return resource
    raise ConfigError(_UNKNOWN.format(kind, what, name))
