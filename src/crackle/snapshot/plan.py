"""What the clones of a fork are to be: completed, and checked before anybody stands still for them."""

from __future__ import annotations

import os

import msgspec

from crackle.errors import ConfigError
from crackle.schema.drive import Drive, DriveUpdate, Overlay
from crackle.schema.snapshot import DriveOverride, VsockOverride
from crackle.snapshot.overrides import with_own
from crackle.telemetry.logger import instance_id_problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from crackle.schema import VmConfig
    from crackle.schema.fork import Clone
    from crackle.snapshot.fork import Heritage


class Plan(msgspec.Struct, frozen=True):
    """The clones with what they do not say filled in.

    layers: what is done to the parent's drives when it stands still, so that what they are then stays as it is.
    """

    clones: list[Clone]
    layers: list[DriveUpdate]

    def flush(self, config: VmConfig, *, made: bool = False) -> None:
        """Have the disks of drives that get new layers on the host's disks, where the guest may flush. OSError.

        Before the fork, so that it finds little to wait for. made: after it, with the new overlays.
        """
        from crackle.disk.overlay import sync_directory

        layered = {layer.drive_id for layer in self.layers}
        for drive in config.drives:
            if drive.drive_id not in layered or drive.cache_type != "Writeback":
                continue
            path = (drive.path_on_host if drive.overlay is msgspec.UNSET else drive.overlay.path) or ""
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
            if made:
                sync_directory(path)

    def lie_lower(self, heritage: Heritage, drive_id: str, path: str | None, contents: str | None) -> None:
        """Have the clones' overlays of a drive lie over another overlay than the parent's, which holds nothing.

        path, contents: of the one under that, its id; None for the base.
        """
        for clone in self.clones:
            for file in clone.drive_overrides:
                if file.drive_id == drive_id and file.overlay is not None:
                    file.overlay.over = path
        for drive in heritage.snapshot.config.drives:
            if drive.drive_id == drive_id:
                drive.overlay = msgspec.UNSET if path is None else Overlay(path)
        heritage.snapshot = with_own(heritage.snapshot, ("block", drive_id), overlay=contents)


def plan(clones: list[Clone], config: VmConfig, api_sock: str) -> Plan:
    """How these clones are to be had. ConfigError when two would have the same, or one has too little.

    api_sock: the parent's.
    """
    complete = [_completed(clone, config, api_sock) for clone in clones]
    for clone in complete:
        _check(clone, config)
    _check_distinct(complete)
    return Plan(complete, [_new_layer(drive) for drive in config.drives if _is_layered(drive, complete)])


def _completed(clone: Clone, config: VmConfig, api_sock: str) -> Clone:
    name = f"clone-{os.urandom(8).hex()}" if clone.id is None else clone.id
    vsock = clone.vsock_override
    if vsock is None and config.vsock is not None and config.vsock.uds_path:
        vsock = VsockOverride(f"{config.vsock.uds_path}.{name}")
    overlays = [_own_overlay(drive, clone, name) for drive in config.drives if _is_written(drive)]
    complete: Clone = msgspec.structs.replace(
        clone,
        drive_overrides=[*_plain(clone), *(each for each in overlays if each is not None)],
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
        if _is_written(drive) and drive.drive_id not in files:
            raise ConfigError(
                f"The clone {name!r} cannot write to the file of the drive {drive.drive_id!r} too: name a copy of it, "
                "or an overlay that is to be made, in its drive_overrides."
            )


# -- drives: each gets an overlay of its own over what the drive is when the microVM stands still ----------------------


def _is_written(drive: Drive) -> bool:
    return drive.path_on_host is not None and not drive.is_read_only


def _plain(clone: Clone) -> list[DriveOverride]:
    """Those of its drives for which no overlay is to be made."""
    return [each for each in clone.drive_overrides if each.overlay is None]


def _own_overlay(drive: Drive, clone: Clone, name: str) -> DriveOverride | None:
    """The overlay that a clone gets for a drive; None where it does not."""
    given = next((each for each in clone.drive_overrides if each.drive_id == drive.drive_id), None)
    before = None if drive.overlay is msgspec.UNSET else drive.overlay
    if given is None:
        if before is None:
            return None
        overlay = Overlay(_beside(before.path or "", f"{name}.{drive.drive_id}.overlay"))
        overlay.size_limit = before.size_limit
        given = DriveOverride(drive.drive_id, overlay=overlay)
    if given.overlay is None:
        return None
    _check_overlay(drive, given)
    over = None if before is None else before.path
    return DriveOverride(drive.drive_id, overlay=msgspec.structs.replace(given.overlay, over=over))


def _check_overlay(drive: Drive, given: DriveOverride) -> None:
    overlay, what = given.overlay, f"the drive {drive.drive_id!r}"
    assert overlay is not None, "whoever calls has looked"
    if given.path_on_host is not None:
        raise ConfigError(f"A clone has a copy of {what}, or an overlay over what it is, and not both.")
    if overlay.over is not None:
        raise ConfigError(f"What the overlay of a clone lies over is what {what} is: leave `over` out.")
    if overlay.path is not None and os.path.lexists(overlay.path):
        raise ConfigError(f"The overlay {overlay.path} of a clone is there already.")
    if drive.overlay is not msgspec.UNSET and drive.overlay.path is None:
        raise ConfigError(
            f"The overlay of {what} is in memory, over which there can be none: give it a file."
        )


def _is_layered(drive: Drive, clones: list[Clone]) -> bool:
    """Whether something is going to lie over what the drive is."""
    return any(
        each.drive_id == drive.drive_id and each.overlay is not None
        for clone in clones
        for each in clone.drive_overrides
    )


def _new_layer(drive: Drive) -> DriveUpdate:
    before = None if drive.overlay is msgspec.UNSET else drive.overlay
    path = drive.path_on_host if before is None else before.path
    overlay = Overlay(_beside(path or "", f"{drive.drive_id}.{os.urandom(8).hex()}.overlay"))
    overlay.size_limit = None if before is None else before.size_limit
    return DriveUpdate(drive.drive_id, overlay=overlay)


# -- what is wrong ---------------------------------------------------------------------------------------------------


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
        (
            "overlay",
            [each.overlay.path for clone in clones for each in clone.drive_overrides if each.overlay],
        ),
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
