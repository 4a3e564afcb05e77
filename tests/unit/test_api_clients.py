"""How many clients the API has, for how long, and what becomes of those for whom there is no descriptor."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from crackle.api import server as api
from crackle.api.server import MAX_CONNECTIONS, ApiServer
from crackle.runtime.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any


class Api:
    """A server in a loop that the test turns, and its clients."""

    def __init__(self, path: str) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(512)
        self.path, self.loop = path, Loop()
        controller: Any = None
        self.server = ApiServer(self.loop, listener, controller)
        self.server.serve = lambda *_request: api.response("204 No Content")  # type: ignore[method-assign]
        self.clients: list[socket.socket] = []
        self.rounds = 0

    def turn(self, seconds: float = 0.05) -> None:
        """Serve for as long."""
        self.loop.call_later(seconds, self.loop.stop)
        poll = self.loop._epoll.poll

        def counted(timeout: float | None) -> Any:
            self.rounds += 1
            return poll(timeout)

        class Counting:
            register, modify, unregister = (
                self.loop._epoll.register,
                self.loop._epoll.modify,
                self.loop._epoll.unregister,
            )

        Counting.poll = staticmethod(counted)  # type: ignore[attr-defined]
        whole, self.loop._epoll = self.loop._epoll, Counting  # type: ignore[assignment]
        try:
            self.loop.run()
        finally:
            self.loop._epoll = whole

    def connect(self, client: socket.socket | None = None) -> socket.socket:
        client = client or socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        client.connect(self.path)
        self.clients.append(client)
        return client

    def answer(self, client: socket.socket, request: bytes = b"GET / HTTP/1.1\r\n\r\n") -> bytes:
        """What a client hears, without waiting longer than a turn; b"" when it was hung up on."""
        if request:
            client.send(request)
        self.turn()
        return client.recv(65536)

    def close(self) -> None:
        self.server.close()
        self.loop.close()
        for client in self.clients:
            client.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Api]:
    found = Api(str(tmp_path / "api"))
    yield found
    found.close()


@pytest.fixture
def exhaust() -> Iterator[Callable[[], list[int]]]:
    """Takes every descriptor that the process may still have; returns them, to be closed one by one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def exhaust() -> list[int]:
        # However few gaps there are below: some to be closed again.
        top = max(int(name) for name in os.listdir("/proc/self/fd")) + 5
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        return taken

    yield exhaust
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for fd in taken:
        os.close(fd)


def age(served: Api, seconds: float) -> None:
    """As if nobody had been answered for so long."""
    for client in served.server._clients.values():
        client.active -= seconds


def test_a_client_for_whom_there_is_no_descriptor_is_told_so_and_the_others_are_served(
    served: Api, exhaust: Callable[[], list[int]]
) -> None:
    first = served.connect()
    assert served.answer(first).startswith(b"HTTP/1.1 204")
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    exhaust()
    for client in waiting:
        answer = served.answer(served.connect(client), b"")
        assert answer.startswith(b"HTTP/1.1 503\r\n")
        assert b'{ "error": "The process has no file descriptors left' in answer
        assert client.recv(1) == b""
    assert served.answer(first).startswith(b"HTTP/1.1 204")


def test_a_client_that_cannot_even_be_refused_is_no_busy_loop_and_is_served_later(
    served: Api, exhaust: Callable[[], list[int]]
) -> None:
    late = socket.socket(socket.AF_UNIX)
    taken = exhaust()
    os.close(served.server._reserve)
    taken.append(os.dup(0))
    served.server._reserve = -1
    served.connect(late)
    served.turn(0.5)
    assert served.rounds < 40
    for _ in range(3):
        os.close(taken.pop())
    served.turn(0.3)
    assert served.answer(late).startswith(b"HTTP/1.1 204")
    assert served.server._reserve >= 0


def test_a_silent_client_gives_its_descriptor_to_a_new_one(
    served: Api, exhaust: Callable[[], list[int]]
) -> None:
    silent = served.connect()
    served.turn()
    late = socket.socket(socket.AF_UNIX)
    exhaust()
    age(served, api.EVICTABLE_AFTER_S)
    assert served.answer(served.connect(late)).startswith(b"HTTP/1.1 204")
    assert silent.recv(1) == b""


def test_silent_clients_keep_nobody_out_for_long(served: Api) -> None:
    silent = [served.connect() for _ in range(MAX_CONNECTIONS)]
    served.turn()
    # One of them has begun a request, and never ends it.
    silent[0].send(b"GET / HT")
    extra = served.connect()
    assert served.answer(extra, b"").startswith(b"HTTP/1.1 503\r\n")
    assert extra.recv(1) == b""
    age(served, api.EVICTABLE_AFTER_S)
    assert served.answer(silent[1]).startswith(b"HTTP/1.1 204")
    served.turn()
    assert all(served.answer(served.connect()).startswith(b"HTTP/1.1 204") for _ in range(5))
    # The longest silent went first, and the one that was answered meanwhile stayed.
    ended = [client for client in silent if not _is_open(client)]
    assert ended == [silent[0], *silent[2:6]]


def _is_open(client: socket.socket) -> bool:
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True


def test_a_server_that_rests_can_be_closed(served: Api, exhaust: Callable[[], list[int]]) -> None:
    late = socket.socket(socket.AF_UNIX)
    taken = exhaust()
    os.close(served.server._reserve)
    taken.append(os.dup(0))
    served.server._reserve = -1
    served.connect(late)
    served.turn()
    served.server.close()
    before = served.rounds
    served.turn(0.3)
    assert served.rounds - before < 10
