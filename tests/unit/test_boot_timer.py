"""The boot timer reports the time since the start, at the guest's mark and at nothing else."""

from __future__ import annotations

import time

import pytest

from crackle.devices.boot_timer import MAGIC, SIZE, BootTimer
from crackle.kvm.bus import Bus

ADDRESS = 0xC0000000


@pytest.fixture
def reports() -> list[tuple[int, int]]:
    return []


@pytest.fixture
def bus(reports: list[tuple[int, int]]) -> Bus:
    bus = Bus("mmio")
    timer = BootTimer(lambda wall, cpu: reports.append((wall, cpu)))
    bus.attach_python(ADDRESS, SIZE, timer)
    timer.start()
    return bus


def test_the_mark_reports_microseconds_of_wall_and_cpu_time(bus: Bus, reports: list[tuple[int, int]]) -> None:
    begin = time.monotonic_ns()
    end = begin + 5_000_000
    while time.monotonic_ns() < end:  # burns CPU time, which sleeping would not
        pass
    bus.write(ADDRESS, 1, MAGIC)
    [(wall, cpu)] = reports
    assert 5_000 <= wall <= (time.monotonic_ns() - begin) // 1000 + 1_000_000
    assert cpu > 0


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [(0, 1, 122), (0, 1, 0), (1, 1, 123), (0, 2, 123), (0, 4, 123), (0xFFF, 1, 123)],
)
def test_nothing_else_is_a_mark(
    bus: Bus, reports: list[tuple[int, int]], offset: int, size: int, value: int
) -> None:
    assert bus.write(ADDRESS + offset, size, value) == 0
    assert reports == []


def test_every_mark_is_reported(bus: Bus, reports: list[tuple[int, int]]) -> None:
    bus.write(ADDRESS, 1, MAGIC)
    bus.write(ADDRESS, 1, MAGIC)
    (first, _), (second, _) = reports
    assert first <= second


def test_reads_are_zero(bus: Bus) -> None:
    assert [bus.read(ADDRESS, size) for size in (1, 2, 4, 8)] == [0, 0, 0, 0]
