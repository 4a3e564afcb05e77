"""What a program gives to `MicroVM`, made into the resources that an API request would have carried.

One mechanism checks both: a resource made in Python goes through the schema as if it had come as JSON
(`schema.codec.validated`), so a wrong value gets the sentence that the API answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

import msgspec

from crackle.errors import ConfigError, reason_of
from crackle.schema.balloon import (
    Balloon,
    BalloonHintingStart,
    BalloonStatsUpdate,
    BalloonUpdate,
)
from crackle.schema.boot import BootSource
from crackle.schema.codec import check_id, made, validated
from crackle.schema.cpu import CpuConfig
from crackle.schema.drive import Drive, DriveUpdate, Overlay
from crackle.schema.entropy import EntropyDevice
from crackle.schema.jail import Jail
from crackle.schema.machine import CpuTemplate, MachineConfig
from crackle.schema.mmds import MmdsConfig
from crackle.schema.net import NetworkInterface, NetworkInterfaceUpdate
from crackle.schema.pmem import Pmem
from crackle.schema.snapshot import DriveOverride, SnapshotCreate, SnapshotLoad
from crackle.schema.vsock import Vsock
from crackle.telemetry.logger import Logger, instance_id_problem
from crackle.virtio.custom.base import VirtioDevice
from crackle.vmm.files import read_template

# How the API begins what it says of each kind of resource.
_ABOUT = {
    MachineConfig: "Machine config error",
    BootSource: "Boot source error",
    CpuConfig: "CPU template error",
    Drive: "Drive config error",
    DriveUpdate: "Drive config error",
    NetworkInterface: "Network config error",
    NetworkInterfaceUpdate: "Network config error",
    Vsock: "Vsock config error",
    Balloon: "Balloon config error",
    BalloonUpdate: "Balloon update error",
    BalloonStatsUpdate: "Balloon update error",
    BalloonHintingStart: "Balloon update error",
    EntropyDevice: "Entropy device error",
    MmdsConfig: "MMMDS config error",  # as clients know it
    Pmem: "Pmem config error",
    Jail: "Jail error",
    SnapshotCreate: "Create snapshot error",
    SnapshotLoad: "Load snapshot error",
}
_IDENTIFIED = {
    Pmem: "id",
    Drive: "drive_id",
    DriveUpdate: "drive_id",
    NetworkInterface: "iface_id",
    NetworkInterfaceUpdate: "iface_id",
}

Resource = TypeVar("Resource", bound=msgspec.Struct)


def checked(resource: Resource) -> Resource:
    """`resource`, if the API would take it. ConfigError, with the API's words, if not."""
    return _made(type(resource), lambda: validated(resource))


def make(kind: type[Resource], **fields: object) -> Resource:
    """A resource of these fields, if the API would take it. ConfigError, with the API's words, if not."""
    return _made(kind, lambda: made(kind, fields))


def _made(kind: type[Resource], make: Callable[[], Resource]) -> Resource:
    try:
        result = make()
        if kind in _IDENTIFIED:
            check_id(getattr(result, _IDENTIFIED[kind]))
    except ConfigError as error:
        raise ConfigError(f"{_ABOUT[kind]}: {error}") from None
    return result


def path_of(value: object, what: str) -> str:
    """The path as text. ConfigError when it is none."""
    try:
        return os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{what} must be a path, not {value!r}") from None


def pair_of(path: object, memory: object, *, to_write: bool = False) -> tuple[str, str]:
    """The state file and the memory file of a snapshot: both as they are given, or both in the directory `path`."""
    state = path_of(path, "path")
    if memory is not None:
        return state, path_of(memory, "memory")
    try:
        if to_write:
            os.makedirs(state, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot make the directory of the snapshot: {reason_of(error)}") from None
    return os.path.join(state, "state"), os.path.join(state, "memory")


def backend_of(memory_path: str, handler: object) -> dict[str, str]:
    """Where a snapshot's memory comes from: its memory file, or a page-fault handler's socket."""
    if handler is None:
        return {"backend_path": memory_path, "backend_type": "File"}
    return {"backend_path": path_of(handler, "handler"), "backend_type": "Uffd"}


def drives_of(rootfs: object, drives: object, read_only: bool, overlay: object = None) -> list[Drive]:
    """The root device, if there is one, and the other drives."""
    result = []
    if rootfs is not None:
        path = path_of(rootfs, "rootfs")
        root = make(Drive, drive_id="rootfs", is_root_device=True, path_on_host=path, is_read_only=read_only)
        if overlay is not None:
            root.overlay = overlay_of(overlay, "overlay")
        result.append(root)
    elif overlay is not None:
        raise ConfigError("overlay is what takes the writes of rootfs, and there is none")
    for index, drive in enumerate(_sequence(drives, "drives", "paths and Drives")):
        if isinstance(drive, Drive):
            result.append(checked(drive))
        else:
            path = path_of(drive, f"drives[{index}]")
            name = f"drive{index}"
            result.append(
                make(Drive, drive_id=name, is_root_device=False, path_on_host=path, is_read_only=False)
            )
    names = [drive.drive_id for drive in result]
    if len(set(names)) < len(names):
        raise ConfigError(f"two drives have the same name: {', '.join(sorted(names))}")
    return result


def overlay_of(value: object, what: str) -> Overlay:
    """The overlay at a path, if it is not one already."""
    return checked(value) if isinstance(value, Overlay) else Overlay(path_of(value, what))


def template_of(template: object) -> tuple[str | None, CpuConfig | None]:
    """The name of a static CPU template, or a custom one: itself, or out of a file."""
    if template is None:
        return None, None
    if isinstance(template, CpuConfig):
        return None, checked(template)
    path = path_of(template, "cpu_template")
    return (path, None) if path in get_args(CpuTemplate) else (None, read_template(path))


def jail_of(jail: object, seen: Callable[[], Iterable[str | None]]) -> Jail | None:
    """The jail, if there is to be one, in which the paths that `seen` says are seen, too."""
    if jail is None:
        return None
    if not isinstance(jail, Jail):
        raise ConfigError(f"jail must be a crackle.Jail, not {jail!r}")
    paths = [path_of(path, "a path of the jail") for path in jail.paths]
    return checked(msgspec.structs.replace(jail, paths=(*paths, *filter(None, seen()))))


def files_of(
    drives: Iterable[Drive], mapped: Iterable[Pmem], request: SnapshotLoad | None = None
) -> Iterator[str]:
    """The files of disks and persistent memory, as `request` overrides them, as far as they are there already."""
    other = {} if request is None else {each.drive_id: each for each in request.drive_overrides}
    paths = {} if request is None else {each.id: each.path_on_host for each in request.pmem_overrides}
    for pmem in mapped:
        yield paths.get(pmem.id, pmem.path_on_host)
    for drive in drives:
        given = other.get(drive.drive_id)
        path = drive.path_on_host if given is None or given.path_on_host is None else given.path_on_host
        if path is not None:
            yield path
        overlays = [
            None if drive.overlay is msgspec.UNSET else drive.overlay,
            None if given is None else given.overlay,
        ]
        for overlay in overlays:
            for layer in () if overlay is None else (overlay.path, overlay.over):
                if layer is not None:
                    from crackle.disk.chain import files_of as layers_of

                    yield from layers_of(layer)


def drive_overrides(drives: Mapping[str, object], overlays: Mapping[str, object]) -> list[DriveOverride]:
    """Other files and other overlays for the drives of a snapshot, by their names."""
    return [
        DriveOverride(
            name,
            path_of(drives[name], f"drives[{name!r}]") if name in drives else None,
            overlay_of(overlays[name], f"overlays[{name!r}]") if name in overlays else None,
        )
        for name in {**drives, **overlays}
    ]


def interfaces_of(interfaces: object) -> list[NetworkInterface]:
    """The network interfaces; a name is that of a TAP device."""
    given = _sequence(interfaces, "interfaces", "TAP devices and NetworkInterfaces")
    return [
        checked(interface)
        if isinstance(interface, NetworkInterface)
        else make(NetworkInterface, iface_id=f"eth{index}", host_dev_name=interface)
        for index, interface in enumerate(given)
    ]


# Seconds between statistics of a balloon of which only the size is said.
BALLOON_INTERVAL_S = 5


def balloon_of(value: object) -> Balloon | None:
    """The balloon, if there is to be one; a number is its size in MiB."""
    if value is None:
        return None
    if isinstance(value, Balloon):
        return checked(value)
    if isinstance(value, bool):
        raise ConfigError(f"balloon must be a number of MiB or a crackle.Balloon, not {value!r}")
    return make(
        Balloon,
        amount_mib=value,
        deflate_on_oom=True,
        stats_polling_interval_s=BALLOON_INTERVAL_S,
        free_page_reporting=True,
    )


def pmem_of(files: object) -> list[Pmem]:
    """Persistent memory, of files or as it is described."""
    result = [
        checked(each)
        if isinstance(each, Pmem)
        else make(Pmem, id=f"pmem{index}", path_on_host=path_of(each, f"pmem[{index}]"))
        for index, each in enumerate(_sequence(files, "pmem", "paths and Pmems"))
    ]
    names = [each.id for each in result]
    if len(set(names)) < len(names):
        raise ConfigError(f"two pmem devices have the same id: {', '.join(sorted(names))}")
    return result


def entropy_of(value: object) -> EntropyDevice | None:
    """The entropy device, if there is to be one."""
    if isinstance(value, EntropyDevice):
        return checked(value)
    if not isinstance(value, bool):
        raise ConfigError(f"entropy must be True, False or a crackle.EntropyDevice, not {value!r}")
    return EntropyDevice() if value else None


def devices_of(devices: object) -> tuple[VirtioDevice, ...]:
    """The devices written in Python: instances, each of them once."""
    given = _sequence(devices, "devices", "VirtioDevice instances")
    for index, device in enumerate(given):
        if isinstance(device, type):
            raise ConfigError(
                f"devices[{index}] is the class {device.__name__}: give an instance, {device.__name__}()"
            )
        if not isinstance(device, VirtioDevice):
            raise ConfigError(f"devices[{index}] is no crackle.VirtioDevice: {device!r}")
    return tuple(given)


def _sequence(value: object, what: str, of: str) -> Sequence[Any]:
    if isinstance(value, list | tuple):
        return value
    raise ConfigError(f"{what} must be a list or tuple of {of}, not {value!r} alone")


def console_of(console: object) -> tuple[int, int]:
    """The descriptors of the serial port's input and output."""
    if isinstance(console, list | tuple) and len(console) == 2 and all(_is_number(fd, -1) for fd in console):
        return console[0], console[1]
    raise ConfigError(
        f"console must be the descriptors (input, output), -1 for one that is not there, not {console!r}"
    )


def document_of(document: object, what: str = "the metadata") -> Any:
    """`document` as JSON would have it; a copy. ConfigError when it is none."""
    try:
        return msgspec.json.decode(msgspec.json.encode(document))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{what} must be a JSON document: {error}") from None


def check_rest(instance_id: object, metadata_limit: object, logger: object, **switches: object) -> None:
    """ConfigError for what no resource of the API carries."""
    if not isinstance(instance_id, str):
        raise ConfigError(f"instance_id must be text, not {instance_id!r}")
    problem = instance_id_problem(instance_id)
    if problem is not None:
        raise ConfigError(problem)
    if not _is_number(metadata_limit, 0):
        raise ConfigError(f"metadata_limit must be a number of bytes, not {metadata_limit!r}")
    if logger is not None and not isinstance(logger, Logger):
        raise ConfigError(f"logger must be a crackle.Logger, not {logger!r}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, not {value!r}")


def _is_number(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
