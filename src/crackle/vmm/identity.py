"""Who each clone is: what two microVMs that go on from one snapshot must not, or should not, have in common.

A *template* is text in which `{index}` stands for the clone's number and `{id}` for its instance id; a callable gets
the number instead, and says what it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

import msgspec
from msgspec import UNSET

from crackle.errors import ConfigError
from crackle.schema.config import VmConfig
from crackle.schema.drive import Drive, Overlay
from crackle.schema.jail import Jail
from crackle.schema.snapshot import SnapshotHugePages, SnapshotLoad
from crackle.vmm.arguments import (
    backend_of,
    check_rest,
    console_of,
    devices_of,
    document_of,
    files_of,
    jail_of,
    make,
    overlay_of,
    path_of,
)
from crackle.vmm.console import DEFAULT_LIMIT
from crackle.vmm.controller import DEFAULT_METADATA_LIMIT
from crackle.vmm.hosting import Hosting

if TYPE_CHECKING:
    from crackle.virtio.custom.base import VirtioDevice

Text = str | Callable[[int], str]
T = TypeVar("T")

_NONE: Mapping[str, Any] = MappingProxyType({})


class CloneOptions(TypedDict, total=False):
    """What `Snapshot.clone` takes, which says what it is; `Pool` takes the same."""

    instance_id: Text
    handler: str | os.PathLike[str]
    drives: Mapping[str, Text]
    overlays: Mapping[str, Text | Overlay]
    interfaces: Mapping[str, Text]
    macs: Mapping[str, Text]
    vsock: Text
    cid: Callable[[int], int]
    metadata: Any
    devices: Callable[[int], Sequence[VirtioDevice]]
    console: Callable[[int], tuple[int, int]]
    console_limit: int
    metadata_limit: int
    huge_pages: SnapshotHugePages
    track_dirty_pages: bool
    clock_realtime: bool
    profile: bool
    in_process: bool
    jail: Jail | Callable[[int], Jail]
    core_scheduling: bool


class Identity(NamedTuple):
    """One clone: its id, what is asked of its controller, and what no command carries."""

    instance_id: str
    request: SnapshotLoad
    metadata: Any
    hosting: Hosting

    def owns(self) -> list[tuple[str, str]]:
        """What no other may have: (what it is, its name)."""
        request = self.request
        found = [("the TAP device", each.host_dev_name) for each in request.network_overrides]
        overlays = [each.overlay for each in request.drive_overrides if each.overlay is not None]
        found += [("the overlay", overlay.path) for overlay in overlays if overlay.path is not None]
        if request.vsock_override is not None and request.vsock_override.uds_path:
            found.append(("the vsock path", request.vsock_override.uds_path))
        return [*found, ("the id", self.instance_id)]


class Identities:
    """The clones of the snapshot that `config` is of, as `options` say. ConfigError when they cannot be had."""

    def __init__(self, config: VmConfig, state: str, memory: str, options: CloneOptions) -> None:
        unknown = options.keys() - CloneOptions.__annotations__.keys()
        if unknown:
            raise TypeError(f"unexpected keyword arguments: {', '.join(sorted(unknown))}")
        self._config = config
        self._paths = state, memory
        self._options = options
        self._drives = options.get("drives", _NONE)
        self._overlays = options.get("overlays", _NONE)
        self._interfaces = options.get("interfaces", _NONE)
        self._macs = options.get("macs", _NONE)
        self._check()

    def _check(self) -> None:
        config = self._config
        known = {
            "drives": [drive.drive_id for drive in config.drives],
            "overlays": [drive.drive_id for drive in config.drives],
            "interfaces": [card.iface_id for card in config.network_interfaces],
            "macs": [card.iface_id for card in config.network_interfaces],
        }
        for option, names in known.items():
            given: Mapping[str, Text] = self._options.get(option, _NONE)  # type: ignore[assignment]
            if not isinstance(given, Mapping):
                raise ConfigError(f"{option} must be a mapping of the snapshot's identifiers, not {given!r}")
            for name in given:
                if name not in names:
                    raise ConfigError(
                        f"{option}: the snapshot has no {name!r}, only {', '.join(names) or 'none'}"
                    )
        for name in known["interfaces"]:
            if name not in self._interfaces:
                raise ConfigError(
                    f"two microVMs cannot share the TAP device of {name!r}: say what each clone gets, as in "
                    f'interfaces={{"{name}": "tap{{index}}"}}'
                )
        for drive in config.drives:
            known_to = drive.drive_id in self._drives or drive.drive_id in self._overlays
            if not known_to and not drive.is_read_only and _overlay_of(drive) is None:
                raise ConfigError(
                    f"two microVMs cannot write to the file of the drive {drive.drive_id!r}: say what each clone gets, "
                    f'as in drives={{"{drive.drive_id}": "disk{{index}}.img"}}, or in '
                    f'overlays={{"{drive.drive_id}": "{{id}}.overlay"}}'
                )
        for option in ("jail", "core_scheduling"):
            if self._options.get(option) and self._options.get("in_process", False):
                raise ConfigError(f"{option} is for a microVM in a process of its own: leave out in_process")
        for option in ("vsock", "cid"):
            if option in self._options and config.vsock is None:
                raise ConfigError(f"{option}: the snapshot has no vsock device")

    def of(self, index: int) -> Identity:
        """The clone of this number."""
        options = self._options
        name = options.get("instance_id")
        # By default no two have the same, wherever they are.
        identifier = f"clone-{os.urandom(8).hex()}" if name is None else _text(name, index, "")
        console = options.get("console")
        metadata = options.get("metadata")
        devices = options.get("devices")
        request = self._request(index, identifier)
        hosting = Hosting(
            None if console is None else console_of(console(index)),
            options.get("console_limit", DEFAULT_LIMIT),
            () if devices is None else devices_of(devices(index)),
            None,
            options.get("metadata_limit", DEFAULT_METADATA_LIMIT),
            options.get("profile", False),
            not options.get("in_process", False),
            self._jail(index, identifier, request),
            options.get("core_scheduling", False),
        )
        check_rest(
            identifier,
            hosting.metadata_limit,
            None,
            profile=hosting.profile,
            core_scheduling=hosting.core_scheduling,
        )
        if callable(metadata):
            metadata = metadata(index)
        return Identity(
            identifier,
            request,
            None if metadata is None else document_of(metadata),
            hosting,
        )

    def _jail(self, index: int, identifier: str, request: SnapshotLoad) -> Jail | None:
        jail = self._options.get("jail")
        if callable(jail):
            jail = jail(index)
        if not isinstance(jail, Jail):
            return jail_of(jail, tuple)
        own = msgspec.structs.replace(
            jail,
            paths=tuple(_text(path, index, identifier) for path in jail.paths),
            netns=_text(jail.netns, index, identifier),
            parent_cgroup=_text(jail.parent_cgroup, index, identifier),
        )
        handler = self._options.get("handler")
        # The memory file, and the state where there is one, come as descriptors; a handler wants to know which it is.
        read = () if handler is None else (self._paths[0], path_of(handler, "handler"))
        return jail_of(own, lambda: (*read, *files_of(self._config.drives, self._config.pmem, request)))

    def _request(self, index: int, identifier: str) -> SnapshotLoad:
        state, memory = self._paths
        options = self._options
        handler = options.get("handler")
        networks = [
            {
                "iface_id": name,
                "host_dev_name": _text(tap, index, identifier),
                "guest_mac": _text(self._macs[name], index, identifier) if name in self._macs else None,
            }
            for name, tap in self._interfaces.items()
        ]
        return make(
            SnapshotLoad,
            snapshot_path=state,
            mem_backend=backend_of(memory, handler),
            drive_overrides=[
                each for drive in self._config.drives for each in self._disk(drive, index, identifier)
            ],
            network_overrides=networks,
            vsock_override=self._vsock(index, identifier),
            huge_pages=options.get("huge_pages", "Snapshot"),
            track_dirty_pages=options.get("track_dirty_pages", False),
            clock_realtime=options.get("clock_realtime", False),
        )

    def _disk(self, drive: Drive, index: int, identifier: str) -> list[dict[str, Any]]:
        """What the clone has otherwise of a drive: a file of its own, an overlay, or nothing."""
        name = drive.drive_id
        before = _overlay_of(drive)
        overlay = self._overlays.get(name)
        if overlay is not None:
            overlay = overlay_of(_text(overlay, index, identifier), f"overlays[{name!r}]")
        elif before is not None and name not in self._drives and not drive.is_read_only:
            overlay = Overlay(os.path.join(os.path.dirname(before), f"{identifier}.{name}.overlay"))
        found: dict[str, Any] = {}
        if name in self._drives:
            found["path_on_host"] = path_of(_text(self._drives[name], index, identifier), f"drives[{name!r}]")
        if overlay is not None:
            found["overlay"] = overlay
        return [{"drive_id": name, **found}] if found else []

    def _vsock(self, index: int, identifier: str) -> dict[str, Any] | None:
        vsock = self._config.vsock
        if vsock is None:
            return None
        path, cid = self._options.get("vsock"), self._options.get("cid")
        if path is None:
            path = f"{vsock.uds_path}.{identifier}" if vsock.uds_path else ""
        else:
            path = _text(path, index, identifier)
        return {"uds_path": path_of(path, "vsock"), "guest_cid": None if cid is None else cid(index)}

    def of_all(self, indexes: Iterable[int]) -> list[Identity]:
        """These clones, which are to be alive at a time. ConfigError when two would have the same of something."""
        found = [self.of(index) for index in indexes]
        owners: set[tuple[str, str]] = set()
        for identity in found:
            for what, name in identity.owns():
                if (what, name) in owners:
                    raise ConfigError(
                        f"two clones would have {what} {name!r}: put {{index}} or {{id}} into its template"
                    )
                owners.add((what, name))
        return found


def _overlay_of(drive: Drive) -> str | None:
    """The file of a drive's overlay, if it has one."""
    return None if drive.overlay is UNSET else drive.overlay.path


def _text(value: Any, index: int, identifier: str) -> Any:
    if callable(value):
        return value(index)
    if not isinstance(value, str):
        return value
    return value.replace("{index}", str(index)).replace("{id}", identifier)
