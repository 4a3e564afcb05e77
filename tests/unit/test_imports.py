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
    assert not modules & {"msgspec", "typing", "enum", "re", "socket", "signal", "datetime"}
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


CONFIGURED = {
    "drives=[Drive('a', False, path_on_host='x', io_engine='Async')]": {"crackle.virtio.block.uring"},
    "drives=[Drive('a', False, path_on_host='x')]": {"crackle.virtio.block.backing"},
    "drives=[Drive('a', False, socket='x')]": {"crackle.virtio.vhost_user.block", "socket"},
    "drives=[], network_interfaces=[NetworkInterface('a', 'b')]": {"crackle.virtio.net.device"},
    "drives=[], vsock=Vsock(3, 'v')": {"crackle.virtio.vsock.device"},
    "drives=[], mmds_config=MmdsConfig(['a'])": {"crackle.mmds.service"},
}


@pytest.mark.parametrize("configured", CONFIGURED)
def test_what_is_preloaded_is_what_a_configuration_uses(configured: str) -> None:
    modules = imported_by(
        "from crackle.schema import *; from crackle.schema.drive import Drive; from crackle.schema.vsock import Vsock; "
        "from crackle.schema.net import NetworkInterface; from crackle.schema.mmds import MmdsConfig; "
        "from crackle.schema.config import VmConfig; from crackle.schema.boot import BootSource; "
        "from crackle.vmm.preload import preload; "
        f"preload(VmConfig(boot_source=BootSource('k'), {configured}))"
    )
    assert modules >= CONFIGURED[configured] | {"crackle.vmm.probe", "crackle.schema.position"}
    for other, names in CONFIGURED.items():
        if not CONFIGURED[other] & CONFIGURED[configured] and "Async" not in configured:
            assert not modules & {name for name in names if name.count(".") == 3}, other


def test_a_module_that_is_not_there_is_told_before_the_start() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from crackle.vmm.preload import preload; sys.modules['crackle.vmm.probe'] = None; preload()",
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (
        "ConfigError: cannot import crackle.vmm.probe, without which the microVM should not run"
        in done.stderr
    )
