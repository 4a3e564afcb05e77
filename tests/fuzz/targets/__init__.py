"""What the coverage-guided fuzzer attacks: each target turns bytes into what a hostile guest or peer does."""

from __future__ import annotations

import importlib
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from targets.device import Target


class Name(NamedTuple):
    """Where a target is, and the modules of `crackle` whose coverage it is measured by; python: they are no Cython."""

    place: str
    modules: tuple[str, ...]
    python: bool = False


BLOCK = ("virtio.block.device", "virtio.block.queue", "virtio.block.engine")
NAMES = {
    "queue": Name("queue:Queue", ("virtio.queue", "memory.guest")),
    "mmio": Name("queue:Mmio", ("virtio.transport.mmio", "virtio.device", "kvm.bus")),
    "block": Name("block:Sync", BLOCK),
    "async": Name("block:Async", (*BLOCK, "virtio.block.uring")),
    "overlay": Name("block:Overlaid", (*BLOCK, "virtio.block.layers", "virtio.block.uring")),
    "net": Name("net:Interface", ("virtio.net.device", "virtio.net.window")),
    "vsock": Name(
        "vsock:Streams",
        tuple(
            f"virtio.vsock.{part}"
            for part in ("device", "receive", "mux", "streams", "host", "listener", "credit", "table")
        ),
    ),
    "balloon": Name("balloon:Memory", ("virtio.balloon.device", "virtio.balloon.pages", "memory.discard")),
    "rng": Name("rng:Entropy", ("virtio.rng.device",)),
    "vhost": Name("vhost:BackEnd", ("virtio.vhost_user.protocol",), python=True),
    "python": Name("custom:Python", ("virtio.custom.device",)),
    "mmds": Name("mmds:Frames", ("mmds.packet", "mmds.stack", "mmds.tcp"), python=True),
    "mmds-http": Name("mmds:Http", ("mmds.http", "mmds.store", "mmds.token"), python=True),
}


def make(name: str) -> Target:
    """The target called `name`, ready to run inputs."""
    module, _, kind = NAMES[name].place.partition(":")
    return getattr(importlib.import_module(f"targets.{module}"), kind)()
