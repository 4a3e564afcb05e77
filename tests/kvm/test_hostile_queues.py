"""A guest that breaks the rules of its virtqueue breaks its own device, and only until it resets it."""

import re

import pytest

NEEDS_RESET = 0x40
CONFIGURATION_CHANGED = 2

# Defects of the queue itself: nothing in it can be trusted any more.
BROKEN_QUEUE = ["loop", "long", "next", "head", "address", "hole", "wrap", "straddle", "jump", "ring"]
BROKEN_INDIRECT = [f"indirect-{kind}" for kind in ("loop", "nested", "odd", "empty", "address", "long")]
# Well-formed chains that are no block request.
NO_REQUEST = ["short-header", "no-status", "write-header", "read-only-data"]


@pytest.fixture
def drive(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


def outcome(printed, defect):
    found = re.search(rf"fault {defect} status=0x(\w+) interrupt=0x(\w+) used=(\d+) request=(\d+)", printed)
    assert found, printed
    return int(found[1], 16), int(found[2], 16), int(found[3]), int(found[4])


@pytest.mark.parametrize("defect", BROKEN_QUEUE + BROKEN_INDIRECT)
def test_a_broken_queue_needs_a_reset_and_recovers_by_it(run, drive, defect):
    before = drive.read_bytes()
    printed = run("faults", f"f={defect}", drives=[{"path_on_host": str(drive)}])
    status, _, used, _ = outcome(printed, defect)
    assert status & NEEDS_RESET
    assert used == 0
    assert "recovered status=0" in printed
    assert drive.read_bytes() == before


@pytest.mark.parametrize("defect", ["loop", "head", "indirect-long"])
def test_the_guest_is_told_by_a_configuration_interrupt(run, drive, defect):
    printed = run("faults", f"f={defect}", drives=[{"path_on_host": str(drive)}])
    assert outcome(printed, defect)[1] & CONFIGURATION_CHANGED


@pytest.mark.parametrize("defect", NO_REQUEST)
def test_a_chain_that_is_no_request_does_no_harm(run, drive, defect):
    before = drive.read_bytes()
    printed = run("faults", f"f={defect}", drives=[{"path_on_host": str(drive)}])
    assert "recovered status=0" in printed
    assert drive.read_bytes() == before


def test_one_defect_after_another(run, drive):
    options = " ".join(f"f={defect}" for defect in BROKEN_QUEUE + NO_REQUEST + BROKEN_INDIRECT)
    printed = run("faults", options, drives=[{"path_on_host": str(drive)}])
    assert printed.count("recovered") == len(BROKEN_QUEUE + NO_REQUEST + BROKEN_INDIRECT)
    assert printed.endswith("faults end\n")


def test_another_drive_is_not_concerned(machine, drive, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(drive.read_bytes())
    drives = [{"path_on_host": str(path)} for path in (drive, other)]
    running = machine("faults", "device=0 f=loop f=jump", drives=drives).start()
    running.wait_end()
    metrics = running.machine.metrics()
    assert metrics["block_drive0"]["event_fails"] == 2
    assert metrics["block_drive1"]["event_fails"] == 0
