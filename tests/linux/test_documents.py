"""Every command and example of README and docs/, done in order as a reader does, with the images that README makes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import Guest

from support.documents import Reader, blocks, documents

README = Path("README.md")
READ = [path for path in documents() if any(not block.reason for block in blocks(path))]


@pytest.mark.documents
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("path", READ, ids=str)
def test_what_the_document_says_is_what_happens(
    boot: Callable[..., Guest],
    stock: dict[str, Path],
    kernels: dict[str, Path],
    images: dict[str, Path],
    path: Path,
    tmp_path: Path,
) -> None:
    if path != README:
        # What its commands made; the small kernel, as it boots in a tenth of the time.
        (tmp_path / "vmlinux").symlink_to(kernels["acpi"])
        (tmp_path / "initrd").symlink_to(stock["initrd"])
        shutil.copy(images["ext4"], tmp_path / "root.ext4")
    with Reader(tmp_path) as reader:
        for block in blocks(path):
            if not block.reason:
                reader.do(block)
