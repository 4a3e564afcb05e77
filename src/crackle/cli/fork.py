"""`crackle fork`: clones of a microVM that runs, by its API."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crackle.errors import ConfigError, CrackleError, os_reason

# Seconds for an answer, and seconds more for each clone.
_PATIENCE_S = 30.0
_PATIENCE_EACH_S = 0.5

# <sys/socket.h>, struct ucred.
_CREDENTIALS = struct.Struct("=3i")


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _Place:
    """Where the microVM with the API at `path` is: its root may be a jail's, whose files have other names in it."""

    def __init__(self, path: Path) -> None:
        self._root = ""
        with contextlib.suppress(OSError):
            root = os.stat(f"/proc/{_server(path)}/root")
            folders = [str(folder) for folder in path.resolve().parents]
            self._root = next(
                (folder for folder in folders if os.path.samestat(root, os.stat(folder))), ""
            ).rstrip("/")

    def inside(self, path: str) -> str:
        """The microVM's name of a file of ours. ConfigError when it cannot see it."""
        # Relative to this directory, whatever the monitor's is.
        path = os.path.abspath(path)
        if not self._root:
            return path
        folder, name = os.path.split(path)
        real = os.path.join(os.path.realpath(folder), name)
        if not real.startswith(f"{self._root}/"):
            raise ConfigError(f"{path} is not in the jail of the microVM, which sees what is in {self._root}")
        return real.removeprefix(self._root)

    def outside(self, clone: dict[str, Any]) -> dict[str, Any]:
        """A clone of the answer as it is seen from here."""
        if not self._root:
            return clone
        path = self._root + os.path.normpath(f"/{clone['api_sock'].lstrip('/')}")
        return {**clone, "api_sock": path, "pid": _server(Path(path))}


def _server(path: Path) -> int:
    """The process that listens there. OSError."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(found)[0]
    return pid


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
    place = _Place(path)

    def named(template: str, index: int, name: str) -> str:
        return place.inside(_filled(template, index, name))

    clones = []
    for index in range(count):
        name = f"clone-{os.urandom(8).hex()}" if names is None else _filled(names, index, "")
        clone: dict[str, Any] = {
            "id": name,
            "api_sock": named(api_sock or str(path.with_name("{id}.sock")), index, name),
            "serial_out_path": None if console is None else named(console, index, name),
            "drive_overrides": [
                {"drive_id": drive, "path_on_host": named(file, index, name)}
                for drive, file in drives.items()
            ]
            + [
                {
                    "drive_id": drive,
                    "overlay": {"memory": True} if file == "memory" else {"path": named(file, index, name)},
                }
                for drive, file in overlays.items()
            ],
            "network_overrides": [
                {"iface_id": interface, "host_dev_name": _filled(tap, index, name)}
                for interface, tap in taps.items()
            ],
            "vsock_override": None if vsock is None else {"uds_path": named(vsock, index, name)},
        }
        clones.append({field: value for field, value in clone.items() if value})
    answer = ask(path, "/vm/fork", {"clones": clones}, _PATIENCE_S + _PATIENCE_EACH_S * count)
    return {**answer, "clones": [place.outside(clone) for clone in answer["clones"]]}


def _filled(template: str, index: int, name: str) -> str:
    return template.replace("{index}", str(index)).replace("{id}", name)
