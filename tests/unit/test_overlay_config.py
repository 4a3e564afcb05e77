"""Drives with overlays as they are configured: what is opened, locked and made, and what is refused in a sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crackle.disk import make
from crackle.errors import ConfigError
from crackle.schema import BootSource, Drive, MachineConfig, Overlay, VmConfig
from crackle.schema.codec import made
from crackle.vmm.configuration import Configuration

SIZE = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def configurations() -> Iterator[list[Configuration]]:
    """Two microVMs'. Nothing is open any more when they are closed."""
    before = len(os.listdir("/proc/self/fd"))
    found = []
    for _ in range(2):
        config = VmConfig(drives=[], boot_source=BootSource(""), machine_config=MachineConfig(1, 128))
        found.append(Configuration(config, lambda _: None))
    yield found
    for each in found:
        each.close()
    assert len(os.listdir("/proc/self/fd")) == before


def drive(base: Path, overlay: Overlay | None, name: str = "d", **section: Any) -> Drive:
    section.setdefault("path_on_host", str(base))
    found = Drive(name, False, **section)
    if overlay is not None:
        found.overlay = overlay
    return found


def test_many_may_have_one_base_and_none_may_write_to_it(
    configurations: list[Configuration], base: Path, tmp_path: Path
) -> None:
    first, second = configurations
    first.put_drive(drive(base, Overlay(str(tmp_path / "a"))))
    second.put_drive(drive(base, Overlay(str(tmp_path / "b"))))
    second.put_drive(drive(base, Overlay(memory=True), "memory"))
    second.put_drive(drive(base, None, "reader", is_read_only=True))
    with pytest.raises(ConfigError, match=r"another microVM uses it"):
        first.put_drive(drive(base, None, "writer"))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/a: another microVM uses it"):
        second.put_drive(drive(base, Overlay(str(tmp_path / "a")), "other"))
    with pytest.raises(ConfigError, match="another drive of this microVM has the overlay"):
        first.put_drive(drive(base, Overlay(str(tmp_path / "a")), "other"))
    with pytest.raises(ConfigError, match=r"a: another microVM writes to it"):
        second.put_drive(drive(base, Overlay(str(tmp_path / "c"), over=str(tmp_path / "a")), "other"))
    assert not (tmp_path / "c").exists()


def test_a_layer_may_be_read_by_many_and_written_by_none(
    configurations: list[Configuration], base: Path, tmp_path: Path
) -> None:
    first, second = configurations
    make(str(tmp_path / "saved"), base=str(base))
    for name, each in zip("ab", configurations, strict=True):
        each.put_drive(drive(base, Overlay(str(tmp_path / name), over=str(tmp_path / "saved"))))
    with pytest.raises(ConfigError, match="saved: another microVM uses it"):
        second.put_drive(drive(base, Overlay(str(tmp_path / "saved")), "other"))
    first.close()
    second.close()
    first.put_drive(drive(base, Overlay(str(tmp_path / "saved")), "other"))


def test_a_drive_that_is_configured_again_finds_its_overlay(
    configurations: list[Configuration], base: Path, tmp_path: Path
) -> None:
    first, second = configurations
    overlay = Overlay(str(tmp_path / "o"), size_limit=1 << 20)
    for _ in range(2):
        first.put_drive(drive(base, overlay))
    with pytest.raises(ConfigError, match="o: another microVM uses it"):
        second.put_drive(drive(base, overlay))
    first.put_drive(drive(base, Overlay(str(tmp_path / "new"), over=str(tmp_path / "o"))))
    assert first.config.drives[0].overlay == Overlay(str(tmp_path / "new"))
    # It is a plain one again, and the overlay is free.
    second.put_drive(drive(base, Overlay(memory=True)))
    first.put_drive(drive(base, None, is_read_only=True))
    second.put_drive(drive(base, overlay))


def test_what_does_not_belong_together_is_refused_and_nothing_is_made(
    configurations: list[Configuration], base: Path, tmp_path: Path
) -> None:
    first, _ = configurations
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE // 2))
    make(str(tmp_path / "others"), base=str(other))
    make(str(tmp_path / "o"), base=str(base))
    before = sorted(os.listdir(tmp_path))
    for overlay, words in (
        (Overlay(str(tmp_path / "others")), f"belongs to another base: it was made over {other}"),
        (Overlay(str(tmp_path / "new"), over=str(tmp_path / "others")), "belongs to another base"),
        (
            Overlay(str(tmp_path / "o"), over=str(tmp_path / "others")),
            f"is there already, and lies over {base}, not",
        ),
        (Overlay(str(base)), "is the file of the drive itself"),
        (Overlay(str(tmp_path)), "Is a directory"),
        (Overlay(str(tmp_path / "nowhere" / "new")), "cannot make the overlay"),
        (Overlay("a\0b"), "embedded null byte"),
        (Overlay(str(tmp_path / "new"), over=str(tmp_path / "nothing")), "No such file or directory"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            first.put_drive(drive(base, overlay))
    with pytest.raises(ConfigError, match="No such file or directory"):
        first.put_drive(drive(base, Overlay(str(tmp_path / "new")), is_read_only=True))
    with pytest.raises(ConfigError, match="no sector that an overlay could lie over"):
        first.put_drive(drive(Path("/dev/null"), Overlay(memory=True)))
    assert sorted(os.listdir(tmp_path)) == before
    assert not first.config.drives
    assert not first.held


def test_a_vhost_user_drive_has_no_overlay(configurations: list[Configuration], base: Path) -> None:
    with pytest.raises(ConfigError, match="A drive with a socket has no overlay: the back end decides"):
        configurations[0].put_drive(drive(base, Overlay(memory=True), path_on_host=None, socket="s"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "An overlay has a `path`, or `memory` that is true, and not both"),
        ({"path": "o", "memory": True}, "An overlay has a `path`, or `memory`"),
        ({"path": "o", "size_limit": -1}, "size_limit"),
        ({"path": "o", "size_limit": 1 << 64}, "size_limit"),
        ({"path": "o", "base": "b"}, "unknown field `base`"),
    ],
)
def test_an_overlay_that_means_nothing_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(Overlay, fields)
