"""A snapshot shown, and a differential memory file merged into its base."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crackle.errors import ConfigError
from crackle.snapshot import inspect, statefile
from crackle.snapshot.inspect import describe, rebase
from support.snapshots import SNAPSHOT

PAGE, SIZE = 4096, 1 << 20


def sparse(path: Path, pages: dict[int, bytes], size: int = SIZE) -> str:
    """A file with these pages, and holes."""
    with path.open("wb") as file:
        for page, content in pages.items():
            file.seek(page * PAGE)
            file.write(content * PAGE)
        file.truncate(size)
    return str(path)


def test_what_is_shown(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(statefile.encode(SNAPSHOT))
    shown = dict(describe(str(tmp_path / "state")))
    assert shown["format"] == statefile.version_text(statefile.VERSION)
    assert shown["taken"] == "2023-11-14 22:13:20 UTC"
    assert (shown["vCPUs"], shown["memory"], shown["kind"], shown["of"]) == ("1", "1 MiB", "full", "one")
    (tmp_path / "state").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="state cannot be shown: it is no state file of Crackle's"):
        list(describe(str(tmp_path / "state")))


def test_pages_of_the_difference_win_and_zeros_are_pages(tmp_path: Path) -> None:
    base = sparse(tmp_path / "base", {0: b"a", 5: b"b", 9: b"c"})
    diff = sparse(tmp_path / "diff", {5: b"B", 9: bytes(1), 200: b"d"})
    os.chmod(base, 0o640)
    rebase(base, diff)
    with open(base, "rb") as file:
        content = file.read()
    pages = {page: content[page * PAGE : page * PAGE + 1] for page in (0, 5, 9, 200)}
    assert pages == {0: b"a", 5: b"B", 9: bytes(1), 200: b"d"}
    assert len(content) == SIZE
    assert os.stat(base).st_mode & 0o777 == 0o640
    assert os.stat(base).st_blocks * 512 < SIZE // 4
    assert sorted(os.listdir(tmp_path)) == ["base", "diff"]


def test_what_cannot_be_merged_leaves_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = sparse(tmp_path / "base", {0: b"a"})
    short = sparse(tmp_path / "short", {0: b"x"}, SIZE // 2)
    good = sparse(tmp_path / "good", {0: b"x"})
    (tmp_path / "directory").mkdir()
    before = (tmp_path / "base").read_bytes()
    for diff, sentence in (
        (short, f"it has {SIZE // 2} bytes, the other {SIZE}"),
        (str(tmp_path / "none"), "No such file or directory"),
        (str(tmp_path / "directory"), "It is no regular file"),
        (base, "are the same file"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            rebase(base, diff)

    def refuse(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inspect.os, "fsync", refuse)
    with pytest.raises(ConfigError, match=r"cannot write the merged memory file: No space left on device"):
        rebase(base, good)
    assert (tmp_path / "base").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["base", "directory", "good", "short"]
