"""Pause, resume, stop and idle: what other threads ask of a running guest."""

import gc
import os
import threading
import time
from pathlib import Path

import pytest

from crackle.errors import KvmError

# Runs natively for far longer than any test, without a single exit.
SPIN = "kinds=loop slices=1 khz=1000000 n=1000000000000"
# Exits without end.
STORM = "spin=in"


def registers(running):
    return running.machine.vcpus[0].get_regs()


@pytest.mark.parametrize(("guest", "options"), [("exits", SPIN), ("exits", STORM), ("idle", "")])
def test_a_paused_guest_stands_still_and_goes_on(machine, guest, options):
    running = machine(guest, options).start()
    running.read(1.0)
    for _ in range(20):
        running.machine.pause()
        before = registers(running)
        assert registers(running) == before
        running.machine.resume()
    running.machine.pause()
    assert running.machine.vcpus[0].status == "paused"
    assert not running.ended(0)


def test_a_paused_guest_does_not_tick(machine):
    running = machine("idle", "tick=500 beats=5").start()
    running.wait_for("beat 3\n")
    running.machine.pause()
    while (seen := running.text) != running.read(0.05):
        assert seen is not None
    time.sleep(0.2)
    assert running.read() == seen
    running.machine.resume()
    beats = seen.count("beat") + 20
    running.wait_for(f"beat {beats}\n")


def test_pause_and_resume_are_idempotent(machine):
    running = machine("idle", "tick=500 beats=5").start()
    running.machine.resume()
    running.machine.pause()
    running.machine.pause()
    running.machine.resume()
    running.machine.resume()
    running.wait_for("beat 2\n")


def test_a_spinning_guest_stops_when_told(machine):
    running = machine("exits", SPIN).start()
    running.wait_for("khz")
    running.machine.stop()
    assert running.machine.vcpus[0].status == "stopped"


def test_pauses_lose_no_exit(machine):
    running = machine("exits", "kinds=in,scratch n=2000 slices=1 khz=1000000").start()
    while not running.ended(0):
        running.machine.pause()
        running.machine.resume()
    assert running.wait_end().exit_code == 0
    assert "exits in n=2000" in running.text
    assert "exits scratch n=2000" in running.text


def test_every_vcpu_pauses(machine):
    running = machine("smp", "cpus=4 ms=100000", vcpus=4).start()
    for _ in range(10):
        running.machine.pause()
        assert {vcpu.status for vcpu in running.machine.vcpus} <= {"paused", "reset", "stopped"}
        running.machine.resume()


def test_a_running_vcpu_keeps_its_registers_to_itself(machine):
    running = machine("exits", SPIN).start()
    running.wait_for("khz")
    running.machine.pause()
    assert registers(running)["rip"] >= 0x100000


def test_threads_and_descriptors_are_given_back(machine):
    machine("idle").start().wait_for("idle")  # whatever is opened once and kept, is now
    gc.collect()  # what earlier tests have left to it
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    tasks = len(os.listdir("/proc/self/task"))
    for _ in range(5):
        running = machine("idle").start()
        running.wait_for("idle")
        running.machine.stop()
    pipes = 5 * 4
    assert len(os.listdir("/proc/self/fd")) == descriptors + pipes
    assert (
        len(os.listdir("/proc/self/task")) <= tasks
    )  # one that made the first machine may have been counted on its way out
    assert threading.active_count() == threads


def test_an_idle_guest_uses_no_processor_time(vmm, tmp_path):
    drive = tmp_path / "drive"
    drive.write_bytes(bytes(1 << 20))
    process = vmm("idle", drives=[{"path_on_host": str(drive)}])
    assert process.stdout is not None
    while "idle" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(2.0)  # what follows a start is over

    def ticks():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def switches():
        status = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/status")]
        return [line for text in status for line in text.splitlines() if "ctxt_switches" in line]

    before, woken = ticks(), switches()
    time.sleep(1.5)
    assert ticks() == before
    assert switches() == woken


def wait_asleep(running):
    """Until the guest has made no access for a while: it sleeps and can be woken by an interrupt only."""
    before = None
    while (exits := running.machine.vcpus[0].exits) != before:
        before = exits
        time.sleep(0.1)


def test_serial_input_interrupts_the_guest(machine):
    running = machine("echo").start()
    running.wait_for("echo\n")
    os.write(running.input, b"hello there\r")
    running.wait_for("hello there\n")
    os.write(running.input, b"x" * 1000 + b"\r")
    running.wait_for("x" * 1000 + "\n")
    wait_asleep(running)
    os.write(running.input, b"woken\r")
    running.wait_for("woken\n")
    os.write(running.input, b"end\n")
    running.wait_end()
    assert "interrupts 0 " not in running.text


def test_serial_input_can_be_polled(machine):
    running = machine("echo", "poll").start()
    running.wait_for("echo\n")
    os.write(running.input, b"abc\nend\n")
    running.wait_end()
    assert "abc\nend\n" in running.text


def test_registers_cannot_be_read_after_the_end(machine):
    running = machine("hello").start()
    running.wait_end()
    running.machine.stop()
    with pytest.raises(KvmError):
        registers(running)
