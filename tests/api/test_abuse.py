"""The API under abuse: what is valid, mutated, malformed, oversized, pipelined, slow and from many clients at once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from crackle.api.routes import ROUTES, schema_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.api.conftest import Vmm

    from crackle.api.routes import Route

SEED = int(os.environ.get("CRACKLE_ABUSE_SEED", "1"))

# What the machine of these tests, which only takes notes, cannot do.
_BEYOND_THE_FAKE = ("snapshot/create", "vm/fork")

_STATUS = re.compile(rb"HTTP/1\.1 (\d\d\d)")

# Bytes of private memory by which a process may grow while it is abused: what an allocator holds, and no leak.
_SLACK = 3 << 20


class Abuser:
    """Makes requests out of `chance`. No file is named that is not below `directory`, or cannot be had."""

    def __init__(self, chance: random.Random, directory: Path) -> None:
        self._chance = chance
        # Whether the microVM may be started: most requests are of no more than one kind afterwards.
        self.starts = False
        (directory / "disk").write_bytes(bytes(4096))
        self._texts = [
            "",
            "x",
            "a" * 300,
            "é\n\t",
            "/none/x",
            *(str(directory / name) for name in ("disk", "f")),
        ]
        self._requests = [key for key in ROUTES if key[1] not in _BEYOND_THE_FAKE]

    def value(self, depth: int = 0) -> Any:
        chance = self._chance
        kind = chance.randrange(9 if depth < 3 else 6)
        if kind < 6:
            numbers = (0, 1, -1, 3, 128, 1 << 31, 1 << 64, 1 << 80, 1.5)
            return (None, True, False, chance.choice(numbers), chance.choice(self._texts), "None")[kind]
        if kind == 6:
            return [self.value(depth + 1) for _ in range(chance.randrange(4))]
        names = ("size", "refill_time", "ops", "bandwidth", "iface_id", "x")
        return {chance.choice(names): self.value(depth + 1) for _ in range(chance.randrange(4))}

    def body(self, route: Route, identifier: str) -> bytes:
        """One that may fit."""
        chance = self._chance
        schema = schema_of(route)
        if schema is None:
            return json.dumps(self.value()).encode()
        fields = {name: self.value() for name in schema.__struct_encode_fields__ if chance.random() < 0.6}
        if route.id_field is not None:
            fields[route.id_field] = identifier
        action = "InstanceStart" if self.starts else "SendCtrlAltDel"
        for name, likely in (("action_type", action), ("state", chance.choice(("Paused", "Resumed")))):
            if name in fields and chance.random() < 0.8:
                fields[name] = likely
        return json.dumps(fields).encode()

    def request(self) -> bytes:
        """A well-formed one."""
        method, key = self._chance.choice(self._requests)
        route = ROUTES[method, key]
        identifier = self._chance.choice(("a", "b", "a-b", ""))
        path = f"/{key}" + (f"/{identifier}" if route.id_field is not None else "")
        body = b"" if method in ("GET", "DELETE") else self.body(route, identifier)
        return b"%s %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (
            method.encode(),
            path.encode(),
            len(body),
            body,
        )

    def spoilt(self) -> bytes:
        """One that was well-formed."""
        chance, data = self._chance, bytearray(self.request())
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) + 1)
            kind = chance.randrange(5)
            if kind == 0:
                del data[at : at + chance.randint(1, 30)]
            elif kind == 1:
                data[at:at] = chance.randbytes(chance.randint(1, 10))
            elif kind == 2:
                data[at:at] = chance.choice((b"\r\n", b"\n", b" ", b":", b"\0", b"\r\n\r\n", b"\xff"))
            elif kind == 3 and at < len(data):
                data[at] = chance.randrange(256)
            else:
                extra = (
                    b"Transfer-Encoding: chunked\r\n",
                    b"Connection: close\r\n",
                    b"Expect: 100-continue\r\n",
                )
                data = bytearray(data.replace(b"Host: x\r\n", chance.choice(extra), 1))
        return bytes(data)

    def oversized(self) -> bytes:
        """One with more of something than is taken."""
        lots = b"a" * self._chance.choice((20_000, 60_000, 200_000))
        return self._chance.choice(
            (
                b"GET /" + lots + b" HTTP/1.1\r\n\r\n",
                b"GET / HTTP/1.1\r\nX: " + lots + b"\r\n\r\n",
                b"PUT /mmds HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(lots) + lots,
                b"PUT /mmds HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(lots) + lots,
                b"PUT /mmds HTTP/1.1\r\nContent-Length: 50000\r\n\r\n" + b"[" * 50_000,
            )
        )

    def abuse(self) -> bytes:
        """One or several of any kind."""
        kind = self._chance.randrange(10)
        if kind < 4:
            return self.request()
        if kind < 7:
            return self.spoilt()
        if kind == 7:
            return self.oversized()
        return b"".join(self.request() for _ in range(self._chance.randint(2, 8)))


def statuses(connection: socket.socket) -> list[int]:
    """Of all answers until the server hangs up."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return [int(status) for status in _STATUS.findall(received)]


def held(vmm: Vmm) -> tuple[int, int]:
    """Sockets and threads of the process; files are what its configuration names."""
    place = f"/proc/{vmm.process.pid}"
    links = []
    for fd in os.listdir(f"{place}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"{place}/fd/{fd}"))
    return sum(link.startswith("socket:") for link in links), len(os.listdir(f"{place}/task"))


def private_memory(vmm: Vmm) -> int:
    """In bytes."""
    with open(f"/proc/{vmm.process.pid}/smaps_rollup") as rollup:
        (line,) = [line for line in rollup if line.startswith("Private_Dirty:")]
    return int(line.split()[1]) << 10


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "count",
    [800, pytest.param(10_000, marks=pytest.mark.soak)],
)
def test_whatever_is_asked_is_answered_and_leaves_nothing_behind(
    start: Callable[..., Vmm], tmp_path: Path, count: int
) -> None:
    chance = random.Random(SEED)
    abuser = Abuser(chance, tmp_path)
    vmm = start("--level", "Off", fake=True)
    seen: set[int] = set()
    crowd: list[socket.socket] = []
    before = 0
    assert vmm.request("GET", "/").status == 200
    holding = held(vmm)
    for number in range(count):
        abuser.starts = number > count * 3 // 4
        if number == count // 4:
            before = private_memory(vmm)
        data = abuser.abuse()
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(60)
        connection.connect(vmm.socket)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            # In pieces, amid which others come and go.
            middle = chance.randrange(len(data) + 1)
            connection.sendall(data[:middle])
            if chance.random() < 0.1 and len(crowd) < 40:
                crowd.append(connection)
                continue
            connection.sendall(data[middle:])
            connection.shutdown(socket.SHUT_WR)
        seen.update(statuses(connection))
        connection.close()
        if crowd and chance.random() < 0.08:
            crowd.pop(chance.randrange(len(crowd))).close()
    memory = private_memory(vmm)
    for connection in crowd:
        connection.close()
    assert seen <= {100, 200, 204, 400, 413}, seen
    assert {200, 204, 400} <= seen
    assert vmm.request("GET", "/").status == 200
    print("private memory", before, memory)
    assert memory - before < _SLACK, (before, memory)
    # The clients that have gone are forgotten, and what they had is given back.
    deadline = time.monotonic() + 20
    while held(vmm) != holding:
        assert time.monotonic() < deadline, held(vmm)
        vmm.request("GET", "/")
