"""Opening TAPs: which, whose, and what is said when it cannot be done."""

from __future__ import annotations

import ctypes
import os

import pytest

from crackle.errors import ConfigError
from crackle.virtio.net.tap import Tap, open_tap, tap_name
from support.network import Namespace


def test_a_tap_is_opened_where_the_process_is(namespace: Namespace) -> None:
    name = namespace.tap()
    with namespace.entered():
        fd = open_tap(name)
    assert tap_name(fd) == name
    os.close(fd)
    assert tap_name(0) is None


def test_a_tap_that_is_missing_is_made_and_goes_with_its_descriptor(namespace: Namespace) -> None:
    with namespace.entered():
        fd = open_tap("fresh")
    assert [link["ifname"] for link in namespace.show("link")] == ["lo", "fresh"]
    os.close(fd)
    assert [link["ifname"] for link in namespace.show("link")] == ["lo"]


def test_what_cannot_be_opened_is_told_in_one_sentence(namespace: Namespace) -> None:
    name = namespace.tap()
    bridge = namespace.bridge()
    with namespace.entered():
        held = open_tap(name)
        for bad, words in (
            (name, "busy .os error 16.*in use"),
            (bridge, "is no TAP"),
            ("a" * 16, "16 bytes"),
        ):
            with pytest.raises(ConfigError, match=words) as caught:
                open_tap(bad)
            assert "\n" not in str(caught.value)
    os.close(held)


def test_without_permission_the_message_says_what_to_do(namespace: Namespace) -> None:
    name = namespace.tap(owner=12345)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with namespace.entered():
            # Still root, who may open /dev/net/tun, but without a single capability (capabilities(7)).
            header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None).capset(header, none) == 0
            messages = []
            for bad in (name, "missing"):
                try:
                    open_tap(bad)
                except ConfigError as error:
                    messages.append(str(error))
            os.write(write, "\n".join(messages).encode())
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as answers:
        lines = answers.read().split("\n")
    assert "another user" in lines[0]
    assert "none of that name" in lines[1]


def test_a_waiting_tap_belongs_to_whoever_takes_it(namespace: Namespace) -> None:
    name = namespace.tap()
    with namespace.entered():
        tap = Tap(name)
        with pytest.raises(ConfigError, match="in use"):
            Tap(name)
        os.close(tap.take())
        os.close(tap.take())
        tap.close()
        os.close(open_tap(name))
