"""vsock between Linux guests and host programs: hundreds of streams each way, every byte checked, half-closed."""

from __future__ import annotations

import random
import re
import selectors
import socket
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import Guest

STREAMS, SIZE = 200, 20_000


class Stream:
    """A host program's end: what it is still to write, and what it has read."""

    def __init__(self, program: socket.socket, data: bytes = b"") -> None:
        self.program, self.data = program, memoryview(data)
        self.crc = self.size = 0
        self.read = b""
        self.ended = False
        program.setblocking(False)

    def write(self) -> bool:
        """As much as fits; whether everything has been written."""
        if self.data:
            self.data = self.data[self.program.send(self.data) :]
        return not self.data

    def take(self) -> bool:
        """What has come; whether that was the end."""
        data = self.program.recv(65536)
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)
        self.read = (self.read + data)[-64:]
        self.ended = not data
        return self.ended

    @property
    def sum(self) -> bytes:
        return b"%d %d\n" % (self.size, self.crc)


def connect(path: str, port: int) -> socket.socket:
    """A host program's connection to the guest's `port`."""
    program = socket.socket(socket.AF_UNIX)
    program.settimeout(60)
    program.connect(path)
    program.sendall(b"CONNECT %d\n" % port)
    answer = b""
    while not answer.endswith(b"\n"):
        got = program.recv(1)
        assert got, "the guest refuses the connection"
        answer += got
    assert re.fullmatch(rb"OK \d+\n", answer)
    return program


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "v.sock")


@pytest.fixture
def guest(boot: Callable[..., Guest], tools: dict[str, object], path: str) -> Guest:
    """A Linux guest with a vsock device and the program `vsock`."""
    return boot(**tools, vsock=path).wait_shell()


def test_hundreds_of_streams_to_the_guest_are_answered_after_their_end(guest: Guest, path: str) -> None:
    guest.console.write(f'vsock sum 52 {STREAMS}; echo "<$?>"\n')
    guest.console.expect("listening\r\n")
    sent = [random.randbytes(SIZE) for _ in range(STREAMS)]
    streams = [Stream(connect(path, 52), data) for data in sent]
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.program, selectors.EVENT_WRITE, stream)
        while selector.get_map():
            ready = selector.select(60)
            assert ready, "nothing moves any more"
            for key, events in ready:
                stream = key.data
                if events & selectors.EVENT_WRITE and stream.write():
                    stream.program.shutdown(socket.SHUT_WR)
                    selector.modify(stream.program, selectors.EVENT_READ, stream)
                elif events & selectors.EVENT_READ and stream.take():
                    selector.unregister(stream.program)
    assert [stream.read for stream in streams] == [b"%d %d\n" % (SIZE, zlib.crc32(data)) for data in sent]
    guest.console.expect(rf"sum connections={STREAMS} bytes={STREAMS * SIZE}\r\n<0>", 60)
    for stream in streams:
        stream.program.close()
    assert guest.vm.metrics()["vsock"]["conns_killed"] == 0


def test_hundreds_of_streams_from_the_guest_are_answered_after_their_end(guest: Guest, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server, selectors.DefaultSelector() as selector:
        server.bind(f"{path}_80")
        # Fewer than the guest opens at once: who finds it full is let in later.
        server.listen(8)
        guest.console.write(f'vsock send 80 {STREAMS} {SIZE}; echo "<$?>"\n')
        selector.register(server, selectors.EVENT_READ)
        streams: list[Stream] = []
        while len(streams) < STREAMS or not all(stream.ended for stream in streams):
            ready = selector.select(60)
            assert ready, "nothing moves any more"
            for key, _ in ready:
                if key.data is None:
                    streams.append(Stream(server.accept()[0]))
                    selector.register(streams[-1].program, selectors.EVENT_READ, streams[-1])
                elif key.data.take():
                    selector.unregister(key.data.program)
                    key.data.program.sendall(key.data.sum)
                    key.data.program.close()
        assert all(stream.size == SIZE for stream in streams)
    guest.console.expect(rf"send connections={STREAMS} bytes={STREAMS * SIZE} right={STREAMS}\r\n<0>", 60)


def test_refusals_reach_the_other_side_at_once(guest: Guest, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as program:
        program.settimeout(60)
        program.connect(path)
        program.sendall(b"CONNECT 99\n")
        assert program.recv(9) == b""
    assert "Connection reset" in guest.sh("vsock send 99 1 1 2>&1 || true")
