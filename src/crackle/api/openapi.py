"""The OpenAPI 3.1 document of the API, made from the routes and the schema.

``python -m crackle.api.openapi`` prints it.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

from crackle import schema
from crackle.api.routes import ROUTES, Route, schema_of
from crackle.schema.instance import Fault
from crackle.version import VERSION
from crackle.vmm.commands import NOT_YET

# What a command answers with; all others answer 204 without a body.
_RESULTS = {
    "get_instance": schema.InstanceInfo,
    "get_version": schema.Version,
    "get_machine": schema.MachineConfig,
    "get_config": schema.VmConfig,
    "get_balloon": schema.Balloon,
    "get_balloon_statistics": schema.BalloonStats,
    "get_balloon_hinting": schema.BalloonHintingStatus,
    "get_memory_hotplug": schema.MemoryHotplugStatus,
    "fork": schema.Forked,
}

_REFERENCE = "#/components/schemas/{name}"


def document() -> dict[str, Any]:
    """The document as plain dictionaries."""
    types = [getattr(schema, name) for name in schema.NAMES]
    _, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for (method, key), route in ROUTES.items():
        path = f"/{key}" + (f"/{{{route.id_field}}}" if route.id_field is not None else "")
        paths.setdefault(path, {})[method.lower()] = _operation(method, key, route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Crackle API",
            "version": VERSION,
            "description": "The API of one microVM, served on a Unix socket; compatible with Firecracker's.",
        },
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": components},
    }


def _operation(method: str, key: str, route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": route.command or f"{method.lower()}_{key}"}
    body = schema_of(route)
    if body is not None:
        operation["summary"] = (inspect.getdoc(body) or "").partition("\n")[0]
    missing = None if route.command is None else NOT_YET.get(route.command)
    if missing is not None:
        operation["description"] = f"Not supported yet: {missing}. Answers 400."
    if route.id_field is not None:
        operation["parameters"] = [
            {"name": route.id_field, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": _json({"type": "object"} if body is None else _reference(body)),
        }
    result = _RESULTS.get(route.command)
    if route.command == "get_mmds":
        operation["responses"] = {
            "200": {"description": "The document", "content": _json({"type": "object"})}
        }
    elif result is not None:
        operation["responses"] = {"200": {"description": "The answer", "content": _json(_reference(result))}}
    else:
        operation["responses"] = {"204": {"description": "Done"}}
    if route.command in ("put_mmds", "patch_mmds"):
        operation["responses"]["413"] = {
            "description": "More than there is room for",
            "content": _json(_reference(Fault)),
        }
    operation["responses"]["400"] = {
        "description": "Refused, with the reason",
        "content": _json(_reference(Fault)),
    }
    return operation


def _reference(resource: type) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(name=resource.__name__)}


def _json(content: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": content}}


if __name__ == "__main__":
    print(msgspec.json.format(msgspec.json.encode(document())).decode())
