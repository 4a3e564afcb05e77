"""crackle-vmm as tests start it: itself or, with CRACKLE_LAUNCHED set, by way of crackle-launch and a zygote."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAUNCHER = Path(sysconfig.get_path("scripts")) / "crackle-launch"
FAKE_BUILDER = str(Path(__file__).parents[1] / "api" / "fake_builder.py")
LAUNCHED = "CRACKLE_LAUNCHED" in os.environ
_DIRECTORY = Path(f"/tmp/crackle-zygotes-{os.getpid()}")


def by_launcher(zygote: Path) -> list[str]:
    """The command that stands for crackle-vmm; it says so when it executes that instead."""
    return ["/usr/bin/env", f"CRACKLE_ZYGOTE={zygote}", "CRACKLE_LAUNCH_DEBUG=1", str(LAUNCHER)]


if LAUNCHED:
    REAL = by_launcher(_DIRECTORY / "real")
    FAKE = by_launcher(_DIRECTORY / "fake")
else:
    REAL = [sys.executable, "-m", "crackle.cli.vmm"]
    FAKE = [sys.executable, FAKE_BUILDER]


def own_kib(child: int) -> int:
    """Of the zygote's memory, what that child has copies of (proc(5), smaps)."""
    found, counted = 0, False
    for line in Path(f"/proc/{child}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counted = "memfd:crackle-zygote" in line
        elif counted and line.startswith("Anonymous:"):
            found += int(line.split()[1])
    return found


class ZygoteProcess:
    """A zygote on a socket of its own. arguments: of the interpreter. appears: how one sees that it listens."""

    def __init__(
        self,
        path: Path,
        *arguments: str,
        command: list[str] | None = None,
        spares: int = 0,
        appears: Callable[[Path], bool] = Path.exists,
        **options: Any,
    ) -> None:
        self.path = path
        self.spares = spares
        given = arguments or (
            *("-X", "utf8", "-m", "crackle.cli.zygote", "--socket", str(path)),
            *("--spares", str(spares)),
        )
        self.process = subprocess.Popen(
            command or [sys.executable, *given],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        deadline = time.monotonic() + 30
        while not appears(path):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @property
    def command(self) -> list[str]:
        return by_launcher(self.path)

    def children(self) -> list[int]:
        """Its children, those that nobody has waited for included."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def monitors(self) -> set[int]:
        """Those of its children that have got their launcher."""
        return {pid for pid in self.children() if Path(f"/proc/{pid}/comm").read_text() == "crackle-vmm\n"}

    def is_idle(self) -> bool:
        """Whether there are no children but spares."""
        return len(self.children()) <= self.spares

    def end(self) -> str:
        """What it has said."""
        self.process.terminate()
        said = self.process.communicate(timeout=30)[1]
        return str(said)


def start_zygotes() -> list[ZygoteProcess]:
    """The two behind REAL and FAKE."""
    _DIRECTORY.mkdir(mode=0o700)
    fake = _DIRECTORY / "fake"
    return [ZygoteProcess(_DIRECTORY / "real"), ZygoteProcess(fake, FAKE_BUILDER, "--zygote", str(fake))]


def end_zygotes(zygotes: list[ZygoteProcess]) -> None:
    said = [zygote.end() for zygote in zygotes]
    _DIRECTORY.rmdir()
    assert said == ["", ""]
