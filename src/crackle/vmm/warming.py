"""Warming a snapshot: one clone whose page faults are noted, for page-fault handlers to read ahead."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from crackle.errors import ConfigError, CrackleError, GuestError
from crackle.schema.drive import Overlay
from crackle.snapshot.handler import Handler, listen

if TYPE_CHECKING:
    from crackle.vmm.clones import Snapshot
    from crackle.vmm.identity import CloneOptions


def warm(snapshot: Snapshot, seconds: float, options: CloneOptions) -> int:
    """As `Snapshot.warm`, which says what it is."""
    if not seconds > 0:
        raise ConfigError(f"a snapshot is warmed for some seconds, not {seconds!r}")
    for name in ("handler", "in_process", "jail"):
        if name in options:
            raise ConfigError(
                f"{name}: a snapshot is warmed by a handler here, and a microVM in another process, in no jail"
            )
    drives, overlays = options.get("drives", {}), options.get("overlays", {})
    options["overlays"] = {
        **{
            drive.drive_id: Overlay(memory=True)
            for drive in snapshot.config.drives
            if drive.drive_id not in drives and not drive.is_read_only
        },
        **overlays,
    }
    failures: list[str] = []
    # A path as short as a Unix socket's has to be.
    with tempfile.TemporaryDirectory(prefix="crackle-") as directory, ThreadPoolExecutor(1) as threads:
        options["handler"] = path = os.path.join(directory, "socket")
        handler = Handler(snapshot.paths[1], listen(path), failures.append, record=True, seconds=None)
        try:
            noted = threads.submit(handler.serve_one)
            try:
                (vm,) = snapshot.clone(1, **options)
            except CrackleError:
                # The handler knows better why, if it was that.
                if noted.done():
                    noted.result()
                raise
            try:
                status = vm._machine().wait(seconds)
            finally:
                vm.stop()
            size = noted.result()
        finally:
            handler.close()
    if failures:
        raise ConfigError(failures[0])
    if status is not None and status.exit_code:
        raise GuestError(status.message)
    return size
