"""Core scheduling, whatever this host's cores and kernel are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from crackle.errors import ConfigError
from crackle.runtime import cores


@pytest.mark.parametrize(
    ("number", "threads", "refused"),
    [
        (errno.ENODEV, "1", False),  # a kernel that can, and nothing to do
        (errno.EINVAL, "0", False),  # one that cannot, and nothing to do
        (errno.EINVAL, "1", True),
        (errno.EINVAL, None, True),  # nobody knows
        (errno.EPERM, "1", True),
    ],
)
def test_it_is_refused_only_where_it_would_be_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, threads: str | None, refused: bool
) -> None:
    def fails() -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "active"
    if threads is not None:
        path.write_text(threads + "\n")
    monkeypatch.setattr(cores, "separate_cores", fails)
    monkeypatch.setattr(cores, "_SMT", str(path))
    monkeypatch.setattr(cores, "_shared", None)
    if not refused:
        cores.share_no_core()
        return
    with pytest.raises(ConfigError, match=r"Cannot keep others .*That needs Linux 5\.14"):
        cores.share_no_core()
