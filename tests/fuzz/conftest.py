"""What the tests of hostile guests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from crackle.memory import GuestMemory
from support.fence import Fenced


@pytest.fixture(scope="module")
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    """Between fences, of the module's SIZE at its GPA."""
    fenced = Fenced(request.module.GPA, request.module.SIZE)
    yield fenced.memory
    fenced.close()
