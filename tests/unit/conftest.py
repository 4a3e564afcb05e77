"""What several unit tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.vhost_user import Impostor


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Callable[..., Impostor]]:
    """Makes vhost-user back ends that do as they are told, and end with the test."""
    made: list[Impostor] = []

    def make(**options: object) -> Impostor:
        made.append(Impostor(tmp_path / f"socket{len(made)}", **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
