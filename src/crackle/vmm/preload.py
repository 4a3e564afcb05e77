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
    from collections.abc import Iterable, Iterator, Sequence

    from crackle.schema import Drive, NetworkInterface, Pmem
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
_TAP = "crackle.virtio.net.tap"
_VSOCK = "crackle.virtio.vsock.device"
_BALLOON = "crackle.virtio.balloon.device"
_RNG = "crackle.virtio.rng.device"
_PMEM = "crackle.virtio.pmem.device"
_METADATA = ("crackle.mmds.store", "crackle.mmds.service")


def preload(config: VmConfig | None = None, *, custom: bool = False, terminal: bool = False) -> None:
    """Import what a machine with `config` will want while it runs; without one, what each does.

    custom: it has devices written in Python. terminal: its console is one. ConfigError when a module is not there.
    """
    _import((*ALWAYS, *_configured(config), *_given(custom, terminal)))


def preload_coming(
    *, drives: Sequence[Drive] = (), interfaces: Sequence[NetworkInterface] = (), pmem: Sequence[Pmem] = ()
) -> None:
    """Import what devices want that come while the machine runs. ConfigError when there is no leave to any more."""
    _import(
        _of(drives, interfaces, pmem),
        "which a microVM that runs may not load: begin with a device of this kind",
    )


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
                _TAP,
                _VSOCK,
                _BALLOON,
                _RNG,
                _PMEM,
                *_METADATA,
            ),
        )
    )
    from crackle.arch import platform

    platform.make_ready()


def preload_api() -> None:
    """Import what serves the API."""
    _import(("crackle.api.server",))


def _import(names: Iterable[str], consequence: str = "without which the microVM should not run") -> None:
    for name in names:
        try:
            __import__(name)
        except (ImportError, OSError) as error:
            raise ConfigError(f"cannot import {name}, {consequence}: {error}") from None


def _given(custom: bool, terminal: bool) -> Iterator[str]:
    if custom:
        # And what an exception in such a device is reported with.
        yield from ("crackle.virtio.custom.device", "threading")
        if sys.version_info >= (3, 13):
            yield "traceback"
    if terminal:
        yield "termios"


def _of(
    drives: Sequence[Drive], interfaces: Sequence[NetworkInterface], pmem: Sequence[Pmem]
) -> Iterator[str]:
    for drive in drives:
        if drive.socket is not None:
            yield _VHOST_USER
        else:
            yield from _BLOCK
            if drive.io_engine == "Async":
                yield _ASYNC
        yield _LIMITER
    if interfaces:
        yield from (_NET, _TAP, _LIMITER)
    if pmem:
        yield from (_PMEM, _LIMITER, *_BLOCK)


def _configured(config: VmConfig | None) -> Iterator[str]:
    if config is None:
        return
    yield from _of(config.drives, config.network_interfaces, config.pmem)
    if config.vsock is not None:
        yield _VSOCK
    if config.balloon is not None:
        yield _BALLOON
    if config.entropy is not None:
        yield from (_RNG, _LIMITER)
    if config.mmds_config is not None:
        yield from _METADATA
