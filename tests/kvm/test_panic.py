"""A guest whose kernel panics is told apart from one that resets, at every door."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crackle import MicroVM
from crackle.errors import GuestError

RUN = (sys.executable, "-c", "from crackle.cli.main import main; main()", "run")


def test_a_panic_ends_the_guest_at_once_with_its_reason(machine: Callable[..., Any]) -> None:
    running = machine("faults", "f=panic f=triple", ends_on_panic=True).start()
    status = running.wait_end()
    assert (status.reason, status.exit_code) == ("panic", 1)
    assert status.message == "the guest's kernel has panicked"
    assert running.machine.panicked
    assert running.text.endswith("fault pvpanic knows=3\n"), "nothing of what comes after it"
    assert running.machine.metrics()["vcpu"]["failures"] == 0


def test_a_guest_that_goes_on_after_its_panic_and_resets_has_panicked(machine: Callable[..., Any]) -> None:
    running = machine("faults", "f=panic f=reset").start()
    assert running.wait_end().reason == "panic"


def test_a_crash_kernel_may_end_well(machine: Callable[..., Any]) -> None:
    running = machine("faults", "f=crash-kernel", ends_on_panic=True).start()
    status = running.wait_end()
    assert (status.reason, status.exit_code) == ("reset", 0)
    assert not running.machine.panicked


def test_a_failure_of_the_processor_outweighs_a_panic(machine: Callable[..., Any]) -> None:
    running = machine("faults", "f=panic f=triple").start()
    assert running.wait_end().reason == "triple-fault"


def test_wait_and_expect_end_at_once(guests: Path) -> None:
    """The guest would sleep for ever: nothing but the panic ends it."""
    with MicroVM(guests / "faults.elf", boot_args="f=panic f=sleep", memory=64) as vm:
        with pytest.raises(GuestError, match="the guest's kernel has panicked"):
            vm.console.expect("never printed", timeout=60)
        with pytest.raises(GuestError, match="the guest's kernel has panicked"):
            vm.wait(60)


def test_crackle_run_says_so_in_a_line_and_ends_with_1(guests: Path) -> None:
    done = subprocess.run(
        [*RUN, "--kernel", guests / "faults.elf", "--boot-args", "f=panic f=sleep", "--memory", "64"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "fault pvpanic" in done.stdout
    assert done.stderr == "crackle: the guest's kernel has panicked\n"


def test_crackle_vmm_ends_as_firecracker_does_and_logs_it(
    vmm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = vmm("faults", "f=panic f=reset")
    process.communicate(timeout=60)
    assert process.returncode == 0
    log = (tmp_path / "log").read_text()
    assert "The guest's kernel has panicked." in log
    assert "The microVM ended (panic): the guest's kernel has panicked" in log
    assert "Vmm is stopping." in log
