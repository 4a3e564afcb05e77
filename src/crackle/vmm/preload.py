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
    from collections.abc import Iterator

    from crackle.schema.config import VmConfig

# For what goes wrong: a request that is no JSON, a guest that fails or stays silent.
ALWAYS = (
    "_socket",
    "select",
    "crackle.schema.position",
    "crackle.vmm.probe",
    f"crackle.arch.{os.uname().machine}.probe",
    "crackle.vmm.silence",
)


def preload(config: VmConfig | None = None, *, custom: bool = False, terminal: bool = False) -> None:
    """Import what a machine with `config` will want while it runs; without one, what each does.

    custom: it has devices written in Python. terminal: its console is one. ConfigError when a module is not there.
    """
    for name in (*ALWAYS, *_configured(config), *_given(custom, terminal)):
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
            yield "crackle.virtio.vhost_user.block"
        else:
            # What opens the file of a PATCH is another module than the device's.
            yield from ("crackle.virtio.block.device", "crackle.virtio.block.backing")
            if drive.io_engine == "Async":
                yield "crackle.virtio.block.uring"
        yield "crackle.ratelimit.limiter"
    if config.network_interfaces:
        yield from ("crackle.virtio.net.device", "crackle.ratelimit.limiter")
    if config.vsock is not None:
        yield "crackle.virtio.vsock.device"
    if config.mmds_config is not None:
        yield from ("crackle.mmds.store", "crackle.mmds.service")
