"""docs/firecracker-compatibility.md has every name of the API, the command line and the metrics, and no other."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crackle.api.openapi import document
from crackle.api.routes import ROUTES
from crackle.jail.options import OPTIONS as JAILER_OPTIONS
from crackle.monitor.options import OPTIONS
from crackle.monitor.process import SIGNAL_STATUS
from crackle.telemetry.names import SECTIONS
from crackle.vmm.commands import NOT_YET

PAGE = Path(__file__).parents[2] / "docs" / "firecracker-compatibility.md"
VERDICTS = {"same", "better", "different", "not yet", "ours"}

Row = tuple[list[str], str, str]


def rows(title: str) -> list[Row]:
    """The rows of the table below this heading: the names in front, the verdict, how or why."""
    _, _, below = PAGE.read_text().partition(f"# {title}\n")
    section = re.split(r"^##", below, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 2, title
    found = []
    for line in lines[2:]:
        *names, verdict, words = [cell.strip() for cell in line[1:-1].split("|")]
        found.append((names, verdict, words))
    return found


TITLES = (
    "Requests and their fields",
    "Objects within them",
    "HTTP",
    "Command line",
    "Jailer's command line",
    "Exit statuses",
    "Signals",
    "Metrics",
    "Log lines",
    "Threads",
    "Files",
)


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(msgspec.json.encode(document()))
    return decoded


def schemas_of(operation: dict[str, Any]) -> set[str]:
    """The names of the schemas of what is sent and answered, as far as these have any."""
    holders = (operation.get("requestBody", {}), operation["responses"].get("200", {}))
    schemas = [holder.get("content", {}).get("application/json", {}).get("schema", {}) for holder in holders]
    return {schema["$ref"].rpartition("/")[2] for schema in schemas if "$ref" in schema}


@pytest.mark.parametrize("title", TITLES)
def test_every_row_says_how_it_is_and_why_where_that_is_not_the_same(title: str) -> None:
    for names, verdict, words in rows(title):
        assert verdict in VERDICTS, names
        if verdict in ("better", "different"):
            assert words, names


def test_every_request_and_field_is_there_and_no_other(openapi: dict[str, Any]) -> None:
    wanted = []
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            request = f"`{method.upper()} {path}`"
            fields = {field for name in schemas_of(operation) for field in properties(openapi, name)}
            wanted += [[request, ""], *([request, f"`{field}`"] for field in fields)]
    listed = [names for names, _, _ in rows("Requests and their fields")]
    assert sorted(listed) == sorted(wanted)


def properties(openapi: dict[str, Any], name: str) -> list[str]:
    return list(openapi["components"]["schemas"][name].get("properties", {}))


def test_every_object_within_another_is_there_and_no_other(openapi: dict[str, Any]) -> None:
    sent = {
        name
        for methods in openapi["paths"].values()
        for operation in methods.values()
        for name in schemas_of(operation)
    }
    wanted = [
        [f"`{name}`", f"`{field}`"]
        for name in openapi["components"]["schemas"]
        if name not in sent
        for field in properties(openapi, name)
    ]
    assert sorted(names for names, _, _ in rows("Objects within them")) == sorted(wanted)


def test_what_is_not_supported_yet_is_not_yet_and_nothing_else_is() -> None:
    missing = set(NOT_YET)
    verdicts = {names[0]: verdict for names, verdict, _ in rows("Requests and their fields") if not names[1]}
    for (method, key), route in ROUTES.items():
        request = f"`{method} /{key}" + (f"/{{{route.id_field}}}`" if route.id_field else "`")
        assert (verdicts[request] == "not yet") is (route.command in missing), request


def test_every_option_is_there_and_no_other() -> None:
    assert [names for names, _, _ in rows("Command line")] == [[f"`--{name}`"] for name in (*OPTIONS, "help")]


def test_every_option_of_the_jailer_is_there_and_no_other() -> None:
    listed = [names for names, _, _ in rows("Jailer's command line")]
    assert sorted(listed) == sorted([f"`--{name}`"] for name in (*JAILER_OPTIONS, "help"))


def test_every_metric_is_there_and_no_other() -> None:
    listed = {names[0].strip("`"): names[1].replace("`", "") for names, _, _ in rows("Metrics")}
    assert listed == SECTIONS


def test_the_statuses_of_signals_are_there() -> None:
    statuses = {names[0]: (names[1], verdict) for names, verdict, _ in rows("Exit statuses")}
    for number, status in SIGNAL_STATUS.items():
        assert statuses[f"`{status}`"] == (number.name, "same")
        assert [f"`{number.name}`"] in [names for names, _, _ in rows("Signals")]


# Firecracker's own text, where there is a copy of it.

YAML = os.environ.get("FIRECRACKER_YAML")


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    if YAML is None:
        pytest.skip("FIRECRACKER_YAML names no file")
    yaml = pytest.importorskip("yaml")
    loaded: dict[str, Any] = yaml.safe_load(Path(YAML).read_text())
    return loaded


def their_fields(theirs: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    if "$ref" in schema:
        schema = theirs["definitions"][schema["$ref"].rpartition("/")[2]]
    return list(schema.get("properties", {}))


def test_every_request_and_field_of_firecracker_is_there(theirs: dict[str, Any]) -> None:
    wanted = set()
    for path, methods in theirs["paths"].items():
        for method, operation in methods.items():
            if method not in ("get", "put", "patch", "delete"):
                continue
            request = f"`{method.upper()} {path}`"
            sent = [given["schema"] for given in operation.get("parameters", []) if given["in"] == "body"]
            answered = operation["responses"].get(200, {}).get("schema", {})
            fields = {field for schema in (*sent, answered) for field in their_fields(theirs, schema)}
            wanted |= {(request, ""), *((request, f"`{field}`") for field in fields)}
    listed = {(names[0], names[1]): verdict for names, verdict, _ in rows("Requests and their fields")}
    # Their text leaves out the three requests by which devices are removed.
    assert {names for names, verdict in listed.items() if verdict != "ours"} - wanted == {
        (request, "")
        for request in (
            "`DELETE /drives/{drive_id}`",
            "`DELETE /network-interfaces/{iface_id}`",
            "`DELETE /pmem/{id}`",
        )
    }
    assert wanted <= set(listed)
    assert "ours" not in {listed[names] for names in wanted}


@pytest.mark.parametrize(
    "name", ["RateLimiter", "TokenBucket", "MemoryBackend", "NetworkOverride", "VsockOverride"]
)
def test_every_field_of_firecrackers_objects_is_there(theirs: dict[str, Any], name: str) -> None:
    listed = [
        names[1]
        for names, verdict, _ in rows("Objects within them")
        if names[0] == f"`{name}`" and verdict != "ours"
    ]
    assert sorted(listed) == sorted(
        f"`{field}`" for field in their_fields(theirs, theirs["definitions"][name])
    )
