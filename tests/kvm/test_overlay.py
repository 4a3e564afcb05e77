"""Guests whose disks have overlays: many on one base, gone on from many times, moved to new layers as they run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from crackle import ConfigError, Drive, MicroVM, Overlay
from crackle.disk import commit, make
from crackle.disk.overlay import read_header

from .conftest import PATIENCE
from .test_bare_block import MIB, pattern

SIZE = 2 * MIB


@pytest.fixture(params=["Sync", "Async"])
def engine(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_bytes(pattern(SIZE, 7))
    return path


Boot = Callable[..., MicroVM]


@pytest.fixture
def boot(guests: Path, base: Path, engine: str) -> Boot:
    """A microVM that does `tasks` on a disk over the base, with `overlay`, and has not started yet."""

    def boot(tasks: str, overlay: Overlay | None, **section: object) -> MicroVM:
        options = {"path_on_host": str(base), "io_engine": engine, "cache_type": "Writeback", **section}
        if overlay is not None:
            options["overlay"] = overlay
        return MicroVM(guests / "blk.elf", drives=[Drive("d", False, **options)], boot_args=tasks, memory=64)  # type: ignore[arg-type]

    return boot


def finished(*machines: MicroVM) -> None:
    """Have them come to their end, and nothing failed."""
    for vm in machines:
        assert vm.console.expect("blk end", PATIENCE).before is not None
        assert b"FAIL" not in vm.console.output


def test_many_guests_write_to_one_base_and_each_finds_its_own(boot: Boot, base: Path, tmp_path: Path) -> None:
    tasks = "seed={n} t=fill,4096,16 t=flush t=check,65536,2"
    machines = [boot(tasks.format(n=n), Overlay(str(tmp_path / f"{n}"))) for n in range(10, 13)]
    machines.append(boot(tasks.format(n=20), Overlay(memory=True)))
    for vm in machines:
        vm.start()
    finished(*machines)
    for vm in machines:
        vm.stop()
    assert base.read_bytes() == pattern(SIZE, 7)
    commit(str(tmp_path / "11"))
    assert base.read_bytes() == pattern(SIZE, 11)


def running_through(vm: MicroVM, what: str, do: Callable[[int], None]) -> None:
    """Call `do` while the guest works, again and again until it has done `what` for the last time."""
    n = 0
    deadline = time.monotonic() + PATIENCE
    while f"blk {what}".encode() not in vm.console.output:
        assert time.monotonic() < deadline
        if n < 12:
            do(n)
        n += 1


def test_a_guest_goes_on_from_one_snapshot_many_times(boot: Boot, base: Path, tmp_path: Path) -> None:
    """Saved in the middle of writing: each clone writes the rest to an overlay of its own, and finds all of it."""
    saved = tmp_path / "saved"
    with boot("irq seed=6 t=fill,4096,4 t=flush t=check,4096,8", Overlay(str(tmp_path / "o"))) as vm:
        vm.pause()
        vm.snapshot(saved)
    clones = [
        MicroVM.restore(saved, overlays={"d": overlay})
        for overlay in (tmp_path / "a", tmp_path / "b", Overlay(memory=True))
    ]
    finished(*clones)
    for vm in clones:
        vm.stop()
    assert base.read_bytes() == pattern(SIZE, 7)
    # In its place, once: then the overlay is not what was saved any more.
    with MicroVM.restore(saved) as vm:
        finished(vm)
    for overlays in ({}, {"d": tmp_path / "c"}):
        with pytest.raises(ConfigError, match="has been written to since"):
            MicroVM.restore(saved, overlays=overlays)
    with pytest.raises(
        ConfigError, match=f"{tmp_path}/a was made over {tmp_path}/o, which has been written to"
    ):
        MicroVM.restore(saved, overlays={"d": tmp_path / "a"})


@pytest.mark.parametrize("memory", [False, True])
def test_a_snapshot_may_keep_the_overlays_as_they_were(
    boot: Boot, base: Path, tmp_path: Path, memory: bool
) -> None:
    saved = tmp_path / "saved"
    overlay = Overlay(memory=True) if memory else Overlay(str(tmp_path / "o"))
    with boot("end=idle irq seed=6 t=fill,4096,4 t=flush t=check,4096,8", overlay) as vm:
        for _ in range(3):
            vm.snapshot(saved, keep_overlays=not memory)
        finished(vm)
    kept = sorted(path.name for path in saved.iterdir())
    assert len(kept) == 3, "those of the snapshots before are gone"
    assert kept[2].startswith("state.d.")
    for _ in range(2):
        with MicroVM.restore(saved, overlays={"d": Overlay(memory=True)}) as vm:
            finished(vm)
    with MicroVM.restore(saved) as vm:
        finished(vm)
        config = vm.config.drives[0].overlay
    assert config.path == str(saved / kept[2])  # type: ignore[union-attr]
    assert base.read_bytes() == pattern(SIZE, 7)


def test_a_disk_without_an_overlay_may_get_one_when_it_goes_on(
    boot: Boot, base: Path, tmp_path: Path
) -> None:
    with boot("irq seed=6 t=fill,4096,4 t=flush t=check,4096,8", None) as vm:
        vm.pause()
        vm.snapshot(tmp_path / "saved")
    before = base.read_bytes()
    clones = [MicroVM.restore(tmp_path / "saved", overlays={"d": tmp_path / name}) for name in "ab"]
    finished(*clones)
    for vm in clones:
        vm.stop()
    assert base.read_bytes() == before
    with pytest.raises(
        ConfigError, match="has been written to since the snapshot was taken, or is another one"
    ):
        MicroVM.restore(tmp_path / "saved", overlays={"d": tmp_path / "a"})
    # Nothing is held of what was refused.
    MicroVM.restore(tmp_path / "saved", overlays={"d": tmp_path / "c"}).stop()


def test_a_running_guest_gets_new_layers(boot: Boot, base: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"layer{n}" for n in range(12)]
    with boot("end=idle irq seed=6" + " t=fill,4096,4 t=check,4096,8" * 3 + " t=id", None) as vm:
        frozen: list[bytes] = []

        def push(n: int) -> None:
            vm.update_drive("d", overlay=paths[n])
            frozen.append(base.read_bytes())

        running_through(vm, "id", push)
        finished(vm)
        with pytest.raises(ConfigError, match="A drive with an overlay keeps the file that lies below"):
            vm.update_drive("d", base)
        with pytest.raises(ConfigError, match=r"The new overlay .* is there already"):
            vm.update_drive("d", overlay=paths[0])
    assert len(set(frozen)) == 1, "the base was written to when it had an overlay"
    made = [path for path in paths if path.exists()]
    assert len(made) == len(frozen)
    for path in reversed(made):
        commit(str(path))
    assert base.read_bytes() == pattern(SIZE, 6)


def test_a_layer_that_is_pushed_while_a_guest_is_saved_is_a_clones(
    boot: Boot, base: Path, tmp_path: Path
) -> None:
    """As a fork does it: the source goes on in a layer of its own, and so does each clone."""
    with boot("irq seed=6 t=fill,4096,4 t=flush t=check,4096,8", Overlay(str(tmp_path / "o"))) as vm:
        vm.pause()
        vm.snapshot(tmp_path / "saved")
        vm.update_drive("d", overlay=tmp_path / "parent")
        vm.resume()
        clones: Sequence[MicroVM] = [
            MicroVM.restore(tmp_path / "saved", overlays={"d": tmp_path / name}) for name in ("one", "two")
        ]
        finished(vm, *clones)
        for clone in clones:
            clone.stop()
    with (tmp_path / "parent").open("rb") as file:
        assert read_header(file.fileno(), "parent").under.path == "o"


def test_a_base_that_has_changed_is_refused_before_the_guest_starts(
    boot: Boot, base: Path, tmp_path: Path
) -> None:
    make(str(tmp_path / "o"), base=str(base))
    other = tmp_path / "other"
    other.write_bytes(pattern(SIZE, 8))
    with pytest.raises(
        ConfigError, match=f"{tmp_path}/o belongs to another base: it was made over {base}, a disk"
    ):
        boot("", Overlay(str(tmp_path / "o")), path_on_host=str(other))
    base.write_bytes(pattern(SIZE, 8))
    with pytest.raises(
        ConfigError, match=f"the base {base} has changed since the overlay {tmp_path}/o was made"
    ):
        boot("", Overlay(str(tmp_path / "o")))
