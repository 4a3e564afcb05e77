"""`crackle fork`: clones of a microVM that runs, by its API."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crackle.errors import ConfigError, CrackleError, os_reason

# Seconds for an answer, and seconds more for each clone.
_PATIENCE_S = 30.0
_PATIENCE_EACH_S = 0.5


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(path: Path, request: str, body: Any, timeout: float) -> Any:
    """What the microVM whose API is at `path` answers to a PUT. ConfigError with its sentence when it refuses."""
    connection = _Connection(path, timeout)
    try:
        connection.request("PUT", request, json.dumps(body))
        answer = connection.getresponse()
        content = json.loads(answer.read() or "null")
    except OSError as error:
        raise ConfigError(f"cannot ask the microVM at {path}: {os_reason(error)}") from None
    except (http.client.HTTPException, ValueError) as error:
        raise CrackleError(f"what serves {path} does not answer as a microVM does: {error!r}") from None
    finally:
        connection.close()
    if answer.status // 100 != 2:
        raise ConfigError(str((content or {}).get("fault_message", content)))
    return content


def fork(
    path: Path,
    count: int,
    *,
    names: str | None = None,
    api_sock: str | None = None,
    drives: Mapping[str, str],
    overlays: Mapping[str, str],
    taps: Mapping[str, str],
    vsock: str | None = None,
    console: str | None = None,
) -> Any:
    """Have `count` clones of the microVM at `path`; what the API answers.

    names, api_sock, vsock, console: templates, with {index} for the clone's number and {id} for its name. drives,
    overlays, taps: likewise, by the name of the drive or interface.
    """
    clones = []
    for index in range(count):
        name = f"clone-{os.urandom(8).hex()}" if names is None else _filled(names, index, "")
        clone: dict[str, Any] = {
            "id": name,
            "api_sock": _path(api_sock or str(path.with_name("{id}.sock")), index, name),
            "serial_out_path": None if console is None else _path(console, index, name),
            "drive_overrides": [
                {"drive_id": drive, "path_on_host": _path(file, index, name)}
                for drive, file in drives.items()
            ]
            + [
                {"drive_id": drive, "overlay": _overlay(file, index, name)}
                for drive, file in overlays.items()
            ],
            "network_overrides": [
                {"iface_id": interface, "host_dev_name": _filled(tap, index, name)}
                for interface, tap in taps.items()
            ],
            "vsock_override": None if vsock is None else {"uds_path": _path(vsock, index, name)},
        }
        clones.append({field: value for field, value in clone.items() if value})
    return ask(path, "/vm/fork", {"clones": clones}, _PATIENCE_S + _PATIENCE_EACH_S * count)


def _filled(template: str, index: int, name: str) -> str:
    return template.replace("{index}", str(index)).replace("{id}", name)


def _overlay(template: str, index: int, name: str) -> dict[str, object]:
    return {"memory": True} if template == "memory" else {"path": _path(template, index, name)}


def _path(template: str, index: int, name: str) -> str:
    # Relative to this directory, whatever the monitor's is.
    return os.path.abspath(_filled(template, index, name))
