"""What the coverage-guided fuzzer attacks, attacked by hypothesis: every queue handler, whatever guest and peers do."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import targets

# Steps as the targets read them: mostly small numbers, which are the harmless choices, now and then anything.
steps = st.lists(
    st.binary(min_size=1, max_size=8) | st.lists(st.integers(0, 63), max_size=24).map(bytes), max_size=40
).map(b"".join)


@pytest.mark.parametrize("name", targets.NAMES)
def test_hostile_drivers_and_peers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A target takes both for itself.
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    target = targets.make(name)

    @given(data=steps)
    def attack(data: bytes) -> None:
        target.run(data)

    attack()
