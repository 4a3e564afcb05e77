"""The OpenAPI document: complete, and consistent in itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from crackle import schema
from crackle.api.openapi import document
from crackle.api.routes import ROUTES
from crackle.vmm.commands import ALLOWED

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(msgspec.json.encode(document()))
    return decoded


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for inner in node.values():
            yield from references(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from references(inner)


def test_it_has_every_route(openapi: dict[str, Any]) -> None:
    operations = {
        (method.upper(), path.partition("/{")[0].removeprefix("/"))
        for path, methods in openapi["paths"].items()
        for method in methods
    }
    assert operations == set(ROUTES)


def test_it_has_every_resource_and_every_reference_leads_somewhere(openapi: dict[str, Any]) -> None:
    schemas = openapi["components"]["schemas"]
    assert set(schema.NAMES) <= set(schemas)
    used = set(references(openapi))
    assert used
    assert used <= {f"#/components/schemas/{name}" for name in schemas}


def test_required_fields_and_limits_are_in_it(openapi: dict[str, Any]) -> None:
    machine = openapi["components"]["schemas"]["MachineConfig"]
    assert machine["required"] == ["vcpu_count", "mem_size_mib"]
    assert machine["additionalProperties"] is False
    assert machine["properties"]["vcpu_count"]["maximum"] == 255


def test_an_operation_of_later_work_says_so(openapi: dict[str, Any]) -> None:
    assert "Not supported yet" in openapi["paths"]["/hotplug/memory"]["put"]["description"]
    assert "description" not in openapi["paths"]["/boot-source"]["put"]


def test_every_route_leads_to_a_command() -> None:
    assert {route.command for route in ROUTES.values() if route.command} <= set(ALLOWED)
