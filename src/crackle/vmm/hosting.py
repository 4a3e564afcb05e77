"""Where a program's microVM lives, in this process or another: what no command carries, and who takes the commands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from crackle.errors import ConfigError
from crackle.runtime.filters import filtered, use_filters
from crackle.schema.config import VmConfig
from crackle.seccomp import FAILS, default_filters
from crackle.telemetry.logger import OFF, Logger
from crackle.virtio.custom.base import VirtioDevice
from crackle.vmm import processes
from crackle.vmm.builder import build, restore
from crackle.vmm.controller import Controller
from crackle.vmm.machine import BuildOptions, Machine
from crackle.vmm.remote import Link, RemoteController
from crackle.vmm.shell import Shell
from crackle.vmm.wire import Birth

if TYPE_CHECKING:
    from crackle.schema.jail import Jail
    from crackle.snapshot.fork import Heritage
    from crackle.snapshot.load import Loaded, Template
    from crackle.vmm.devices import Held

    class Source(processes.Source, Protocol):
        """A snapshot that has been read."""

        template: Template


class Hosting(NamedTuple):
    """As the arguments of `MicroVM`, which says what they are."""

    console: tuple[int, int] | None
    console_limit: int
    devices: tuple[VirtioDevice, ...]
    logger: Logger | None
    metadata_limit: int
    profile: bool
    own_process: bool
    jail: Jail | None = None
    core_scheduling: bool = False
    api_sock: str | None = None

    def check(self) -> None:
        """ConfigError for what a process of its own cannot have."""
        if not self.own_process:
            return
        for given, what in ((self.devices, "devices written in Python"), (self.logger, "a logger")):
            if given:
                raise ConfigError(f"{what} cannot be given to a microVM in a process of its own")

    def controller(
        self, instance_id: str, console: tuple[int, int], source: Source | None
    ) -> Controller | RemoteController:
        """One that knows of no guest yet. console: its descriptors for the machine. source: what it is to load."""
        if self.own_process:
            return self._in_other_process(instance_id, console, source)
        if not filtered():
            # Of this process only the threads that are the microVM's; and not those on which the user's Python runs.
            use_filters(default_filters(FAILS), ends=False)
        builder = _Builder(
            BuildOptions(
                console_in=console[0],
                console_out=console[1],
                console_waits=True,
                ends_on_panic=True,
                logger=self.logger,
                profile=self.profile,
                devices=self.devices,
            )
        )
        ahead = None
        if source is not None:
            config = source.template.snapshot.config
            assert config.machine_config is not None
            ahead = Shell(config.machine_config, config.shares_memory)
        return Controller(
            builder,
            Shell,
            restore=builder.restore,
            instance_id=instance_id,
            logger=self.logger or Logger(instance_id, level=OFF),
            metadata_limit=self.metadata_limit,
            shell=ahead,
            template=None if source is None else source.template,
        )

    def _in_other_process(
        self, instance_id: str, console: tuple[int, int], source: Source | None
    ) -> RemoteController:
        link = Link()
        try:
            birth = Birth(
                instance_id,
                self.metadata_limit,
                os.getcwd(),
                console=(console[0] >= 0, console[1] >= 0),
                profile=self.profile,
                snapshot=None if source is None else source.key,
                jail=self.jail,
                core_scheduling=self.core_scheduling,
                api_sock=self.api_sock,
            )
            processes.ask(birth, [*link.theirs, *(fd for fd in console if fd >= 0)], source)
        except BaseException:
            link.close()
            raise
        link.close_theirs()
        return RemoteController(link, instance_id, self.api_sock)


class _Builder:
    """Makes the controller's machine; not a method of the microVM, so that the two are no cycle."""

    def __init__(self, options: BuildOptions) -> None:
        self._options = options

    def __call__(self, config: VmConfig, shell: Any, held: Mapping[tuple[str, str], Held]) -> Machine:
        assert shell is None or isinstance(shell, Shell)
        return build(config, shell, self._options, held)

    def restore(self, loaded: Loaded | Heritage, shell: Any, held: Mapping[tuple[str, str], Held]) -> Machine:
        assert shell is None or isinstance(shell, Shell)
        return restore(loaded, shell, self._options, held)
