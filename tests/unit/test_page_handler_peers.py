"""The page-fault handler and whoever connects: what is no memory is one sentence, leaves nothing, and stops nobody."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crackle.memory import GuestMemory
from crackle.memory.userfault import open_userfault, register_range, unregister_range
from crackle.runtime.channel import rights
from crackle.snapshot import handler as handler_module
from crackle.snapshot import workingset
from crackle.snapshot.handler import Handler, listen

PAGE = 4096
SIZE = 1 << 20
PATIENCE = 30
SEED = int(os.environ.get("CRACKLE_SEED", "1"))

libc = ctypes.CDLL(None)


class Serving:
    """A handler that serves the file `memory` at the socket `path`."""

    def __init__(self, directory: Path) -> None:
        self._descriptors = len(os.listdir("/proc/self/fd"))
        self.memory, self.path = directory / "memory", str(directory / "socket")
        self.content = b"".join(number.to_bytes(8, "little") * (PAGE // 8) for number in range(SIZE // PAGE))
        self.memory.write_bytes(self.content)
        self.told: queue.Queue[str] = queue.Queue()
        self.handler = Handler(str(self.memory), listen(self.path), self.told.put, seconds=0.05)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            self.handler.serve()

    def connect(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(PATIENCE)
        peer.connect(self.path)
        return peer

    def close(self) -> None:
        self.handler.close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        # And nobody is served any more.
        assert open_descriptors(self._descriptors) == self._descriptors


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    made = Serving(tmp_path)
    yield made
    made.close()


class Restored:
    """A microVM as the handler sees it: memory of which no page is there, and its userfaultfd."""

    def __init__(self) -> None:
        self.memory = GuestMemory([(0, SIZE)])
        self.address = self.memory.regions[0].hva
        self.fault = open_userfault()
        register_range(self.fault, self.address, SIZE)

    def mapping(self, **fields: int) -> dict[str, int]:
        own = {"base_host_virt_addr": self.address, "size": SIZE, "offset": 0}
        return {**own, "page_size": PAGE, "page_size_kib": PAGE, **fields}

    def page(self, number: int) -> bytes:
        """Waited for without Python's lock, which the handler of the same process may want."""
        found = ctypes.create_string_buffer(PAGE)
        release = threading.Timer(PATIENCE, self._release)
        release.start()
        libc.memcpy(found, ctypes.c_void_p(self.address + number * PAGE), ctypes.c_size_t(PAGE))
        release.cancel()
        return found.raw

    def _release(self) -> None:
        """What has not come is zeros from now on."""
        unregister_range(self.fault, self.address, SIZE)

    def close(self) -> None:
        self._release()
        os.close(self.fault)
        self.memory.close()


@pytest.fixture
def restored() -> Iterator[Restored]:
    made = Restored()
    yield made
    made.close()


def send(peer: socket.socket, message: object, *fds: int) -> None:
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    peer.sendmsg([text], rights(fds))


def open_descriptors(wanted: int) -> int:
    """How many there are, once they are no more than is wanted, or will not be any more."""
    deadline = time.monotonic() + PATIENCE
    while (count := len(os.listdir("/proc/self/fd"))) > wanted and time.monotonic() < deadline:
        time.sleep(0.001)
    return count


def check_served(serving: Serving, restored: Restored) -> None:
    """Somebody who keeps to the protocol has all of the memory."""
    with serving.connect() as peer:
        send(peer, [restored.mapping()], restored.fault)
        for number in range(0, SIZE // PAGE, 7):
            assert restored.page(number) == serving.content[number * PAGE : (number + 1) * PAGE]


NO_MEMORY = "A microVM is not served any more: what it handed over is no memory: "


def huge(restored: Restored, chance: random.Random) -> list[dict[str, Any]]:
    """One field of a region that cannot be."""
    name = chance.choice(["base_host_virt_addr", "size", "offset", "page_size"])
    values = [-1, -PAGE, 1, 4095, 1 << 63, 1 << 64, 1 << 200, (1 << 64) - PAGE, 0.5, "0", None]
    value = chance.choice([*values, 0, 3 * PAGE] if name == "page_size" else values)
    return [restored.mapping(), restored.mapping(**{name: value})]


BAD_MESSAGES: list[Callable[[Restored, random.Random], object]] = [
    lambda _restored, chance: chance.randbytes(chance.randrange(1, 5000)),
    lambda restored, chance: json.dumps([restored.mapping()]).encode()[: chance.randrange(1, 80)],
    lambda _restored, _chance: b"[" * 60000,
    lambda _restored, _chance: b'[{"x":' + b"[" * 30000,
    lambda _restored, _chance: [],
    lambda _restored, chance: chance.choice([{}, None, 7, "text", [[]], [{}], [None], [{"size": 1}]]),
    lambda restored, _chance: [restored.mapping()] * 17,
    lambda restored, chance: [restored.mapping(offset=PAGE << chance.randrange(30))],
    lambda restored, _chance: [restored.mapping(), restored.mapping(page_size=2 << 20)],
    huge,
]


def test_what_is_no_memory_is_one_sentence_and_leaves_nothing(serving: Serving, restored: Restored) -> None:
    """At random, with a good descriptor beside it, so that one that is not closed would be seen."""
    chance = random.Random(SEED)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(400):
        make = BAD_MESSAGES[number % len(BAD_MESSAGES)]
        message = make(restored, chance)
        with serving.connect() as peer:
            send(peer, message, *[restored.fault] * chance.choice([0, 1, 1, 1, 2]))
            # Closed, unless what was sent is too long to be read at once.
            with contextlib.suppress(ConnectionResetError):
                assert peer.recv(1) == b""
        told = serving.told.get(timeout=PATIENCE)
        assert told.startswith("A microVM is not served any more: "), (message, told)
        assert "\n" not in told
        assert len(told) < 300
    assert serving.told.empty()
    assert open_descriptors(before) == before
    check_served(serving, restored)


def test_what_is_no_userfaultfd_is_refused(serving: Serving, restored: Restored) -> None:
    reading, writing = os.pipe()
    event = os.eventfd(0)
    try:
        before = len(os.listdir("/proc/self/fd"))
        for fds, words in (
            ((), "there came 0 descriptors with it, not one"),
            ((restored.fault, restored.fault), "there came 2 descriptors with it, not one"),
            ((reading,), "the descriptor is no userfaultfd but pipe:"),
            ((writing,), "the descriptor is no userfaultfd but pipe:"),
            ((event,), r"the descriptor is no userfaultfd but anon_inode:[eventfd]"),
        ):
            # What a kernel would never say: all of the address space is given back.
            os.write(writing, bytes(32))
            with serving.connect() as peer:
                send(peer, [restored.mapping()], *fds)
                assert peer.recv(1) == b""
            assert serving.told.get(timeout=PATIENCE).startswith(NO_MEMORY + words)
        assert open_descriptors(before) == before
    finally:
        for fd in (reading, writing, event):
            os.close(fd)
    check_served(serving, restored)


def test_peers_that_leave_in_the_middle_are_let_go(
    serving: Serving, restored: Restored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler_module, "HANDOVER_S", 0.2)
    chance = random.Random(SEED)
    before = len(os.listdir("/proc/self/fd"))
    told = []
    for number in range(100):
        going = Restored()
        with serving.connect() as peer:
            how = number % 5
            if how == 1:
                peer.shutdown(socket.SHUT_WR)
            if how >= 2:
                send(peer, [going.mapping()], going.fault)
            if how == 3:
                # Nothing else is ever sent; who does it nevertheless is not heard, nor what he hands over kept.
                send(peer, chance.randbytes(1000), restored.fault)
                assert going.page(7) == serving.content[7 * PAGE : 8 * PAGE]
            if how == 4:
                # Its memory goes first.
                going.close()
        if how != 4:
            going.close()
        if how < 2:
            told.append(serving.told.get(timeout=PATIENCE))
    assert set(told) == {
        "A microVM is not served any more: it has closed its connection and handed nothing over"
    }
    # One that stays and says nothing, too.
    with serving.connect() as peer:
        assert peer.recv(1) == b""
    assert serving.told.get(timeout=PATIENCE).endswith("it has handed nothing over within 0.2 s")
    assert open_descriptors(before) == before
    assert serving.told.empty()
    check_served(serving, restored)


def test_without_descriptors_left_who_is_served_is_served_on_and_others_later(serving: Serving) -> None:
    first, second = Restored(), Restored()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with serving.connect() as peer, socket.socket(socket.AF_UNIX) as waiting:
            send(peer, [first.mapping()], first.fault)
            assert first.page(1) == serving.content[PAGE : 2 * PAGE]
            # After that the handler opens nothing for the first any more.
            deadline = time.monotonic() + PATIENCE
            while not os.path.exists(workingset.path_beside(str(serving.memory))):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            os.close(lowest := os.dup(0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
            waiting.connect(serving.path)
            send(waiting, [second.mapping()], second.fault)
            assert serving.told.get(timeout=PATIENCE) == (
                "No other microVM is served for now: Too many open files (os error 24)"
            )
            assert first.page(100) == serving.content[100 * PAGE : 101 * PAGE]
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert second.page(200) == serving.content[200 * PAGE : 201 * PAGE]
            assert first.page(200) == second.page(200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        first.close()
        second.close()


def test_any_working_set_file_is_a_good_one_or_none(serving: Serving, restored: Restored) -> None:
    """Bytes changed, added and taken away at random; what is no file of that size is not even read."""
    chance = random.Random(SEED)
    path, noted = str(serving.memory), Path(workingset.path_beside(str(serving.memory)))
    with serving.memory.open("rb") as memory:
        fd = memory.fileno()
        order = [5, 3, 9, 0]
        workingset.write(path, fd, 65536, order)
        whole = noted.read_bytes()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(500):
            data = bytearray(whole)
            for _ in range(chance.randrange(1, 4)):
                at = chance.randrange(len(data) + 1)
                data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
            noted.write_bytes(data)
            assert workingset.read(path, fd, 65536) == (order if data == whole else [])
        # With a checksum that fits, numbers of windows that are none.
        for order in ([16], [1 << 31], [(1 << 32) - 1], [0] * 17):
            workingset.write(path, fd, 65536, order)
            assert workingset.read(path, fd, 65536) == []
        noted.unlink()
        with noted.open("wb") as large:
            large.truncate(1 << 40)
        assert workingset.read(path, fd, 65536) == []
        noted.unlink()
        os.mkfifo(noted)
        assert workingset.read(path, fd, 65536) == []
        noted.unlink()
        noted.mkdir()
        assert workingset.read(path, fd, 65536) == []
        assert len(os.listdir("/proc/self/fd")) == before
    check_served(serving, restored)
