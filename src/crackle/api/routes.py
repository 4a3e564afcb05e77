"""Which request is which command: method and path, the schema of the body, and what is counted.

A path is its first segment and, for some, an id or a second word; what follows is ignored. A request is
turned into a :class:`crackle.vmm.commands.Command`, or into a :class:`RequestError` whose message is the
answer.
"""

from __future__ import annotations

import msgspec

from crackle import schema
from crackle.errors import ConfigError, CrackleError
from crackle.schema.codec import check_id, decode, decoder_of, explain
from crackle.vmm.commands import Command
from crackle.vmm.devices import RESOURCES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class RequestError(CrackleError):
    """A request that is no command: an unknown path, a body that does not fit."""


class Route(msgspec.Struct, frozen=True):
    """``body`` names the schema of the body (empty: the JSON as it is).

    ``id_field`` the field the path repeats.

    ``counter`` is the stem of the metrics ``<counter>_count`` and ``<counter>_fails``; ``deprecated`` are
    the fields whose presence makes the request a deprecated one, or whose value where ``deprecated_value`` is given.
    """

    command: str
    body: str | None = None
    id_field: str | None = None
    counter: str | None = None
    deprecated: tuple[str, ...] = ()
    deprecated_value: str | None = None

    @property
    def deprecation(self) -> str:
        """What a client of a deprecated request should know."""
        if self.deprecated_value is not None:
            return f"{self.deprecated_value} is deprecated. Use V2 instead."
        if len(self.deprecated) > 1:
            return f"{' and '.join(self.deprecated)} fields are deprecated."
        return f"{self.deprecated[0]} field is deprecated."

    def is_deprecated(self, resource: Any) -> bool:
        """Whether what is asked for with ``resource`` is."""
        values = [getattr(resource, name) for name in self.deprecated]
        if self.deprecated_value is not None:
            return self.deprecated_value in values
        return any(
            value is not None and value is not msgspec.UNSET and value is not False for value in values
        )


# By method, first segment and, where "/" is in the key, second segment. Devices' are in the registry of their kinds.
ROUTES = {
    ("GET", ""): Route("get_instance", counter="instance_info"),
    ("GET", "version"): Route("get_version", counter="vmm_version"),
    ("GET", "machine-config"): Route("get_machine", counter="machine_cfg"),
    ("GET", "vm/config"): Route("get_config"),
    ("GET", "mmds"): Route("get_mmds", counter="mmds"),
    ("GET", "balloon"): Route("get_balloon"),
    ("GET", "balloon/statistics"): Route("get_balloon_statistics"),
    ("GET", "balloon/hinting/status"): Route("get_balloon_hinting"),
    ("GET", "hotplug/memory"): Route("get_memory_hotplug", counter="hotplug_memory"),
    ("PUT", "actions"): Route("", "Action", counter="actions"),
    ("PUT", "boot-source"): Route("put_boot_source", "BootSource", counter="boot_source"),
    ("PUT", "cpu-config"): Route("put_cpu_config", "CpuConfig", counter="cpu_cfg"),
    ("PUT", "logger"): Route("put_logger", "LoggerConfig", counter="logger"),
    ("PUT", "machine-config"): Route(
        "put_machine", "MachineConfig", counter="machine_cfg", deprecated=("cpu_template",)
    ),
    ("PUT", "metrics"): Route("put_metrics", "MetricsConfig", counter="metrics"),
    ("PUT", "mmds"): Route("put_mmds", "", counter="mmds"),
    ("PUT", "mmds/config"): Route(
        "put_mmds_config", "MmdsConfig", counter="mmds", deprecated=("version",), deprecated_value="V1"
    ),
    ("PUT", "serial"): Route("put_serial", "Serial", counter="serial"),
    ("PUT", "snapshot/create"): Route("create_snapshot", "SnapshotCreate"),
    ("PUT", "snapshot/load"): Route(
        "load_snapshot", "SnapshotLoad", deprecated=("mem_file_path", "enable_diff_snapshots")
    ),
    ("PUT", "vm/fork"): Route("fork", "Fork"),
    ("PATCH", "balloon/statistics"): Route("patch_balloon_statistics", "BalloonStatsUpdate"),
    ("PATCH", "balloon/hinting/start"): Route("start_balloon_hinting", "BalloonHintingStart"),
    ("PATCH", "balloon/hinting/stop"): Route("stop_balloon_hinting"),
    ("PATCH", "machine-config"): Route(
        "patch_machine", "MachineConfigUpdate", counter="machine_cfg", deprecated=("cpu_template",)
    ),
    ("PATCH", "mmds"): Route("patch_mmds", "", counter="mmds"),
    ("PATCH", "vm"): Route("", "VmState"),
}

for _r in RESOURCES:
    ROUTES["PUT", _r.path] = Route(
        f"put_{_r.name}", _r.body.__name__, _r.id_field, _r.counter, deprecated=_r.deprecated
    )
    if _r.update is not None:
        ROUTES["PATCH", _r.path] = Route(f"patch_{_r.name}", _r.update.__name__, _r.id_field, _r.counter)
    if _r.removable:
        ROUTES["DELETE", _r.path] = Route(f"delete_{_r.name}", id_field=_r.id_field)

_BODIES = {body.__name__: body for _r in RESOURCES for body in (_r.body, _r.update) if body is not None}


def schema_of(route: Route) -> Any:
    """The Struct of a route's body; None where the body is JSON as it is, or there is none."""
    return (_BODIES.get(route.body) or getattr(schema, route.body)) if route.body else None


def make_ready() -> None:
    """Make what the first request of each kind would, for a process that forks those that get them."""
    for route in ROUTES.values():
        if (kind := schema_of(route)) is not None:
            decoder_of(kind)


# Where a value in the body, not the path, names the command.
_BY_VALUE = {
    "FlushMetrics": "flush_metrics",
    "InstanceStart": "start",
    "SendCtrlAltDel": "send_ctrl_alt_del",
    "Paused": "pause",
    "Resumed": "resume",
}

_ANY_JSON = dict | list | str | bool | int | float | None  # type: ignore[type-arg]

_NO_BODY = {
    "PUT": "Empty PUT request.",
    "PATCH": "Empty PATCH request.",
}
_UNWANTED_BODY = {
    "GET": "GET request cannot have a body.",
    "DELETE": "Empty Delete request.",
}


class Request(msgspec.Struct):
    """A request as a command, with what the answer and the metrics need to know of it."""

    command: Command
    route: Route
    deprecated: bool


def find_route(method: str, path: str, body: bytes) -> tuple[Route, str]:
    """The route of a request and the second segment of its path; raises RequestError."""
    first, _, rest = path.lstrip("/").partition("/")
    second, _, tail = rest.partition("/")
    key = first
    if (second and first in _SECOND_WORD and method in _SECOND_WORD[first]) or first in _NEED_SECOND:
        key = f"{first}/{second}"
        if second == "hinting":
            key = f"{key}/{tail.partition('/')[0]}"
    route = ROUTES.get((method, key))
    if route is None and first == "vm":
        route = ROUTES.get((method, first))
    if route is None and method == "PATCH" and second == "hinting":
        raise RequestError(_unknown(method, first, key))
    if route is None and method == "PATCH" and first == "balloon":
        route = ROUTES[method, first]
    if body and method in _UNWANTED_BODY:
        raise RequestError(_UNWANTED_BODY[method])
    if not body and method in _NO_BODY and (route is None or route.command not in _BODY_OPTIONAL):
        raise RequestError(_NO_BODY[method])
    if route is None:
        raise RequestError(_unknown(method, first, key))
    return route, second


# Paths whose second segment is a word of ours, with the methods for which it is; those that need one; and commands
# that do without a body.
_SECOND_WORD = {"balloon": ("GET", "PATCH"), "mmds": ("PUT",), "vm": ("GET", "PUT", "PATCH", "DELETE")}
_NEED_SECOND = frozenset(("hotplug", "snapshot"))
_BODY_OPTIONAL = frozenset(("start_balloon_hinting", "stop_balloon_hinting"))


def _unknown(method: str, first: str, key: str) -> str:
    if first == "snapshot" and method == "PUT":
        if key == "snapshot/":
            return "Missing snapshot operation type."
        return f"Invalid request method and/or path: {method} /{key}."
    if first in ("balloon", "mmds") and key != first and method != "DELETE":
        rest = key.removeprefix(f"{first}/")
        return f"Unrecognized {method} request path `{'/' * ('/' in rest)}{rest}`."
    return f"Invalid request method and/or path: {method} {first}."


def parse(route: Route, path_id: str, body: bytes) -> Request:
    """The command that a routed request asks for; raises RequestError."""
    if route.id_field is not None:
        try:
            check_id(path_id)
        except ConfigError as error:
            raise RequestError(str(error)) from None
    if route.body is None:
        return Request(Command(route.command, path_id if route.id_field is not None else None), route, False)
    resource = _decode_body(route, body)
    if route.id_field is not None and (body_id := getattr(resource, route.id_field)) != path_id:
        if route.id_field == "iface_id":  # Firecracker has two sentences for it
            raise RequestError(
                f"The id from the path [{path_id}] does not match the id from the body [{body_id}]!"
            )
        raise RequestError(
            f"The id from the path does not match the id from the body! They are {path_id!r} and {body_id!r}."
        )
    if not route.command:
        return Request(Command(_BY_VALUE[getattr(resource, resource.__struct_fields__[0])]), route, False)
    check = _CHECKS.get(route.command)
    if check is not None:
        check(resource)
    return Request(Command(route.command, resource), route, route.is_deprecated(resource))


def _decode_body(route: Route, body: bytes) -> Any:
    resource_type: Any = schema_of(route) or _ANY_JSON
    try:
        return decode(body or b"{}", resource_type)
    except msgspec.DecodeError as error:
        raise RequestError(
            "An error occurred when deserializing the json body of a request: "
            f"{explain(error, resource_type, body)}."
        ) from None


def _check_update(update: schema.MachineConfigUpdate) -> None:
    if all(getattr(update, name) is None for name in update.__struct_fields__):
        raise RequestError(_NO_BODY["PATCH"])


def _check_snapshot_load(load: schema.SnapshotLoad) -> None:
    problem = "An error occurred when deserializing the json body of a request: "
    if load.mem_backend is not None and load.mem_file_path is not None:
        raise RequestError(
            f"{problem}too many fields: either `mem_backend` or `mem_file_path` exclusively is required."
        )
    if load.mem_backend is None and load.mem_file_path is None:
        raise RequestError(f"{problem}missing field: either `mem_backend` or `mem_file_path` is required.")


_CHECKS: dict[str, Callable[[Any], None]] = {
    "patch_machine": _check_update,
    "load_snapshot": _check_snapshot_load,
}
