"""From the configuration to the guest's first line, and from its last instruction to an exit status."""

import re
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("guest", ["hello", "hello-pvh"])
def test_guest_boots_and_sees_its_command_line(run, guest):
    assert "hello\ncmdline: cmdline colour=blue" in run(guest, "cmdline colour=blue")


def test_first_instruction_reaches_the_console(run):
    assert run("hello").startswith(">")


@pytest.mark.parametrize("memory_mib", [32, 128, 3072, 3073, 5120])
def test_guest_boots_with_any_amount_of_memory(run, memory_mib):
    assert "hello" in run("hello", memory_mib=memory_mib)


def test_reset_is_a_clean_end(machine):
    status = machine("hello").start().wait_end()
    assert (status.reason, status.exit_code) == ("reset", 0)


def test_triple_fault_is_an_error_that_shows_registers(machine):
    status = machine("faults", "f=triple").start().wait_end()
    assert status.exit_code != 0
    assert "triple fault" in status.message
    for register in ("rip=0x", "rsp=0x", "cr3=0x", "rflags=0x"):
        assert register in status.message


def test_unclaimed_addresses_read_zero_and_the_guest_goes_on(run):
    printed = run("faults", "f=unmapped-mmio f=unclaimed-port")
    assert "unmapped-mmio read=0x0\n" in printed
    assert "unclaimed-port read=0x0\n" in printed
    assert printed.endswith("faults end\n")


def test_fault_in_the_guest_is_the_guests_own_business(machine):
    running = machine("faults", "f=ud").start()
    assert running.wait_end().reason == "reset"
    assert "FAULT: vector 6" in running.text


def test_every_kind_of_exit_is_counted(machine):
    running = machine("exits", "n=100 slices=1 khz=1000000 kinds=in,scratch")
    running.start().wait_end()
    counts = running.machine.metrics()["vcpu"]
    assert counts["exit_io_in"] >= 100
    assert counts["exit_io_out"] >= 100
    assert "exits in n=100" in running.text


@pytest.mark.parametrize("vcpus", [2, 4, 8])
def test_guest_starts_its_other_processors(run, vcpus):
    printed = run("smp", f"cpus={vcpus} ms=20000", vcpus=vcpus)
    assert f"smp {vcpus} of {vcpus} run" in printed


def test_a_vcpus_thread_has_the_name_that_operators_look_for(machine):
    machine("smp", "cpus=2 ms=20000", vcpus=2).start()
    deadline = time.monotonic() + 20
    names: set[str] = set()
    # Each thread takes its name itself.
    while not names >= {"fc_vcpu 0", "fc_vcpu 1"}:
        assert time.monotonic() < deadline, names
        names = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}


def test_timer_interrupts_wake_a_halted_guest(run):
    assert "beat 1\nbeat 2\nidle end\n" in run("idle", "tick=200 ticks=20 beats=10")


def test_vmm_process_ends_with_the_guest(vmm):
    process = vmm("hello", "cmdline")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert ">hello\n" in printed


def test_vmm_process_fails_with_the_guest(vmm, tmp_path):
    process = vmm("faults", "f=triple")
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"triple fault.*rip=0x", (tmp_path / "log").read_text())


def test_boot_timer_reports_when_the_guest_is_up(vmm, tmp_path):
    process = vmm("hello", "", "--boot-timer")
    process.communicate(timeout=60)
    log = (tmp_path / "log").read_text()
    found = re.search(r"Guest-boot-time = +(\d+) us +\d+ ms, +(\d+) CPU us", log)
    assert found, log
    assert int(found[1]) > 0
