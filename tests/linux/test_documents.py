"""Every command and example of README and docs/, done in order as a reader does, with the images that README makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.linux.conftest import Guest

from support.documents import Reader, blocks, documents

README = Path("README.md")
READ = [path for path in documents() if any(not block.reason for block in blocks(path))]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", READ, ids=str)
def test_what_the_document_says_is_what_happens(
    boot: Callable[..., Guest], path: Path, tmp_path: Path
) -> None:
    images = next(block for block in blocks(README) if "guest/kernel/stock" in block.text)
    prepare = "" if path == README else "\n".join(typed for typed, _ in images.steps())
    with Reader(tmp_path, prepare) as reader:
        for block in blocks(path):
            if not block.reason:
                reader.do(block)
