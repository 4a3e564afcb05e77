"""Every module that a running microVM will want, imported before the guest's first instruction.

Modules are imported where they are needed, so that a microVM pays for what it has and no more. But once it runs, there
may be nothing to import from any more, in a jail, or no leave to open files, and a failure is the worst moment to find
that out. This is the one list of what is imported late; a test looks that nothing else is.
"""

from __future__ import annotations

import os
import sys

from crackle.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from crackle.schema.config import VmConfig

# For what goes wrong: a request that is no JSON, a guest that fails or stays silent. And what is compiled of what a
# fork wants, because a filter lets no code be loaded any more.
ALWAYS = (
    "_socket",
    "select",
    "crackle.schema.position",
    "crackle.schema.snapshot",
    "crackle.snapshot.save",
    "crackle.memory.huge",
    "crackle.vmm.probe",
    f"crackle.arch.{os.uname().machine}.probe",
    "crackle.vmm.silence",
)

# To load a snapshot, which is done before it runs.
_LOADING = (
    "crackle.snapshot.load",
    "crackle.snapshot.handover",
    f"crackle.arch.{os.uname().machine}.compatibility",
)

# To fork, which some do, and are told if there is nothing to import it from any more.
_FORKING = (
    "crackle.snapshot.fork",
    "crackle.snapshot.plan",
    "crackle.snapshot.overrides",
    "crackle.monitor.clone",
)

_VHOST_USER = "crackle.virtio.vhost_user.block"
# What opens the files of a PATCH are other modules than the device's.
_BLOCK = ("crackle.virtio.block.device", "crackle.virtio.block.backing", "crackle.disk.chain")
_ASYNC = "crackle.virtio.block.uring"
_LIMITER = "crackle.ratelimit.limiter"
_NET = "crackle.virtio.net.device"
_VSOCK = "crackle.virtio.vsock.device"
_BALLOON = "crackle.virtio.balloon.device"
_RNG = "crackle.virtio.rng.device"
_METADATA = ("crackle.mmds.store", "crackle.mmds.service")


def preload(config: VmConfig | None = None, *, custom: bool = False, terminal: bool = False) -> None:
    """Import what a machine with `config` will want while it runs; without one, what each does.

    custom: it has devices written in Python. terminal: its console is one. ConfigError when a module is not there.
    """
    _import((*ALWAYS, *_configured(config), *_given(custom, terminal)))


def preload_idle() -> None:
    """Import what each machine will want, and what a load or a fork would, while nobody asks for anything."""
    _import((*ALWAYS, *_LOADING, *_FORKING))


def preload_all() -> None:
    """Import what any machine of crackle-vmm will want, before and while it runs, for a process that forks them.

    And make what is the same for many.
    """
    _import(
        (
            *ALWAYS,
            *("crackle.vmm.builder", "crackle.vmm.shell", *_LOADING, *_FORKING, "resource", "termios"),
            *("crackle.runtime.cores", "crackle.runtime.signals"),
            *(
                _VHOST_USER,
                *_BLOCK,
                _ASYNC,
                _LIMITER,
                _NET,
                "crackle.virtio.net.tap",
                _VSOCK,
                _BALLOON,
                _RNG,
                *_METADATA,
            ),
        )
    )
    from crackle.arch import platform

    platform.make_ready()


def preload_api() -> None:
    """Import what serves the API."""
    _import(("crackle.api.server",))


def _import(names: Iterable[str]) -> None:
    for name in names:
        try:
            __import__(name)
        except (ImportError, OSError) as error:
            raise ConfigError(
                f"cannot import {name}, without which the microVM should not run: {error}"
            ) from None


def _given(custom: bool, terminal: bool) -> Iterator[str]:
    if custom:
        # And what an exception in such a device is reported with.
        yield from ("crackle.virtio.custom.device", "threading")
        if sys.version_info >= (3, 13):
            yield "traceback"
    if terminal:
        yield "termios"


def _configured(config: VmConfig | None) -> Iterator[str]:
    if config is None:
        return
    for drive in config.drives:
        if drive.socket is not None:
            yield _VHOST_USER
        else:
            yield from _BLOCK
            if drive.io_engine == "Async":
                yield _ASYNC
        yield _LIMITER
    if config.network_interfaces:
        yield from (_NET, _LIMITER)
    if config.vsock is not None:
        yield _VSOCK
    if config.balloon is not None:
        yield _BALLOON
    if config.entropy is not None:
        yield from (_RNG, _LIMITER)
    if config.mmds_config is not None:
        yield from _METADATA
