"""A bare-metal guest's memory in the host's hands again: through every door, over every kind of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crackle import Balloon, ConfigError, MicroVM, PageHandler

from .conftest import PATIENCE, Process
from .test_page_faults import Handler

FREE = 96
"""MiB that the guest has to give."""
ALL = Balloon(0, True, 3600, free_page_hinting=True, free_page_reporting=True)


def rss(pid: int, kind: str = "VmRSS") -> float:
    """MiB that the host has in memory for a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def guest(guests: Path, **options: Any) -> MicroVM:
    arguments: dict[str, Any] = {"memory": 128, "balloon": ALL, "own_process": True} | options
    return MicroVM(guests / "balloon.elf", boot_args=f"free={FREE}", **arguments)


def say(vm: MicroVM, line: str, answer: str) -> str:
    """Have the guest do something; the number that it answers with, if any."""
    vm.console.write(f"{line}\n")
    found = vm.console.expect(rf"{answer}(?: (\d+))?.*\n", PATIENCE)
    return (found[1] or b"").decode()


def begin(vm: MicroVM) -> None:
    vm.console.expect("balloon ready\n", PATIENCE)


GIVING = {"i": "inflated", "r": "reported", "h": "hinted"}


@pytest.mark.parametrize("huge_pages", ["None", "Transparent"])
@pytest.mark.parametrize("how", GIVING)
def test_what_the_guest_gives_is_the_hosts_and_comes_back(guests: Path, how: str, huge_pages: str) -> None:
    with guest(guests, huge_pages=huge_pages) as vm:
        begin(vm)
        before = rss(vm.pid)
        assert before > FREE
        if how == "h":
            vm.balloon.start_hinting()
        assert say(vm, f"{how} {FREE}", GIVING[how]) == str(FREE)
        assert before - rss(vm.pid) >= FREE * 0.97
        if how == "i":
            assert vm.balloon.statistics().actual_mib == FREE
            assert say(vm, f"o {FREE}", "deflated") == str(FREE)
            say(vm, "f", "filled")
            assert rss(vm.pid) > before - 4
            say(vm, "c", "checked")
        counters = vm.metrics()["balloon"]
        assert counters["event_fails"] == counters["free_page_hint_fails"] == 0
        names = {"i": "inflate_freed", "r": "free_page_report_freed", "h": "free_page_hint_freed"}
        assert counters[names[how]] == FREE << 20
        if how == "i":
            # 64 chains of 256 pages at a time, of which 32 MiB are given back in one call.
            assert counters["inflate_runs"] <= FREE // 16


def test_target_statistics_and_hints_as_the_library_has_them(guests: Path) -> None:
    with guest(guests, own_process=False) as vm:
        begin(vm)
        vm.balloon.resize(20)
        assert say(vm, "t", "target") == "5120"
        assert vm.config.balloon is not None
        assert vm.config.balloon.amount_mib == vm.balloon.config.amount_mib == 20
        say(vm, "s", "told")
        wait(lambda: vm.balloon.statistics().direct_reclaim == 15 * 1000003 + 1)
        say(vm, "f", "filled")
        vm.balloon.poll(60)
        say(vm, "s", "told")
        wait(lambda: vm.balloon.statistics().direct_reclaim == 15 * 1000003 + 2)
        assert vm.balloon.statistics().swap_out == 1000003 + 2
        vm.balloon.start_hinting(acknowledge_on_stop=False)
        say(vm, "h 2", "hinted")
        assert (vm.balloon.hinting_status().host_cmd, vm.balloon.hinting_status().guest_cmd) == (2, 0)
        vm.balloon.stop_hinting()
        assert vm.balloon.hinting_status().host_cmd == 1
        with pytest.raises(
            ConfigError, match=r"Balloon update error: Balloon: Requested memory .* has 128 MiB"
        ):
            vm.balloon.resize(129)


def wait(condition: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_without_a_balloon_the_sentences_are_the_apis(guests: Path) -> None:
    with MicroVM(guests / "echo.elf", boot_args="", memory=32) as vm:
        with pytest.raises(ConfigError, match=r"Balloon update error: .* Device not found"):
            vm.balloon.resize(1)
        with pytest.raises(ConfigError, match=r"Internal VMM error: .* Device not found"):
            vm.balloon.statistics()


def test_the_api_does_the_same(guests: Path, spawn: Callable[..., Process]) -> None:
    process = spawn()
    ask = process.api.ask
    balloon = {
        "amount_mib": 3,
        "deflate_on_oom": True,
        "stats_polling_interval_s": 1,
        "free_page_hinting": True,
    }
    ask("PUT", "/balloon", balloon | {"amount_mib": 129}, expect=400)
    ask("PUT", "/balloon", balloon)
    ask("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 2}, expect=400)
    full = balloon | {"free_page_reporting": False}
    assert ask("GET", "/balloon", expect=200) == full
    process.boot(guests / "balloon.elf", f"free={FREE}", mem_size_mib=128)
    assert ask("GET", "/balloon", expect=200) == full
    read_until(process, "balloon ready")
    before = rss(process.process.pid)
    tell(process, f"i {FREE}", "inflated")
    assert before - rss(process.process.pid) >= FREE * 0.97
    tell(process, "s", "told")
    found = ask("GET", "/balloon/statistics", expect=200)
    sizes = ("target_pages", "actual_pages", "target_mib", "actual_mib")
    assert [found[name] for name in sizes] == [768, FREE * 256, 3, FREE]
    wait(lambda: ask("GET", "/balloon/statistics", expect=200).get("swap_out") == 1000004)
    ask("PATCH", "/balloon", {"amount_mib": 9})
    ask("PATCH", "/balloon/statistics", {"stats_polling_interval_s": 9})
    ask("PATCH", "/balloon/statistics", {"stats_polling_interval_s": 0}, expect=400)
    changed = full | {"amount_mib": 9, "stats_polling_interval_s": 9}
    assert ask("GET", "/balloon", expect=200) == changed
    assert ask("GET", "/vm/config", expect=200)["balloon"] == changed
    assert ask("GET", "/balloon/hinting/status", expect=200) == {"host_cmd": 0, "guest_cmd": None}
    ask("PATCH", "/balloon/hinting/start", {"acknowledge_on_stop": False})
    ask("PATCH", "/balloon/hinting/start")
    assert ask("GET", "/balloon/hinting/status", expect=200) == {"host_cmd": 3, "guest_cmd": None}
    ask("PATCH", "/balloon/hinting/stop")
    assert ask("GET", "/balloon/hinting/status", expect=200) == {"host_cmd": 1, "guest_cmd": None}


def read_until(process: Process, text: str) -> None:
    until = time.monotonic() + PATIENCE
    while text not in process.text:
        assert time.monotonic() < until, process.text
        assert process.process.poll() is None, process.text
        process.read(0.1)


def tell(process: Process, line: str, answer: str) -> None:
    assert process.process.stdin is not None
    process.process.stdin.write(f"{line}\n".encode())
    process.process.stdin.flush()
    read_until(process, answer)


def test_a_snapshot_has_the_balloon_and_leaves_out_what_is_in_it(guests: Path, tmp_path: Path) -> None:
    with guest(guests) as vm:
        begin(vm)
        vm.balloon.resize(40)
        say(vm, "s", "told")
        say(vm, f"i {FREE}", "inflated")
        vm.balloon.start_hinting(acknowledge_on_stop=False)
        vm.snapshot(tmp_path)
    assert (tmp_path / "memory").stat().st_blocks * 512 < 8 << 20
    with MicroVM.restore(tmp_path, own_process=True) as vm:
        found = vm.balloon.statistics()
        assert (found.target_mib, found.actual_mib, found.swap_out) == (40, FREE, 1000004)
        # A run of hints is over.
        assert vm.balloon.hinting_status().host_cmd == 1
        vm.balloon.poll(30)
        say(vm, "s", "told")
        say(vm, f"o {FREE}", "deflated")
        say(vm, "f", "filled")
        say(vm, "c", "checked")


@pytest.mark.parametrize("tracking", [False, True])
def test_memory_of_a_snapshot_is_given_back_and_later_snapshots_are_whole(
    guests: Path, tmp_path: Path, tracking: bool
) -> None:
    with guest(guests, track_dirty_pages=tracking) as vm:
        begin(vm)
        vm.snapshot(tmp_path / "first")
    with MicroVM.restore(tmp_path / "first", own_process=True, track_dirty_pages=tracking) as vm:
        say(vm, "f", "filled")
        before = rss(vm.pid)
        assert rss(vm.pid, "RssAnon") > FREE
        say(vm, f"i {FREE // 2}", "inflated")
        assert before - rss(vm.pid) >= FREE // 2 * 0.97
        vm.snapshot(tmp_path / "first", differential=True)
    with MicroVM.restore(tmp_path / "first", own_process=True) as vm:
        say(vm, "c", "checked")
        say(vm, f"o {FREE // 2}", "deflated")
        say(vm, "f", "filled")
        say(vm, "c", "checked")


def test_a_clone_gives_its_own_memory_back_and_not_its_parents(guests: Path) -> None:
    with guest(guests) as vm:
        begin(vm)
        (clone,) = vm.fork(1)
        say(clone, f"i {FREE}", "inflated")
        say(vm, "c", "checked")
        say(clone, f"o {FREE}", "deflated")
        say(clone, "f", "filled")
        say(vm, "c", "checked")
        say(clone, "c", "checked")
        clone.stop()


def test_a_page_fault_handler_hears_of_what_is_given_back(guests: Path, tmp_path: Path) -> None:
    with guest(guests) as vm:
        begin(vm)
        vm.snapshot(tmp_path)
    with PageHandler(tmp_path) as handler, MicroVM.restore(tmp_path, handler=handler, own_process=True) as vm:
        say(vm, "c", "checked")
        before = rss(vm.pid)
        say(vm, f"r {FREE // 2}", "reported")
        assert before - rss(vm.pid) >= FREE // 2 * 0.97
        say(vm, f"i {FREE}", "inflated")
        assert before - rss(vm.pid) >= FREE * 0.97
        say(vm, f"o {FREE}", "deflated")
        say(vm, "f", "filled")
        say(vm, "c", "checked")


def test_a_device_that_waits_for_a_dead_handler_to_hear_of_pages_can_be_stopped(
    guests: Path, tmp_path: Path
) -> None:
    with guest(guests) as vm:
        begin(vm)
        vm.snapshot(tmp_path / "s", tmp_path / "m")
    handler = Handler(tmp_path)
    try:
        with MicroVM.restore(tmp_path / "s", tmp_path / "m", handler=handler.path, own_process=True) as vm:
            # All that the driver needs is there then.
            say(vm, "i 8", "inflated")
            say(vm, "o 8", "deflated")
            handler.kill()
            vm.console.write("i 8\n")
            wait(lambda: "D (disk sleep)" in io_thread(vm.pid))
            began = time.monotonic()
            vm.stop()
            assert time.monotonic() - began < 10
    finally:
        handler.kill()


def io_thread(pid: int) -> str:
    """What the kernel says of a microVM's thread for devices."""
    tasks = (task / "status" for task in Path(f"/proc/{pid}/task").iterdir())
    return next(text for text in (each.read_text() for each in tasks) if text.startswith("Name:\tio\n"))


def test_a_vcpu_that_waits_for_a_page_of_a_dead_handler_can_be_stopped(guests: Path, tmp_path: Path) -> None:
    with guest(guests) as vm:
        begin(vm)
        vm.snapshot(tmp_path / "s", tmp_path / "m")
    handler = Handler(tmp_path)
    try:
        with MicroVM.restore(tmp_path / "s", tmp_path / "m", handler=handler.path, own_process=True) as vm:
            say(vm, "t", "target")
            handler.kill()
            vm.console.write("c\n")
            began = time.monotonic()
            vm.stop()
            assert time.monotonic() - began < 10
    finally:
        handler.kill()
