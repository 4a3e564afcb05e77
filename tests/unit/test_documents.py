"""README and docs/: their code is code, their links lead somewhere, and what nobody runs says why."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from support.documents import KINDS, ROOT, Block, blocks, documents

BLOCKS = [block for path in documents() for block in blocks(path)]
NOT_RUN = 6
"""Blocks that nobody runs. Fewer is better; each says why."""


def name(block: Block) -> str:
    return f"{block.path}:{block.line}"


def test_every_fence_is_understood() -> None:
    for path in documents():
        text = (ROOT / path).read_text()
        assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks(path)), path
        assert len(re.findall(r"<!-- block: ", text)) == sum(bool(block.kind) for block in blocks(path)), path
    for block in BLOCKS:
        assert block.reason or block.kind in KINDS, name(block)


def test_what_nobody_runs_is_counted() -> None:
    assert len([name(block) for block in BLOCKS if block.reason]) == NOT_RUN


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=name)
def test_python_is_python(block: Block) -> None:
    compile(block.text, name(block), "exec")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "console"], ids=name)
def test_commands_are_shells(block: Block) -> None:
    for typed, _ in block.steps():
        done = subprocess.run(["bash", "-n", "-c", typed], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", documents(), ids=str)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / path).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        found = (ROOT / path).parent / file if file else ROOT / path
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, (
                target
            )
