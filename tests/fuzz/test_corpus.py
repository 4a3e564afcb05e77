"""The inputs that the coverage-guided fuzzer has kept, run again on a core built with AddressSanitizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import asan  # noqa: E402
import targets  # noqa: E402

CORPUS = HERE / "corpus"


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return asan.environment()


@pytest.mark.timeout(1800)  # the first may make the instrumented build
@pytest.mark.beside
@pytest.mark.parametrize("name", targets.NAMES)
def test_what_the_fuzzer_kept_finds_nothing(environment: dict[str, str], name: str) -> None:
    assert list((CORPUS / name).iterdir())
    command = [sys.executable, HERE / "target.py", name, "--replay", CORPUS / name]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-8000:]


def test_the_corpus_is_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert len(files) < 300
    assert sum(path.stat().st_size for path in files) < 500_000
