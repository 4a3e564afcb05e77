"""Other things of the host for the devices of a microVM that goes on elsewhere."""

from __future__ import annotations

import os

import msgspec

from crackle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from crackle.schema import Drive, NetworkInterface, Overlay, SnapshotLoad
    from crackle.schema.fork import Clone
    from crackle.snapshot.state import SavedDevice, Snapshot

UNKNOWN = "Failed to get snapshot state from file: Unknown {} Device. The snapshot has no {} {!r}."


def override(found: Snapshot, request: SnapshotLoad | Clone) -> Snapshot:
    """What was saved, with other things of the host for devices, as `request` says. Its configuration is changed.

    ConfigError for a device that there is not.
    """
    config = found.config
    for network in request.network_overrides:
        interface = named(config.network_interfaces, "iface_id", network.iface_id, "Network", "interface")
        interface.host_dev_name = network.host_dev_name
        if network.guest_mac is not None:
            found = _with_mac(found, interface, network.guest_mac.lower())
    for file in request.drive_overrides:
        drive = named(config.drives, "drive_id", file.drive_id, "Block", "drive")
        if file.path_on_host is not None:
            drive.path_on_host = file.path_on_host
        if file.overlay is not None:
            drive.overlay = _clone_of(drive, file.overlay)
    if request.vsock_override is not None:
        if config.vsock is None:
            raise ConfigError("Failed to get snapshot state from file: Unknown Vsock Device.")
        config.vsock.uds_path = request.vsock_override.uds_path
        if request.vsock_override.guest_cid is not None:
            config.vsock.guest_cid = request.vsock_override.guest_cid
            found = with_own(found, ("vsock", "vsock"), cid=config.vsock.guest_cid)
    return found


def _with_mac(found: Snapshot, interface: NetworkInterface, mac: str) -> Snapshot:
    if interface.guest_mac is None:
        raise ConfigError(
            f"The guest of this snapshot has chosen the MAC address of {interface.iface_id!r} itself: "
            "leave guest_mac out."
        )
    interface.guest_mac = mac
    return with_own(found, ("net", interface.iface_id), mac=bytes.fromhex(mac.replace(":", "")))


def with_own(found: Snapshot, key: tuple[str, str], **changes: Any) -> Snapshot:
    """As if the device had saved these of its own: what its configuration space says."""

    def changed(device: SavedDevice) -> SavedDevice:
        if (device.kind, device.identifier) != key:
            return device
        state = device.transport.device
        own = state.own
        # Out of a file it is a dict.
        own = {**own, **changes} if isinstance(own, dict) else msgspec.structs.replace(own, **changes)
        transport = msgspec.structs.replace(device.transport, device=msgspec.structs.replace(state, own=own))
        return msgspec.structs.replace(device, transport=transport)

    devices = tuple(changed(device) for device in found.machine.devices)
    return msgspec.structs.replace(found, machine=msgspec.structs.replace(found.machine, devices=devices))


def _clone_of(drive: Drive, overlay: Overlay) -> Overlay:
    """The overlay for a drive of the snapshot: if it is to be made, over the one that the snapshot has."""
    before = drive.overlay
    if overlay.over is not None or before is msgspec.UNSET or before.path is None:
        return overlay
    if overlay.path is not None and os.path.lexists(overlay.path):
        return overlay
    return msgspec.structs.replace(overlay, over=before.path)


def named(section: list[Any], field: str, name: str, kind: str, what: str) -> Any:
    """What is called so in a section of the configuration. ConfigError when nothing is."""
    for resource in section:
        if getattr(resource, field) == name:
            return resource
    raise ConfigError(UNKNOWN.format(kind, what, name))
