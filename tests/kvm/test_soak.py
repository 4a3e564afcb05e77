"""Snapshots amid kills, for as long as it takes to believe them: `make soak`."""

from __future__ import annotations

import http.client
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Process
from .test_fork import fork_and_kill
from .test_snapshot import by_file, files

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1700)]

KILLS = int(os.environ.get("CRACKLE_SOAK_KILLS", "200"))
SEED = int(os.environ.get("CRACKLE_SOAK_SEED", "1"))
# Longer than a snapshot of these guests takes, and than a load.
SAVING_S, LOADING_S = 0.3, 0.06


def test_a_monitor_killed_at_any_moment_of_a_save_or_a_load_loses_nothing(
    spawn: Callable[..., Process], guests: Path, tmp_path: Path
) -> None:
    """Whatever was acknowledged is there, or something newer; the guest checks its memory at each count."""
    chance = random.Random(SEED)
    process = spawn()
    process.boot(guests / "count.elf", "touch=4 tick=100", track_dirty_pages=True)
    process.counted(3)
    amid_save = amid_load = saves = 0
    for _ in range(KILLS):
        least, done = save_until_killed(process, chance.uniform(0, SAVING_S), tmp_path)
        saves += done
        amid_save += 1
        most = process.numbers()[-1]
        if not (tmp_path / "s").exists():
            # Killed before there was a first one.
            assert done == 0
            process = spawn()
            process.boot(guests / "count.elf", "touch=4 tick=100", track_dirty_pages=True)
            process.counted(3)
            continue
        if chance.random() < 0.5:
            amid_load += load_and_kill(spawn(), chance.uniform(0, LOADING_S), tmp_path)
        process = spawn()
        process.api.ask("PUT", "/snapshot/load", by_file(tmp_path, resume_vm=True, track_dirty_pages=True))
        process.counted(1)
        process.counted(process.numbers()[0] + 1)
        # One line may have been cut in two, the first half said before and the second after.
        assert least < process.numbers()[0] <= most + 2
        # What a kill has left is taken away by the next save: two files, and a second name for memory.
        assert len(list(tmp_path.glob("[sm]*"))) <= 6
    print(f"\nkilled amid {amid_save} times of saving ({saves} saves done) and {amid_load} loads")


def save_until_killed(process: Process, seconds: float, directory: Path) -> tuple[int, int]:
    """Save the guest again and again; how far it had counted at the last save that was acknowledged, and how many."""
    killer = threading.Timer(seconds, process.process.kill)
    least = done = 0
    killer.start()
    try:
        while True:
            process.api.ask("PATCH", "/vm", {"state": "Paused"})
            while (before := len(process.text)) != (process.read(0) or len(process.text)):
                assert len(process.text) > before
            counted = process.numbers()[-1]
            kind = "Diff" if done % 2 else "Full"
            process.api.ask("PUT", "/snapshot/create", files(directory) | {"snapshot_type": kind})
            least, done = counted, done + 1
            process.api.ask("PATCH", "/vm", {"state": "Resumed"})
    except (OSError, http.client.HTTPException):
        killer.join()
        process.process.wait()
    process.kill()
    return least, done


def load_and_kill(process: Process, seconds: float, directory: Path) -> int:
    """Kill a process while it loads; 1 if it was that early. The files are as they were."""
    before = {path.name: path.stat().st_mtime_ns for path in directory.glob("[sm]*")}
    killer = threading.Timer(seconds, process.process.kill)
    killer.start()
    early = 0
    try:
        process.api.ask("PUT", "/snapshot/load", by_file(directory, resume_vm=True))
    except (OSError, http.client.HTTPException):
        early = 1
    killer.join()
    process.kill()
    assert {path.name: path.stat().st_mtime_ns for path in directory.glob("[sm]*")} == before
    return early


def test_a_parent_killed_at_any_moment_of_a_fork_leaves_whole_clones_or_none(
    guests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(SEED)
    survived, longest = 0, 0.1
    for number in range(KILLS):
        place = tmp_path / str(number)
        place.mkdir()
        monkeypatch.setenv("CRACKLE_FAMILY", str(place))
        alive = fork_and_kill(guests, place, chance.uniform(0, longest))
        survived += alive
        # So that most moments are within a fork, however fast this machine is.
        longest *= 0.8 if alive else 1.1
    print(
        f"\nkilled {KILLS} times amid a fork: its clones lived on {survived} times, and never were {KILLS - survived}"
    )
