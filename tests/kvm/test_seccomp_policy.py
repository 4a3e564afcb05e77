"""The seccomp policy has no line that nothing needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from crackle.seccomp import build
from support.traced import calls, trace, unneeded

# Together they do what microVMs do, in processes of their own or in this one.
BROAD = (
    "test_preload.py::test_nothing_is_imported_after_the_start"
    "[Async+Sync+balloon+entropy+logger+metrics+mmds+net+vhost-user+vsock]",
    "test_bare_boot.py",
    "test_bare_block.py::test_flush_is_offered_with_writeback_and_works[Sync]",
    "test_bare_block.py::test_sum_of_the_whole_device_matches_the_hosts[Sync]",
    "test_bare_block.py::test_requests_may_be_scattered_over_many_descriptors[Sync-4096,8,512-]",
    "test_bare_block.py::test_data_arrive_whole_with_every_way_to_talk[Async-  irq]",
    "test_bare_block.py::test_the_device_works_again_after_a_reset[Async]",
    "test_bare_net.py::test_frames_that_the_guest_sends_arrive_in_order[]",
    "test_bare_vsock.py::test_every_byte_of_a_stream_from_the_guest_arrives[65536]",
    "test_bare_balloon.py::test_the_api_does_the_same",
    "test_bare_rng.py::test_a_guest_gets_random_bytes[4096-4096]",
    "test_bare_vhost_user.py::test_vmm_process_serves_the_guest_its_disk",
    "test_bare_console.py",
    "test_own_process.py::test_it_is_the_same_object",
    "test_jail.py::test_it_gives_back_what_only_its_start_needed_and_has_open_what_that_takes",
    "test_fork.py::test_each_has_its_vsock_and_its_disk",
    "test_fork.py::test_requests_in_flight_are_done_once_by_each[Async]",
    "test_fork.py::test_each_has_its_interface",
    "test_fork.py::test_each_has_its_metadata",
    "test_fork.py::test_a_fork_is_microvms_of_this_program[own process]",
    "test_fork.py::test_clones_of_a_paused_microvm_are_paused_and_can_be_saved[own process]",
    "test_snapshot.py::test_a_guest_goes_on_in_one_process_after_another[1]",
    "test_page_faults.py::test_the_death_of_a_handler_is_told",
)


@pytest.mark.soak  # under strace guests take ten times as long, and some have deadlines
@pytest.mark.timeout(600)
def test_every_line_of_the_policy_is_needed_by_a_thread_of_its_kind_or_says_that_it_seldom_is(
    guests: Path, tmp_path: Path
) -> None:
    here = Path(__file__).parent
    record = tmp_path / "calls"
    trace([str(here / test) for test in BROAD], record)
    left = unneeded(build.read_policy(), calls(record, build.names()))
    assert [f"[{section}] {line.call}: {line.why}" for section, line in left if not line.is_rare] == []
