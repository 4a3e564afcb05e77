"""A snapshot shown, and a differential memory file merged into its base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crackle.errors import ConfigError
from crackle.schema.drive import Drive
from crackle.schema.net import NetworkInterface
from crackle.schema.vsock import Vsock
from crackle.snapshot import inspect, statefile
from crackle.snapshot.inspect import describe, edit, rebase
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


def with_devices(path: Path) -> bytes:
    """A state file whose configuration has a drive, an interface and a vsock device; its content."""
    config = msgspec.structs.replace(
        SNAPSHOT.config,
        drives=[Drive("disk", False, path_on_host="/old/disk")],
        network_interfaces=[NetworkInterface("eth0", "oldtap")],
        vsock=Vsock(3, "/old/vsock"),
    )
    data = statefile.encode(msgspec.structs.replace(SNAPSHOT, config=config))
    path.write_bytes(data)
    return data


def test_what_a_snapshot_names_can_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    before = statefile.decode(with_devices(path))
    path.chmod(0o640)
    edit(
        str(path), drives={"disk": "/new/disk"}, interfaces={"eth0": "newtap"}, vsock="/v", instance_id="two"
    )
    after = statefile.decode(path.read_bytes())
    assert after.config.drives[0].path_on_host == "/new/disk"
    assert after.config.network_interfaces[0].host_dev_name == "newtap"
    assert after.config.vsock is not None
    assert after.config.vsock.uds_path == "/v"
    assert after.instance_id == "two"
    # It finds its memory file by these, and the guest goes on from that.
    assert (after.id, after.memory, after.machine) == (before.id, before.memory, before.machine)
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"drives": {"other": "/x"}}, "The snapshot has no drive 'other'"),
        ({"interfaces": {"disk": "t"}}, "The snapshot has no interface 'disk'"),
        ({"instance_id": "a b"}, "id"),
        ({"vsock": "/v", "drives": {"none": "/x"}}, "The snapshot has no drive 'none'"),
    ],
)
def test_what_a_snapshot_does_not_have_cannot_be_changed(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    path = tmp_path / "state"
    before = with_devices(path)
    with pytest.raises(ConfigError, match=f"state cannot be changed: .*{sentence}"):
        edit(str(path), **changes)
    assert path.read_bytes() == before


def test_a_change_that_cannot_be_written_leaves_the_state_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    before = with_devices(path)

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inspect.os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        edit(str(path), vsock="/v")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]
