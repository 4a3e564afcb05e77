"""What a microVM can be told: the commands, the states in which each is allowed.

And what is not built yet.

This is the one place that says so. The API, the configuration file, the command line and the library all
speak in these commands.
"""

from __future__ import annotations

import msgspec

from crackle.errors import ConfigError, StateError
from crackle.vmm.devices import RESOURCES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NOT_STARTED = "Not started"
RUNNING = "Running"
PAUSED = "Paused"
STOPPED = "Stopped"

_EVEN_AFTERWARDS = frozenset((NOT_STARTED, RUNNING, PAUSED, STOPPED))
_ALWAYS = frozenset((NOT_STARTED, RUNNING, PAUSED))
_BEFORE = frozenset((NOT_STARTED,))
_AFTER = frozenset((RUNNING, PAUSED))


class Command(msgspec.Struct, frozen=True):
    """A name out of :data:`ALLOWED` and, where the command takes one, its resource."""

    name: str
    resource: Any = None


ALLOWED = {
    "get_instance": _EVEN_AFTERWARDS,
    "get_version": _EVEN_AFTERWARDS,
    "get_machine": _EVEN_AFTERWARDS,
    "get_config": _EVEN_AFTERWARDS,
    "put_machine": _BEFORE,
    "patch_machine": _BEFORE,
    "put_cpu_config": _BEFORE,
    "put_boot_source": _BEFORE,
    "put_logger": _BEFORE,
    "put_metrics": _BEFORE,
    "put_serial": _BEFORE,
    "get_balloon": _ALWAYS,
    "get_balloon_statistics": _AFTER,
    "patch_balloon_statistics": _AFTER,
    "get_balloon_hinting": _AFTER,
    "start_balloon_hinting": _AFTER,
    "stop_balloon_hinting": _AFTER,
    "get_memory_hotplug": _AFTER,
    "get_mmds": _ALWAYS,
    "put_mmds": _ALWAYS,
    "patch_mmds": _ALWAYS,
    "put_mmds_config": _BEFORE,
    "create_snapshot": _AFTER,
    "load_snapshot": _BEFORE,
    "fork": _AFTER,
    "start": _BEFORE,
    "pause": _AFTER,
    "resume": _AFTER,
    "stand_by": frozenset((PAUSED,)),
    "send_ctrl_alt_del": _AFTER,
    "press_power_button": _AFTER,
    "get_metrics": frozenset((RUNNING, PAUSED, STOPPED)),
    "flush_metrics": _AFTER,
}
for _resource in RESOURCES:
    ALLOWED[f"put_{_resource.name}"] = _ALWAYS if _resource.removable else _BEFORE
    if _resource.update is not None:
        ALLOWED[f"patch_{_resource.name}"] = _AFTER
    if _resource.removable:
        ALLOWED[f"delete_{_resource.name}"] = _AFTER


# What the commands are about that answer "not supported yet".
NOT_YET: dict[str, str] = {
    name: resource.missing
    for resource in RESOURCES
    if resource.missing is not None
    for name in ALLOWED
    if resource.name in name
}


def check_state(name: str, state: str) -> None:
    """Raise StateError unless the command is allowed in ``state``."""
    allowed = ALLOWED[name]
    if state in allowed:
        return
    if state == STOPPED:
        raise StateError("The requested operation is not supported: the microVM has stopped.")
    when = "before" if state == NOT_STARTED else "after"
    raise StateError(f"The requested operation is not supported {when} starting the microVM.")


_NOT_FOUND = "Failed perform action on device: Device not found"

# What is said instead of that where clients know it: of devices that no microVM has, as of those that this one has not.
_ABSENT = {
    "get_balloon": f"Internal VMM error: {_NOT_FOUND}",
    "get_balloon_statistics": f"Internal VMM error: {_NOT_FOUND}",
    "get_balloon_hinting": f"Balloon update error: {_NOT_FOUND}",
    "get_memory_hotplug": f"Internal VMM error: {_NOT_FOUND}",
    "patch_balloon": f"Balloon update error: {_NOT_FOUND}",
    "patch_balloon_statistics": f"Balloon update error: {_NOT_FOUND}",
    "patch_memory_hotplug": f"Memory hotplug update error: {_NOT_FOUND}",
    "start_balloon_hinting": f"Balloon update error: {_NOT_FOUND}",
    "stop_balloon_hinting": f"Balloon update error: {_NOT_FOUND}",
}


def absent(name: str, state: str) -> ConfigError:
    """For a command about a device that this microVM has not."""
    if name == "get_balloon" and state == NOT_STARTED:
        return ConfigError("Balloon config error: No balloon device found.")
    return ConfigError(_ABSENT[name])


def check_supported(command: Command) -> None:
    """Raise ConfigError if Crackle cannot do what is asked for yet."""
    what = NOT_YET.get(command.name)
    if what is not None:
        raise ConfigError(_ABSENT.get(command.name, f"Crackle does not support {what} yet."))
