"""What crackle-vmm imports, and when: start-up is paid by every microVM."""

from __future__ import annotations

import subprocess
import sys

import pytest


def imported_by(statement: str) -> set[str]:
    """The modules a fresh interpreter has after ``statement``, without those it starts with."""
    script = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30
    )
    return set(done.stdout.split())


def test_the_socket_accepts_before_anything_large_is_imported() -> None:
    modules = imported_by("import crackle.cli.vmm, _socket")
    assert not modules & {"msgspec", "httptools", "typing", "enum", "re", "socket", "signal", "datetime"}
    assert len(modules) < 25


def test_a_microvm_without_metadata_does_not_import_the_service() -> None:
    modules = imported_by("import crackle.monitor.process, crackle.vmm.microvm")
    assert not [name for name in modules if name.startswith("crackle.mmds")]


@pytest.mark.parametrize("module", ["crackle.monitor.process", "crackle.vmm.builder", "crackle.vmm.shell"])
def test_a_running_microvm_does_without_the_heavy_libraries(module: str) -> None:
    modules = imported_by(f"sys.modules['typing_extensions'] = None; import {module}")
    heavy = {
        *(
            "argparse",
            "asyncio",
            "dataclasses",
            "inspect",
            "json",
            "logging",
            "pathlib",
            "random",
            "selectors",
        ),
        *("socket", "subprocess", "tempfile", "threading", "traceback", "rich", "typer", "pyroute2"),
    }
    assert modules & heavy == set()
