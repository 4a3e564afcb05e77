"""A vhost-user back end that answers whatever it likes."""

from __future__ import annotations

import os
import socket
import struct

from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.virtio.vhost_user import protocol
from crackle.virtio.vhost_user.protocol import (
    F_PROTOCOL_FEATURES,
    P_CONFIG,
    P_REPLY_ACK,
    REQUESTS,
    Ring,
    VhostUser,
)
from targets.choices import Choices
from targets.device import GPA, SIZE, Target, descriptors

WANTED, NEEDED = 1 << 32 | 0xFF, 1 << 32
CONFIG = 60
MOST = 32
"""Answers that wait before the questions are asked."""


class FrontEnd(VhostUser):
    """Connected to `end`, on which all answers lie ready: nobody waits."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        super().__init__("back end", wanted=WANTED, needed=NEEDED, timeout=5)

    def _connect(self) -> None:
        self._socket.close()
        self._socket = self.end


class BackEnd(Target):
    """Features, configuration space, rings started and stopped, over answers that are nearly right."""

    def __init__(self) -> None:
        self.memory = GuestMemory([(GPA, SIZE)], backing="memfd")
        self.fds = [os.eventfd(0), os.eventfd(0)]

    def run(self, data: bytes) -> None:
        choices = Choices(data)
        before = descriptors()
        acknowledges = choices.byte() & 1
        ours, theirs = socket.socketpair()
        ours.setblocking(True)
        theirs.setblocking(False)
        theirs.send(self.answers(choices, bool(acknowledges)))
        theirs.shutdown(socket.SHUT_WR)
        try:
            self.use(choices, ours)
        finally:
            theirs.close()
        # Fewer, where what another test has dropped is being closed meanwhile.
        assert descriptors() <= before

    def use(self, choices: Choices, end: socket.socket) -> None:
        try:
            front = FrontEnd(end)
        except ConfigError:
            assert end.fileno() < 0
            return
        assert front.features & ~WANTED == 0
        assert front.features & NEEDED == NEEDED
        try:
            for _ in range(1 + choices.below(3)):
                assert len(front.get_config(CONFIG)) == CONFIG
                ring = Ring(size=16, desc=1, avail=2, used=3, base=0, kick=self.fds[0], call=self.fds[1])
                front.start(front.features, self.memory.regions, (ring,))
                assert 0 <= front.stop(1)[0] <= 0xFFFF
        except ConfigError as error:
            assert front.failure == str(error)
            for again in (lambda: front.get_config(CONFIG), lambda: front.stop(1)):
                try:
                    again()
                except ConfigError as once_more:
                    assert str(once_more) == front.failure
                else:
                    raise AssertionError("a connection that has failed is used") from error
        finally:
            front.close()

    def answers(self, choices: Choices, acknowledges: bool) -> bytes:
        """What the front end will read, in this order; here and there something else."""
        features = choices.nearly(F_PROTOCOL_FEATURES | WANTED)
        protocol = choices.nearly(P_CONFIG | P_REPLY_ACK * acknowledges)
        config = struct.pack("=III", choices.nearly(0) & 0xFFFFFFFF, choices.nearly(CONFIG) & 0xFFFFFFFF, 0)
        found = [("GET_FEATURES", u64(features)), ("GET_PROTOCOL_FEATURES", u64(protocol))]
        while choices and len(found) < MOST:
            found.append(("GET_CONFIG", config + bytes(choices.nearly(CONFIG) % 512)))
            if acknowledges:
                told = (
                    "FEATURES",
                    "MEM_TABLE",
                    "VRING_NUM",
                    "VRING_ADDR",
                    "VRING_BASE",
                    "VRING_CALL",
                    "VRING_KICK",
                )
                found += [(f"SET_{name}", u64(choices.nearly(0))) for name in (*told, "VRING_ENABLE")]
            else:
                found.append(("GET_FEATURES", u64(features)))
            base = choices.nearly(choices.number(2))
            found.append(
                ("GET_VRING_BASE", struct.pack("=II", choices.nearly(0) & 0xFFFFFFFF, base & 0xFFFFFFFF))
            )
        return b"".join(self.message(choices, name, payload) for name, payload in found)

    def message(self, choices: Choices, name: str, payload: bytes) -> bytes:
        if choices.rarely():
            return choices.bytes(choices.below(40))
        header = protocol.HEADER.pack(
            choices.nearly(REQUESTS[name]) & 0xFFFFFFFF,
            choices.nearly(protocol.VERSION | protocol.REPLY) & 0xFFFFFFFF,
            choices.nearly(len(payload)) & 0xFFFFFFFF,
        )
        return header + payload


def u64(value: int) -> bytes:
    return struct.pack("=Q", value & (1 << 64) - 1)
