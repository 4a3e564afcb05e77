"""The front end of the vhost-user protocol, and what back ends can do wrong."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.virtio.vhost_user.protocol import Ring, VhostUser
from support.vhost_user import (
    F_PROTOCOL,
    F_VERSION_1,
    NAMES,
    P_CONFIG,
    P_REPLY_ACK,
    REPLY,
    WITH_ANSWER,
    Impostor,
    config_space,
    reply,
)

NUMBERS = {name: number for number, name in NAMES.items()}


def connect(backend: Impostor, timeout: float = 5.0) -> VhostUser:
    return VhostUser(backend.path, wanted=F_VERSION_1 | 0xFF, needed=F_VERSION_1, timeout=timeout)


def test_features_are_what_both_have(impostor: Callable[..., Impostor]) -> None:
    backend = impostor(features=F_PROTOCOL | F_VERSION_1 | 1 << 5 | 1 << 60)
    connection = connect(backend)
    assert connection.features == F_VERSION_1 | 1 << 5
    # What has no answer of its own has been heard when a later question is answered.
    connection.get_config(60)
    assert dict(backend.told)["SET_PROTOCOL_FEATURES"] == struct.pack("=Q", P_CONFIG | P_REPLY_ACK)
    assert backend.names()[0] == "SET_OWNER"


def test_the_configuration_space_comes_as_it_is(impostor: Callable[..., Impostor]) -> None:
    backend = impostor(config=bytes(range(60)))
    assert connect(backend).get_config(60) == bytes(range(60))


@pytest.mark.parametrize("path", ["/nowhere/socket", "", "\0abstract", "x" * 200, "/tmp"])
def test_a_path_that_is_no_back_end_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot connect to the vhost-user back end at") as error:
        VhostUser(path, wanted=0)
    assert repr(path) in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": F_VERSION_1}, "cannot negotiate protocol features"),
        ({"features": F_PROTOCOL}, "lacks the virtio features 0x100000000"),
        ({"protocol": P_REPLY_ACK}, "lacks the protocol feature CONFIG"),
        ({"answers": {"GET_FEATURES": None}}, "hung up at GET_FEATURES"),
        ({"answers": {"SET_OWNER": None}}, "hung up at"),
        ({"answers": {"GET_FEATURES": b"short"}, "silent": {"GET_PROTOCOL_FEATURES"}}, "within 0.3 s"),
        ({"answers": {"GET_FEATURES": reply(1, bytes(4))}}, "with 4 bytes instead of 8"),
        ({"answers": {"GET_FEATURES": reply(1, b"", size=1 << 31)}}, "with 2147483648 bytes instead of 8"),
        ({"answers": {"GET_FEATURES": reply(15, bytes(8))}}, "answered GET_FEATURES with message 15"),
        ({"answers": {"GET_FEATURES": reply(1, bytes(8), flags=1)}}, "with message 1, flags 0x1"),
        ({"answers": {"GET_FEATURES": reply(1, bytes(8), flags=REPLY | 2)}}, "with message 1, flags 0x6"),
        ({"silent": {"GET_FEATURES"}}, "did not answer GET_FEATURES within 0.3 s"),
    ],
)
def test_a_back_end_that_is_no_use_is_said_why(
    impostor: Callable[..., Impostor], options: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=r"vhost-user back end at .*/socket0 ") as error:
        connect(impostor(**options), timeout=0.3)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "answer",
    [
        reply(24, struct.pack("=III", 0, 60, 0) + bytes(59)),
        reply(24, struct.pack("=III", 4, 60, 0) + bytes(60)),
        reply(24, struct.pack("=III", 0, 1 << 31, 0) + bytes(60)),
        reply(24, b""),
    ],
)
def test_a_wrong_configuration_space_is_refused(impostor: Callable[..., Impostor], answer: bytes) -> None:
    connection = connect(impostor(answers={"GET_CONFIG": answer}))
    with pytest.raises(ConfigError, match=r"GET_CONFIG|no configuration space"):
        connection.get_config(60)


def test_after_a_failure_nothing_more_is_said(impostor: Callable[..., Impostor]) -> None:
    backend = impostor(answers={"GET_CONFIG": reply(24, bytes(3))})
    connection = connect(backend)
    with pytest.raises(ConfigError, match="3 bytes"):
        connection.get_config(60)
    told = len(backend.told)
    with pytest.raises(ConfigError, match="3 bytes"):
        connection.stop(1)
    assert len(backend.told) == told
    assert connection.fileno() >= 0
    connection.close()
    assert connection.fileno() == -1


def test_a_time_limit_covers_all_messages_of_an_operation(impostor: Callable[..., Impostor]) -> None:
    def slowly(_payload: bytes) -> bytes:
        time.sleep(0.25)
        return reply(11, bytes(8))

    connection = connect(impostor(answers={"GET_VRING_BASE": slowly}), timeout=0.4)
    with pytest.raises(ConfigError, match="within"):
        connection.stop(4)


def test_rings_stop_where_the_back_end_says(impostor: Callable[..., Impostor]) -> None:
    backend = impostor(base=0xFFFF)
    connection = connect(backend)
    assert connection.stop(2) == [0xFFFF, 0xFFFF]
    backend.base = 0x10000
    with pytest.raises(ConfigError, match="answered GET_VRING_BASE of ring 0 with 65536 of ring 0"):
        connection.stop(1)


def test_without_acknowledgements_a_question_at_the_end_finds_a_dead_back_end(
    impostor: Callable[..., Impostor],
) -> None:
    ring = Ring(size=16, desc=0, avail=0, used=0, base=0, kick=os.eventfd(0), call=os.eventfd(0))
    with GuestMemory([(0, 1 << 20)], backing="memfd") as memory:
        backend = impostor(protocol=P_CONFIG)
        connection = connect(backend)
        connection.start(F_VERSION_1, memory.regions, [ring])
        assert backend.names()[-1] == "GET_FEATURES"
        assert len(backend.fds) == 3
        connection = connect(impostor(protocol=P_CONFIG, answers={"SET_VRING_ENABLE": None}))
        with pytest.raises(ConfigError, match="hung up"):
            connection.start(F_VERSION_1, memory.regions, [ring])
    os.close(ring.kick)
    os.close(ring.call)


def test_descriptors_that_a_back_end_sends_are_not_kept(impostor: Callable[..., Impostor]) -> None:
    import socket

    backend = impostor()
    connection = connect(backend)
    before = len(os.listdir("/proc/self/fd"))
    read, write = os.pipe()
    backend.answers["GET_CONFIG"] = b""
    peer = backend._peer
    assert peer is not None
    answer = reply(24, struct.pack("=III", 0, 60, 0) + config_space(8))
    socket.send_fds(peer, [answer], [read] * 8)
    assert connection.get_config(60) == config_space(8)
    os.close(read)
    os.close(write)
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_speak_one_at_a_time(impostor: Callable[..., Impostor]) -> None:
    connection = connect(impostor())
    wrong: list[object] = []

    def ask() -> None:
        for _ in range(50):
            if connection.get_config(60) != config_space(2048) or connection.stop(1) != [0]:
                wrong.append("mixed up")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@given(
    answers=st.dictionaries(
        st.sampled_from(sorted(NUMBERS)),
        st.one_of(
            st.none(),
            st.binary(max_size=80),
            st.builds(
                reply,
                st.integers(0, 30),
                st.binary(max_size=80),
                flags=st.integers(0, 0xF),
                size=st.one_of(st.none(), st.integers(0, 0xFFFFFFFF)),
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    honest=st.booleans(),
)
def test_whatever_a_back_end_sends_ends_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, answers: dict[str, bytes | None], honest: bool
) -> None:
    if honest:
        # Well-formed up to the content.
        answers = {
            name: reply(NUMBERS[name], (content or b"").ljust(72 if name == "GET_CONFIG" else 8, b"\xee"))
            for name, content in answers.items()
            if name in WITH_ANSWER
        }
    path = tmp_path_factory.mktemp("hostile") / "socket"
    ring = Ring(size=16, desc=0, avail=0, used=0, base=0, kick=0, call=0)
    with (
        Impostor(path, answers=answers) as backend,
        GuestMemory([(0, 1 << 20)], backing="memfd") as memory,
        complains_about(path),
    ):
        connection = connect(backend, timeout=0.1)
        with complains_about(path):
            connection.get_config(60)
        with complains_about(path):
            connection.start(F_VERSION_1, memory.regions, [ring])
        with complains_about(path):
            connection.stop(1)
        connection.close()


@contextmanager
def complains_about(path: Path) -> Iterator[None]:
    """Nothing worse than a ConfigError that names the back end."""
    try:
        yield
    except ConfigError as error:
        named = str(path) in str(error)
        assert named
