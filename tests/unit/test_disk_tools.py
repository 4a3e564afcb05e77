"""Overlays in the hands of people: cloned, shown, committed, put over another base; and what is refused."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crackle.disk import clone, commit, describe, make, rebase, tools
from crackle.disk.overlay import read_header
from crackle.errors import ConfigError
from crackle.schema.drive import Overlay
from crackle.virtio.block.backing import open_backing
from support.disk import OK, SECTOR
from support.overlays import OverlaidDisk, opened

BLOCK = 4096
SIZE = 300 * BLOCK


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_bytes(os.urandom(SIZE))
    return path


def change(base: Path, overlay: Path | Overlay, seed: int) -> bytes:
    """Write here and there, discard here and there; what is on the disk then."""
    number = random.Random(seed)
    with OverlaidDisk(base, overlay) as disk:
        for _ in range(12):
            size = number.randrange(1, 40) * SECTOR
            offset = number.randrange((SIZE - size) // SECTOR) * SECTOR
            if number.random() < 0.3:
                assert disk.discard(offset, size) == OK
            else:
                assert disk.write(offset, number.randbytes(size)) == OK
        return contents(disk)


def contents(disk: OverlaidDisk) -> bytes:
    return b"".join(disk.read(at, SIZE // 4) for at in range(0, SIZE, SIZE // 4))


def shown(base: Path, overlay: Path) -> bytes:
    with OverlaidDisk(base, overlay) as disk:
        return contents(disk)


def test_a_clone_shows_the_same_disk_and_goes_its_own_way(base: Path, tmp_path: Path) -> None:
    expected = change(base, tmp_path / "o", 1)
    for name in "abc":
        clone(str(tmp_path / "o"), str(tmp_path / name))
    made = [change(base, tmp_path / name, seed) for seed, name in enumerate("abc", 2)]
    assert len({expected, *made}) == 4
    assert [shown(base, tmp_path / name) for name in "abc"] == made
    assert shown(base, tmp_path / "o") == expected


def test_a_clone_that_cannot_be_made_leaves_nothing(base: Path, tmp_path: Path) -> None:
    make(str(tmp_path / "o"), base=str(base))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot make the overlay .*/o: File exists \(os error 17\)"):
        clone(str(tmp_path / "o"), str(tmp_path / "o"))
    with pytest.raises(ConfigError, match="No such file or directory"):
        clone(str(tmp_path / "o"), str(tmp_path / "nowhere" / "new"))
    with pytest.raises(ConfigError, match="base is no overlay, or its header is damaged"):
        clone(str(base), str(tmp_path / "new"))
    assert sorted(os.listdir(tmp_path)) == before


def test_a_layer_that_is_written_to_again_is_noticed_by_what_lies_over_it(base: Path, tmp_path: Path) -> None:
    change(base, tmp_path / "o", 1)
    make(str(tmp_path / "new"), over=str(tmp_path / "o"))
    with OverlaidDisk(base, tmp_path / "o") as disk:
        disk.read(0, SECTOR)
    shown(base, tmp_path / "new")
    change(base, tmp_path / "o", 2)
    with pytest.raises(ConfigError, match=r"new was made over .*/o, which has been written to since"):
        opened(base, tmp_path / "new")
    assert dict(describe(str(tmp_path / "new")))["broken"].endswith("or is another overlay now")


def test_a_directory_of_layers_may_move(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    change(base, tmp_path / "a" / "o", 1)
    expected = change(base, Overlay(str(tmp_path / "a" / "new"), over=str(tmp_path / "a" / "o")), 2)
    (tmp_path / "a").rename(tmp_path / "b")
    assert shown(base, tmp_path / "b" / "new") == expected


def test_commit_writes_an_overlay_into_its_base(base: Path, tmp_path: Path) -> None:
    expected = change(base, tmp_path / "o", 1)
    commit(str(tmp_path / "o"))
    assert base.read_bytes() == expected
    assert dict(describe(str(tmp_path / "o")))["holds"] == "0 bytes"
    again = change(base, tmp_path / "o", 2)
    assert again != expected
    commit(str(tmp_path / "o"))
    assert base.read_bytes() == again


def test_commit_writes_a_layer_into_the_one_below(base: Path, tmp_path: Path) -> None:
    before = base.read_bytes()
    change(base, tmp_path / "o", 1)
    expected = change(base, Overlay(str(tmp_path / "new"), over=str(tmp_path / "o")), 2)
    commit(str(tmp_path / "new"))
    assert shown(base, tmp_path / "o") == shown(base, tmp_path / "new") == expected
    assert base.read_bytes() == before


@pytest.mark.parametrize("where", ["_copy", "_empty"])
@pytest.mark.parametrize("layered", [False, True])
def test_a_commit_that_ends_in_the_middle_is_finished_by_the_next(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, layered: bool
) -> None:
    overlay = Overlay(str(tmp_path / "o"))
    expected = change(base, overlay, 1)
    if layered:
        overlay = Overlay(str(tmp_path / "new"), over=str(tmp_path / "o"))
        expected = change(base, overlay, 2)
    path = Path(str(overlay.path))
    done = getattr(tools, where)
    calls: list[None] = []

    def die(*arguments: object) -> None:
        calls.append(None)
        if len(calls) == 4 or where == "_empty":
            raise KeyboardInterrupt
        done(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tools, where, die)
        with pytest.raises(KeyboardInterrupt):
            commit(str(path))
    with pytest.raises(ConfigError, match="only half committed: finish that with crackle disk commit"):
        opened(base, path)
    assert "half committed" in dict(describe(str(path)))["state"]
    commit(str(path))
    assert shown(base, path) == expected
    assert layered or base.read_bytes() == expected


def test_rebase_onto_the_base_makes_one_layer_of_many(base: Path, tmp_path: Path) -> None:
    change(base, tmp_path / "0", 0)
    for n in range(1, 4):
        expected = change(base, Overlay(str(tmp_path / f"{n}"), over=str(tmp_path / f"{n - 1}")), n)
    rebase(str(tmp_path / "3"), str(base))
    for n in range(3):
        (tmp_path / f"{n}").unlink()
    assert shown(base, tmp_path / "3") == expected


def test_rebase_onto_another_base_keeps_the_disk(base: Path, tmp_path: Path) -> None:
    expected = change(base, tmp_path / "o", 1)
    other = tmp_path / "other"
    shutil.copy(base, other)
    changed = change(other, tmp_path / "others", 5)
    commit(str(tmp_path / "others"))
    rebase(str(tmp_path / "o"), str(other))
    base.unlink()
    assert shown(other, tmp_path / "o") == expected
    assert other.read_bytes() == changed
    change(other, tmp_path / "layer", 7)
    rebase(str(tmp_path / "o"), str(tmp_path / "layer"), overlay=True)
    assert shown(other, tmp_path / "o") == expected


def test_a_base_that_was_copied_is_taken_when_that_is_said(base: Path, tmp_path: Path) -> None:
    expected = change(base, tmp_path / "o", 1)
    shutil.copy2(base, tmp_path / "moved")
    assert shown(tmp_path / "moved", tmp_path / "o") == expected, "its time is what it was"
    shutil.copyfile(base, tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"it has been written to. If it is a copy, .* rebase --unchecked"):
        opened(tmp_path / "copy", tmp_path / "o")
    rebase(str(tmp_path / "o"), str(tmp_path / "copy"), checked=False)
    assert shown(tmp_path / "copy", tmp_path / "o") == expected


@pytest.mark.parametrize(
    "do", [commit, lambda path: rebase(path, path), lambda path: clone(path, path + "2")]
)
def test_an_overlay_that_a_microvm_uses_is_left_alone(base: Path, tmp_path: Path, do: object) -> None:
    make(str(tmp_path / "o"), base=str(base))
    backing = open_backing(str(tmp_path / "o"), False)
    assert backing.lock()
    before = (tmp_path / "o").read_bytes()
    with pytest.raises(ConfigError, match=r"a microVM (writes to|uses) .*/o: stop it first"):
        do(str(tmp_path / "o"))  # type: ignore[operator]
    backing.close()
    assert (tmp_path / "o").read_bytes() == before


def test_rebase_refuses_what_is_no_disk_of_this_size_or_lies_over_it(base: Path, tmp_path: Path) -> None:
    make(str(tmp_path / "o"), base=str(base))
    make(str(tmp_path / "new"), over=str(tmp_path / "o"))
    (tmp_path / "small").write_bytes(bytes(BLOCK))
    with pytest.raises(ConfigError, match=f"small has 4096 bytes, and the disk {SIZE}"):
        rebase(str(tmp_path / "o"), str(tmp_path / "small"))
    with pytest.raises(ConfigError, match=r"new lies over .*/o"):
        rebase(str(tmp_path / "o"), str(tmp_path / "new"), overlay=True)


def damaged(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_a_damaged_or_torn_header_is_told_and_the_one_before_it_counts(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "o"
    expected = change(base, path, 1)
    change(base, path, 2)
    commit(str(path))
    rebase(str(path), str(base), checked=False)
    with path.open("rb") as file:
        newest = read_header(file.fileno(), "o").number
    damaged(path, newest % 2 * (32 << 10) + 40, b"\xff")
    with path.open("rb") as file:
        assert read_header(file.fileno(), "o").number == newest - 1
    damaged(path, (newest + 1) % 2 * (32 << 10) + 12, b"\xff\xff")
    with pytest.raises(ConfigError, match="o is no overlay, or its header is damaged"):
        opened(base, path)
    assert expected
    for contents, words in ((b"", "no overlay"), (b"CRKOVL\0\0" + b"\x02" + bytes(99), "format 2 is newer")):
        (tmp_path / "bad").write_bytes(contents)
        with pytest.raises(ConfigError, match=words):
            opened(base, tmp_path / "bad")
    make(str(tmp_path / "short"), base=str(base))
    os.truncate(tmp_path / "short", 1 << 20)
    with pytest.raises(ConfigError, match="short is truncated: 1048576 bytes"):
        opened(base, tmp_path / "short")


def test_an_overlay_below_itself_comes_to_an_end(base: Path, tmp_path: Path) -> None:
    make(str(tmp_path / "a"), base=str(base))
    make(str(tmp_path / "b"), over=str(tmp_path / "a"))
    shutil.copy(tmp_path / "b", tmp_path / "a")
    with pytest.raises(ConfigError, match="made over"):
        opened(base, tmp_path / "b")


def crackle(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crackle.cli.main", "disk", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command_line_does_the_same(base: Path, tmp_path: Path) -> None:
    expected = change(base, tmp_path / "o", 1)
    shown = crackle("show", str(tmp_path / "o"))
    assert shown.returncode == 0, shown.stderr
    assert f"base:   {base}" in shown.stdout
    assert f"disk:   {SIZE} bytes" in shown.stdout
    change(base, Overlay(str(tmp_path / "new"), over=str(tmp_path / "o")), 2)
    assert crackle("rebase", str(tmp_path / "new"), str(base)).returncode == 0
    assert crackle("commit", str(tmp_path / "o")).returncode == 0
    assert base.read_bytes() == expected
    broken = crackle("show", str(tmp_path / "new"))
    assert broken.returncode == 1
    assert "has changed since" in broken.stdout
    refused = crackle("commit", str(tmp_path / "nothing"))
    assert refused.returncode == 1
    assert "No such file or directory" in refused.stderr
