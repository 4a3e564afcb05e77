"""Back ends for vhost-user: a real one, and one that does what a test says.

`StorageDaemon` is QEMU's; `Impostor` speaks the protocol from its specification (QEMU, docs/interop/vhost-user.rst)
and from nothing in the package, and can be told to break it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

HEADER = struct.Struct("=III")
REPLY, NEED_REPLY, VERSION = 4, 8, 1

NAMES = {
    1: "GET_FEATURES",
    2: "SET_FEATURES",
    3: "SET_OWNER",
    5: "SET_MEM_TABLE",
    8: "SET_VRING_NUM",
    9: "SET_VRING_ADDR",
    10: "SET_VRING_BASE",
    11: "GET_VRING_BASE",
    12: "SET_VRING_KICK",
    13: "SET_VRING_CALL",
    15: "GET_PROTOCOL_FEATURES",
    16: "SET_PROTOCOL_FEATURES",
    18: "SET_VRING_ENABLE",
    24: "GET_CONFIG",
}
WITH_ANSWER = {"GET_FEATURES", "GET_VRING_BASE", "GET_PROTOCOL_FEATURES", "GET_CONFIG"}

F_PROTOCOL, F_VERSION_1, F_EVENT_IDX, F_INDIRECT = 1 << 30, 1 << 32, 1 << 29, 1 << 28
F_SEG_MAX, F_RO, F_FLUSH, F_CONFIG_WCE, F_MQ = 1 << 2, 1 << 5, 1 << 9, 1 << 11, 1 << 12
P_MQ, P_REPLY_ACK, P_CONFIG = 1 << 0, 1 << 3, 1 << 9

DAEMON = shutil.which("qemu-storage-daemon")
PATIENCE = 60.0


def config_space(sectors: int, queues: int = 4) -> bytes:
    """60 bytes of struct virtio_blk_config (virtio 1.2, 5.2.4)."""
    return struct.pack("<QII", sectors, 0, 126).ljust(34, b"\0") + struct.pack("<H", queues) + bytes(24)


class Impostor:
    """A back end on a thread of its own that serves nothing and notes what it is told.

    answers: what it answers to a message instead of the right thing: bytes to send as they are, None to hang up, or a
    function of the payload that gives either. silent: messages that it does not answer at all.
    """

    def __init__(self, path: Path, **options: object) -> None:
        self.path = str(path)
        self.features = F_PROTOCOL | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT | F_SEG_MAX | F_FLUSH | F_MQ
        self.protocol = P_MQ | P_REPLY_ACK | P_CONFIG | 1 << 12
        self.config = config_space(2048)
        self.base = 0
        self.answers: dict[str, bytes | Callable[[bytes], bytes | None] | None] = {}
        self.silent: set[str] = set()
        for name, value in options.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        self.told: list[tuple[str, bytes]] = []
        self.fds: list[tuple[str, int]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(4)
        self._peer: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def names(self) -> list[str]:
        """What it was told, in order."""
        return [name for name, _ in self.told]

    def hang_up(self) -> None:
        """End the connection."""
        if self._peer is not None:
            self._peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        # Closing alone wakes nobody who waits in accept(), and keeps the descriptor that was set aside for what comes.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self.hang_up()
        self._thread.join(10)
        self._listener.close()
        for _, fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._peer = peer
            with peer:
                try:
                    while self._serve(peer):
                        pass
                except OSError:
                    pass

    def _serve(self, peer: socket.socket) -> bool:
        data, fds, _, _ = socket.recv_fds(peer, HEADER.size, 16)
        if len(data) < HEADER.size:
            return False
        request, flags, size = HEADER.unpack(data)
        payload = b""
        while len(payload) < size:
            part, more, _, _ = socket.recv_fds(peer, size - len(payload), 16)
            fds += more
            if not part:
                return False
            payload += part
        name = NAMES.get(request, str(request))
        self.told.append((name, payload))
        self.fds += [(name, fd) for fd in fds]
        if name in self.silent:
            return True
        if name in self.answers:
            answer = self.answers[name]
            if callable(answer):
                answer = answer(payload)
            if answer is None:
                return False
            peer.sendall(answer)
        elif name in WITH_ANSWER or flags & NEED_REPLY:
            peer.sendall(reply(request, self._answer(name, payload)))
        return True

    def _answer(self, name: str, payload: bytes) -> bytes:
        if name == "GET_FEATURES":
            return struct.pack("=Q", self.features)
        if name == "GET_PROTOCOL_FEATURES":
            return struct.pack("=Q", self.protocol)
        if name == "GET_CONFIG":
            offset, size, flags = struct.unpack_from("=III", payload)
            return struct.pack("=III", offset, size, flags) + self.config[offset : offset + size]
        if name == "GET_VRING_BASE":
            return payload[:4] + struct.pack("=I", self.base)
        return bytes(8)

    def __enter__(self) -> Impostor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def reply(request: int, payload: bytes, *, flags: int = REPLY | VERSION, size: int | None = None) -> bytes:
    """A message of the back end."""
    return HEADER.pack(request, flags, len(payload) if size is None else size) + payload


class StorageDaemon:
    """qemu-storage-daemon with a raw image exported as vhost-user-blk on `socket`, resizable. A context manager."""

    def __init__(self, image: Path, directory: Path, *, writable: bool = True) -> None:
        assert DAEMON is not None
        self.image = image
        self.socket = directory / f"{image.name}.vhost"
        self._monitor = directory / f"{image.name}.qmp"
        ready = directory / f"{image.name}.pid"
        command = [
            DAEMON,
            "--blockdev",
            f"driver=file,node-name=disk,filename={image},read-only={'off' if writable else 'on'}",
            "--export",
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,"
            f"addr.path={self.socket},writable={'on' if writable else 'off'}",
            "--chardev",
            f"socket,id=monitor,path={self._monitor},server=on,wait=off",
            "--monitor",
            "chardev=monitor",
            "--pidfile",
            str(ready),
        ]
        # What the sanitizer has preloaded into this process is not meant for the daemon.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Not before it has started: its monitor is deaf for good to who connects too early.
        deadline = time.monotonic() + PATIENCE
        while not ready.exists():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.kill()
                raise AssertionError("qemu-storage-daemon does not start")
            time.sleep(0.01)

    def _command(self, name: str, **arguments: object) -> None:
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(PATIENCE)
            monitor.connect(str(self._monitor))
            with monitor.makefile("rw") as file:
                file.readline()
                for command in ({"execute": "qmp_capabilities"}, {"execute": name, "arguments": arguments}):
                    file.write(json.dumps(command) + "\n")
                    file.flush()
                    while "event" in (answer := json.loads(file.readline())):
                        pass
                    assert "return" in answer, answer

    def resize(self, size: int) -> None:
        """Give the disk another number of bytes. Version 7.2 serves it, but goes on telling the old one: see Relay."""
        self._command("block_resize", **{"node-name": "disk", "size": size})

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()

    def __enter__(self) -> StorageDaemon:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Relay:
    """Stands between a front end and a storage daemon, and tells the image's present size in GET_CONFIG's answer, as
    later versions of the daemon do themselves. Everything else, descriptors too, passes through.
    """

    def __init__(self, daemon: StorageDaemon) -> None:
        self.socket = daemon.socket.with_suffix(".relay")
        self._daemon = daemon
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.socket))
        self._listener.listen()
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            front, _ = self._listener.accept()
        except OSError:
            return
        back = socket.socket(socket.AF_UNIX)
        back.connect(str(self._daemon.socket))
        self._ends += [front, back]
        for way, ends in ((self._forward, (front, back)), (self._answer, (back, front))):
            threading.Thread(target=self._until_closed, args=(way, *ends), daemon=True).start()

    def _until_closed(self, way: Callable[..., None], *ends: socket.socket) -> None:
        with contextlib.suppress(OSError):
            way(*ends)

    def _forward(self, front: socket.socket, back: socket.socket) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(front, 4096, 16)
            if not data:
                back.shutdown(socket.SHUT_RDWR)
                return
            socket.send_fds(back, [data], fds)
            for fd in fds:
                os.close(fd)

    def _answer(self, back: socket.socket, front: socket.socket) -> None:
        while header := back.recv(HEADER.size, socket.MSG_WAITALL):
            request, _, size = HEADER.unpack(header)
            payload = back.recv(size, socket.MSG_WAITALL)
            if NAMES.get(request) == "GET_CONFIG":
                sectors = struct.pack("<Q", self._daemon.image.stat().st_size // 512)
                payload = payload[:12] + sectors + payload[20:]
            front.sendall(header + payload)

    def close(self) -> None:
        for end in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
