"""What a program and the processes of its microVMs say to each other, as MessagePack.

A program tells its zygote of a `Birth`, with descriptors, and the new process an `Order` at a time, each of which gets
an `Answer`. What comes from a process in which a guest runs is decoded as what it is to be, and as nothing else.
"""

from __future__ import annotations

import msgspec

from crackle.schema.jail import Jail

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Keep(msgspec.Struct, tag="keep", array_like=True):
    """Have a snapshot ready for births to come. With it: a memory file that holds the state file, and the guest's."""

    key: int


class Forget(msgspec.Struct, tag="forget", array_like=True):
    """That snapshot is not wanted any more."""

    key: int


class Birth(msgspec.Struct, tag="birth", array_like=True):
    """A process for a microVM. With it: its ends of commands and events, and of the console as far as it has one.

    console: whether there is an input, and an output. snapshot: the key of the one that it loads, if it does.
    jail: what it enters first. core_scheduling: it shares no core. api_sock: where it serves the API, too. The first
    answer is an error if it cannot.
    """

    instance_id: str
    metadata_limit: int
    directory: str
    console: tuple[bool, bool] = (False, False)
    profile: bool = False
    snapshot: int | None = None
    jail: Jail | None = None
    core_scheduling: bool = False
    api_sock: str | None = None


class Order(msgspec.Struct, array_like=True):
    """A command. directory: what relative paths are relative to from now on, where that has changed."""

    name: str
    resource: msgspec.Raw
    directory: str | None = None


class Answer(msgspec.Struct, array_like=True):
    """What came of an order. error: the class of what was raised, whose words are `words`. state: the microVM's."""

    state: str
    result: msgspec.Raw
    error: str | None = None
    words: str = ""


# Comes before a fork for each clone, with its ends of commands and events, and of its console, input and output.
LEND = "lend"

# Those, where there is no console -1.
Lent = tuple[int, int, int, int]

# The first answer, which nobody has asked for: the process is there, and the kernel says which it is.
HELLO = "hello"

# What comes before an ExitStatus among the events, beside a zygote's `runtime.inherit.ENDED`.
GUEST_ENDED = b"G"

Wish = Keep | Forget | Birth

NOTHING = msgspec.Raw(b"\xc0")


def encode(value: Any) -> bytes:
    """As MessagePack; what has no place in it as text."""
    return msgspec.msgpack.encode(value, enc_hook=str)
