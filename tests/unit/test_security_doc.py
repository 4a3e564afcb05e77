"""docs/security.md names constants and tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()
HELD = TEXT.partition("## What can be made to be held")[2].partition("\n## ")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in HELD.splitlines()
    if line.startswith("| ")
]


def test_each_bound_has_its_constant_where_it_says() -> None:
    assert len(ROWS) > 20
    for what, _, constant, _ in ROWS[1:]:
        found = re.findall(r"((?:`\w+`(?:, )?)+) in `([\w/.]+)`", constant)
        assert found, f"{what}: {constant}"
        for names, place in found:
            source = (ROOT / "src" / "crackle" / place).read_text()
            for name in re.findall(r"\w+", names):
                assert re.search(rf"\b{name}\b", source), f"{name} is not in {place}"


def test_each_bound_has_a_test() -> None:
    sources = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    everything = "\n".join(sources.values())
    for what, _, _, test in ROWS[1:]:
        name = test.strip("`")
        assert test == "the same" or name in sources or f"def {name}(" in everything, f"{what}: {test}"
