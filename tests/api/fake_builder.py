"""Runs crackle-vmm with a machine that only notes what it is told: what happens after boot, without KVM.

The machine writes each order as a line to the file named like its kernel with ``.told`` appended, and ends
when it is told ``ctrl-alt-del``. A drive update to a path that ends in ``refused`` is refused.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any

import msgspec

from crackle.cli.vmm import run
from crackle.errors import ConfigError
from crackle.vmm import shell as shell_module


class ExitStatus(msgspec.Struct):
    reason: str
    message: str
    exit_code: int


class Machine:
    def __init__(self, config: Any) -> None:
        self.exit_fd = os.eventfd(0)
        self._told = config.boot_source.kernel_image_path + ".told"
        self._ended: ExitStatus | None = None
        self._reads = 0
        self.state = "Running"

    def _note(self, *words: object) -> None:
        with open(self._told, "a") as told:
            print(*words, file=told)

    def start(self) -> None:
        self._note("start")

    def pause(self) -> None:
        self._note("pause")
        self.state = "Paused"

    def resume(self) -> None:
        self._note("resume")
        self.state = "Running"

    def at_rest(self, call: Callable[[list[Any]], object]) -> None:
        call([])

    def serve_metadata(self, config: Any, _store: Any) -> None:
        self._note("metadata", *config.network_interfaces, config.ipv4_address, config.version)

    def send_ctrl_alt_del(self) -> None:
        self._note("ctrl-alt-del")
        self._ended = ExitStatus("reset", "the guest asked for a reset", 0)
        os.eventfd_write(self.exit_fd, 1)

    def update(self, kind: str, identifier: str, resource: Any, _held: object = None) -> None:
        path = str(resource.path_on_host)
        if path.endswith("refused"):
            raise ConfigError("this file is refused")
        self._note("update", kind, identifier, path)

    def attach(self, kind: str, identifier: str, _resource: Any, _held: object = None) -> None:
        self._note("attach", kind, identifier)

    def detach(self, kind: str, identifier: str) -> None:
        self._note("detach", kind, identifier)

    def metrics(self) -> dict[str, dict[str, int]]:
        self._reads += 10
        return {"block_root": {"read_count": self._reads, "of_our_own": 1}}

    def exit_status(self) -> ExitStatus | None:
        return self._ended

    def stop(self) -> None:
        self._note("stop")


def build(config: Any, _shell: object, _options: object, _held: object) -> Machine:
    if config.boot_source.boot_args == "unbootable":
        raise ConfigError("this kernel does not boot")
    return Machine(config)


builder: Any = types.ModuleType("crackle.vmm.builder")
builder.build = build
sys.modules["crackle.vmm.builder"] = builder
shell: Any = shell_module
shell.Shell = lambda _config, _shared=False, _base=None: None

if sys.argv[1:2] == ["--zygote"]:
    # Its children have the same machine.
    from crackle.cli.zygote import load
    from crackle.runtime.zygote import Zygote, listen

    load()
    Zygote(listen(sys.argv[2]), run, path=sys.argv[2]).serve()
else:
    sys.exit(run(sys.argv[1:]))
