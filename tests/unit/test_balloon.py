"""virtio-balloon as drivers and operators find it: pages, statistics, hints and reports (virtio 1.2, section 5.5)."""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.virtio.balloon.device import STATISTICS_NAMES, Balloon, BalloonState
from support.driver import (
    CONFIG,
    CONFIG_GENERATION,
    DEVICE_ID,
    F_EVENT_IDX,
    F_VERSION_1,
    INTERRUPT_STATUS,
    STATUS,
    Bench,
    Buffer,
    Ring,
    through_a_file,
)

PAGE = 4096
MIB = 1 << 20
HUGE = 2 * MIB
SIZE = 32 * MIB
ROOM = MIB
"""For rings and lists; what is above it the guest has for itself."""
LISTS = 0x10000
F_STATS, F_ON_OOM, F_HINT, F_REPORT = 1 << 1, 1 << 2, 1 << 3, 1 << 5
ALL = {"stats_interval_s": 3600, "hinting": True, "reporting": True}
NEGOTIATED = F_VERSION_1 | F_STATS | F_HINT | F_REPORT


class Guest(Bench):
    """A driver, initialised with the features that it and the device know."""

    def __init__(self, memory: GuestMemory | None = None, features: int = NEGOTIATED, **options: Any) -> None:
        super().__init__(Balloon(memory or GuestMemory(((0, SIZE),)), **options))
        self.rings: list[Ring] = []
        self.negotiated = features & self.device.device_features
        self.start()

    def start(self) -> None:
        count = 2 + sum(bool(self.negotiated & bit) for bit in (F_STATS, F_HINT, F_REPORT))
        self.rings = self.begin_queues([0x2000 * i for i in range(count)], 64, self.negotiated)

    @property
    def balloon(self) -> Balloon:
        assert isinstance(self.device, Balloon)
        return self.device

    def queue(self, feature: int) -> int:
        """Of what a feature has, behind those of the features before it."""
        return 2 + sum(bool(self.negotiated & bit) for bit in (F_STATS, F_HINT, F_REPORT) if bit < feature)

    def send(self, queue: int, *chains: Sequence[Buffer]) -> int:
        """How many chains were answered."""
        ring = self.rings[queue]
        ring.offer(*[ring.add(chain) for chain in chains])
        self.notify(queue)
        self.settle()
        return len(ring.reap())

    def pages(self, numbers: Sequence[int], at: int = LISTS) -> list[Buffer]:
        self.memory.write(at, struct.pack(f"<{len(numbers)}I", *numbers))
        return [Buffer(at, 4 * len(numbers))]

    def inflate(self, numbers: Sequence[int]) -> int:
        return self.send(0, self.pages(numbers))

    def deflate(self, numbers: Sequence[int]) -> int:
        return self.send(1, self.pages(numbers))

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.balloon.counters()
        return found

    def fill(self, start: int = ROOM, end: int = SIZE) -> None:
        """Write to every page."""
        self.memory.write(start, b"\xaa" * (end - start))

    def there(self, start: int = ROOM, end: int = SIZE) -> int:
        """How many bytes of the range the host has in memory for it."""
        return resident(self.memory, start, end)


def resident(memory: GuestMemory, start: int, end: int) -> int:
    (region,) = [each for each in memory.regions if each.gpa <= start < each.gpa + each.size]
    first = (region.hva + start - region.gpa) // PAGE
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(first * 8)
        entries = struct.unpack(f"<{(end - start) // PAGE}Q", file.read((end - start) // PAGE * 8))
    return sum(entry >> 62 != 0 for entry in entries) * PAGE


def mappings() -> int:
    """How many this process has."""
    return len(Path("/proc/self/maps").read_text().splitlines())


def numbers(start: int, end: int) -> list[int]:
    return list(range(start // PAGE, end // PAGE))


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest(**ALL) as guest:
        yield guest


# -- what it is ------------------------------------------------------------------------------------------------


def test_it_has_the_queues_and_features_that_were_asked_for() -> None:
    for options, count, features in (
        ({}, 2, 0),
        ({"deflate_on_oom": True}, 2, F_ON_OOM),
        ({"stats_interval_s": 1}, 3, F_STATS),
        ({"hinting": True}, 3, F_HINT),
        ({"reporting": True}, 3, F_REPORT),
        (ALL, 5, F_STATS | F_HINT | F_REPORT),
    ):
        with Guest(**options) as guest:
            assert guest.registers[DEVICE_ID] == 5
            assert len(guest.device.queues) == count
            assert guest.registers.offered() & 0xFF == features


def test_its_target_and_size_are_in_the_configuration_space() -> None:
    with Guest(amount_mib=3) as guest:
        assert [guest.registers[CONFIG + i] for i in (0, 4, 8)] == [768, 0, 0]
        guest.registers[CONFIG + 4] = 700
        assert guest.balloon.actual_pages == 700
        # Nothing else is the driver's to write.
        for place in (0, 8, 12):
            guest.registers[CONFIG + place] = 5
        guest.bus.write(guest.ADDRESS + CONFIG + 2, 4, 0xFFFFFFFF)
        assert [guest.registers[CONFIG + i] for i in (0, 4, 8)] == [768, 700, 0]
        assert guest.counters()["event_fails"] == 4


def test_resizing_tells_the_driver(guest: Guest) -> None:
    before = guest.registers[CONFIG_GENERATION]
    guest.balloon.resize(32)
    assert guest.registers[CONFIG] == 8192
    assert guest.registers[CONFIG_GENERATION] != before
    assert guest.registers[INTERRUPT_STATUS] & 2
    assert guest.interrupts() == 1


def test_a_target_beyond_memory_or_without_a_driver_is_refused(guest: Guest) -> None:
    with pytest.raises(
        ConfigError, match="Requested memory should be less than 33MiB: the microVM has 32 MiB"
    ):
        guest.balloon.resize(33)
    with pytest.raises(ConfigError, match="should be less than 4294967295MiB"):
        guest.balloon.resize((1 << 32) - 1)
    assert guest.registers[CONFIG] == 0
    guest.registers[STATUS] = 0
    for call in (
        lambda: guest.balloon.resize(1),
        lambda: guest.balloon.start_hinting(True),
        guest.balloon.stop_hinting,
    ):
        with pytest.raises(ConfigError, match="Balloon: Device not activated yet"):
            call()
    with GuestMemory(((0, SIZE),)) as memory, pytest.raises(ConfigError, match="should be less than 33MiB"):
        Balloon(memory, 33)


# -- inflating and deflating -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["up", "down", "shuffled", "twice"])
def test_pages_in_the_balloon_are_the_hosts_again_in_one_call(guest: Guest, order: str) -> None:
    guest.fill()
    wanted = numbers(8 * MIB, 9 * MIB)
    if order == "down":
        wanted.reverse()
    elif order == "shuffled":
        random.Random(1).shuffle(wanted)
    elif order == "twice":
        wanted = wanted * 2
        random.Random(2).shuffle(wanted)
    assert guest.inflate(wanted) == 1
    assert guest.there(8 * MIB, 9 * MIB) == 0
    assert guest.there() == SIZE - ROOM - MIB
    assert guest.memory.read(8 * MIB, MIB) == bytes(MIB)
    assert guest.memory.read(8 * MIB - PAGE, PAGE) == b"\xaa" * PAGE == guest.memory.read(9 * MIB, PAGE)
    assert (guest.counters()["inflate_freed"], guest.counters()["inflate_runs"]) == (MIB, 1)
    assert guest.counters()["event_fails"] == 0
    assert guest.interrupts() == 1


def test_runs_go_on_over_chains_and_buffers(guest: Guest) -> None:
    guest.fill()
    chains = []
    for i in range(20):
        first = numbers((8 + i) * MIB, (9 + i) * MIB)
        at = LISTS + i * 1024
        guest.pages(first, at)
        chains.append([Buffer(at, 100), Buffer(at + 100, 900), Buffer(at + 1000, 24)])
    assert guest.send(0, *chains) == 20
    assert guest.there() == SIZE - ROOM - 20 * MIB
    assert guest.counters()["inflate_runs"] == 1
    assert guest.counters()["inflate_count"] == 1


def test_more_than_is_collected_at_once_is_given_back_all_the_same() -> None:
    with Guest(GuestMemory(((0, 128 * MIB),))) as guest:
        guest.fill(64 * MIB, 128 * MIB)
        chains = [guest.pages(numbers((64 + i) * MIB, (65 + i) * MIB), LISTS + i * 1024) for i in range(64)]
        assert guest.send(0, *chains) == 64
        assert guest.there(64 * MIB, 128 * MIB) == 0
        assert guest.counters()["inflate_runs"] == 2


def test_pages_of_the_same_kind_apart_are_calls_of_their_own(guest: Guest) -> None:
    guest.fill()
    every_other = numbers(8 * MIB, 9 * MIB)[::2]
    assert guest.inflate(every_other) == 1
    assert guest.counters()["inflate_runs"] == 128
    assert guest.there(8 * MIB, 9 * MIB) == MIB // 2


def test_pages_that_are_in_no_memory_are_counted_and_the_others_go() -> None:
    memory = GuestMemory(((0, SIZE), (64 * MIB, SIZE)))
    with Guest(memory) as guest:
        guest.fill()
        wanted = [*numbers(SIZE - 2 * PAGE, SIZE + 3 * PAGE), *numbers(64 * MIB - PAGE, 64 * MIB + 2 * PAGE)]
        assert guest.inflate([*wanted, (1 << 32) - 1]) == 1
        assert guest.counters()["event_fails"] == 5
        assert guest.counters()["inflate_freed"] == 4 * PAGE
        assert guest.there(SIZE - 4 * PAGE, SIZE) == 2 * PAGE


def test_its_own_rings_may_be_in_the_balloon_and_only_that_device_suffers(guest: Guest) -> None:
    ring = guest.rings[0]
    ring.offer(ring.add(guest.pages(numbers(0, ROOM))))
    guest.notify()
    guest.settle()
    assert guest.counters()["inflate_freed"] == ROOM
    # An available index of 1, and a descriptor of zeros.
    ring.offer(0)
    guest.notify()
    guest.settle()
    guest.start()
    guest.fill()
    assert guest.inflate(numbers(8 * MIB, 9 * MIB)) == 1
    assert guest.there(8 * MIB, 9 * MIB) == 0


@pytest.mark.parametrize(
    "chain",
    [
        [Buffer(LISTS, 5)],
        [Buffer(LISTS, 4, True)],
        [Buffer(LISTS, 4), Buffer(LISTS, 4, True)],
        [Buffer(LISTS, 32768), Buffer(LISTS, 4)],
    ],
    ids=["half a number", "to be written", "both", "too many"],
)
def test_a_list_that_is_none_is_answered_and_counted(guest: Guest, chain: list[Buffer]) -> None:
    guest.fill()
    guest.memory.write(LISTS, struct.pack("<I", 8 * MIB // PAGE) * 8192)
    assert guest.send(0, chain) == 1
    assert guest.counters()["event_fails"] == 1
    assert guest.counters()["inflate_freed"] == 0
    assert guest.send(0, [Buffer(LISTS, 32768)]) == 1
    assert guest.counters()["inflate_freed"] == PAGE


def test_an_empty_list_is_answered(guest: Guest) -> None:
    assert guest.send(0, [Buffer(LISTS, 0)]) == 1
    assert guest.counters()["event_fails"] == 0


def test_what_is_taken_out_is_answered_and_can_be_used(guest: Guest) -> None:
    guest.fill()
    guest.inflate(numbers(8 * MIB, 9 * MIB))
    assert guest.deflate(numbers(8 * MIB, 9 * MIB)) == 1
    guest.memory.write(8 * MIB, b"\x55" * MIB)
    assert guest.memory.read(8 * MIB, MIB) == b"\x55" * MIB
    assert guest.counters()["deflate_count"] == 1
    assert guest.deflate([(1 << 32) - 1]) == 1


# -- what lies behind memory ---------------------------------------------------------------------------------------


def test_pages_of_a_shared_memory_are_gone_for_everybody() -> None:
    with Guest(GuestMemory(((0, SIZE),), backing="memfd")) as guest:
        fd = guest.memory.regions[0].fd
        guest.fill()
        chain = guest.pages(numbers(8 * MIB, 9 * MIB))
        before = os.fstat(fd).st_blocks * 512
        assert guest.send(0, chain) == 1
        assert before - os.fstat(fd).st_blocks * 512 == MIB
        assert os.pread(fd, MIB, 8 * MIB) == bytes(MIB)


def test_pages_of_a_memory_file_are_as_the_file_has_them_and_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(b"\x11" * SIZE)
    with open(path, "rb") as file:
        memory = GuestMemory(((0, SIZE),))
        memory.map_file(file.fileno())
    with Guest(memory) as guest:
        guest.fill()
        maps = mappings()
        guest.inflate(numbers(8 * MIB, 9 * MIB)[::2])
        assert guest.there(8 * MIB, 9 * MIB) == MIB // 2
        assert guest.memory.read(8 * MIB, 2 * PAGE) == b"\x11" * PAGE + b"\xaa" * PAGE
        assert mappings() == maps
    assert path.read_bytes() == b"\x11" * SIZE


@contextmanager
def huge_memory(backing: str) -> Iterator[GuestMemory]:
    """Skips where the host has no huge pages to spare."""
    place = Path("/proc/sys/vm/nr_hugepages")
    before = place.read_text()
    with suppress(OSError):
        place.write_text(str(int(before) + SIZE // HUGE))
    try:
        yield GuestMemory(((0, SIZE),), backing=backing)
    except ConfigError as error:
        pytest.skip(str(error))
    finally:
        with suppress(OSError):
            place.write_text(before)


@pytest.mark.parametrize("backing", ["hugepages", "hugepages-memfd"])
def test_huge_pages_go_when_all_of_one_is_in_the_balloon(backing: str) -> None:
    with huge_memory(backing) as memory, Guest(memory) as guest:
        guest.fill()
        half, other = numbers(8 * MIB, 9 * MIB), numbers(9 * MIB, 10 * MIB)
        guest.inflate(half)
        assert guest.counters()["inflate_freed"] == 0
        assert guest.memory.read(8 * MIB, 1) == b"\xaa"
        guest.deflate(half[:1])
        guest.inflate(other)
        assert guest.counters()["inflate_freed"] == 0
        guest.inflate(half[:1])
        assert guest.counters()["inflate_freed"] == HUGE
        assert guest.counters()["event_fails"] == 0
        assert guest.memory.read(8 * MIB, HUGE) == bytes(HUGE)
        assert guest.memory.read(10 * MIB, PAGE) == b"\xaa" * PAGE
        # After a reset nothing is in it any more.
        guest.inflate(numbers(12 * MIB, 13 * MIB))
        guest.start()
        guest.inflate(numbers(13 * MIB, 14 * MIB))
        assert guest.counters()["inflate_freed"] == HUGE


def test_only_whole_pages_within_a_report_go(guest: Guest) -> None:
    guest.fill()
    queue = guest.queue(F_REPORT)
    assert guest.send(queue, [Buffer(8 * MIB + 1, 3 * PAGE, True), Buffer(9 * MIB, PAGE - 1, True)]) == 1
    assert guest.counters()["free_page_report_freed"] == 2 * PAGE
    assert guest.there(8 * MIB, 10 * MIB) == 2 * MIB - 2 * PAGE


# -- reporting and hinting -----------------------------------------------------------------------------------------


def test_what_is_reported_is_the_hosts_again(guest: Guest) -> None:
    guest.fill()
    queue = guest.queue(F_REPORT)
    blocks = [Buffer(start * MIB, 2 * MIB, True) for start in (8, 12, 20)]
    assert guest.send(queue, blocks) == 1
    assert guest.there() == SIZE - ROOM - 6 * MIB
    counters = guest.counters()
    assert (counters["free_page_report_count"], counters["free_page_report_freed"]) == (3, 6 * MIB)
    assert guest.send(queue, [Buffer(8 * MIB, PAGE)]) == 1
    assert guest.counters()["event_fails"] == 1
    assert guest.counters()["free_page_report_fails"] == 0


def command(guest: Guest, number: int) -> None:
    guest.memory.write(LISTS, struct.pack("<I", number))
    assert guest.send(guest.queue(F_HINT), [Buffer(LISTS, 4)]) == 1


def hint(guest: Guest, start: int, size: int = 2 * MIB) -> int:
    """How many bytes went."""
    before = guest.counters()["free_page_hint_freed"]
    assert guest.send(guest.queue(F_HINT), [Buffer(start, size, True)]) == 1
    return guest.counters()["free_page_hint_freed"] - before


def test_a_run_of_hints_from_its_start_to_its_end(guest: Guest) -> None:
    guest.fill()
    status = guest.balloon.hinting_status
    assert (status().host_cmd, status().guest_cmd) == (0, None)
    assert hint(guest, 8 * MIB) == 0, "nobody has asked"
    guest.balloon.start_hinting(acknowledge_on_stop=True)
    assert guest.registers[CONFIG + 8] == 2
    assert hint(guest, 8 * MIB) == 0, "the driver has not said that they belong to this run"
    command(guest, 2)
    assert (status().host_cmd, status().guest_cmd) == (2, 2)
    assert hint(guest, 8 * MIB) == 2 * MIB
    assert guest.there(8 * MIB, 10 * MIB) == 0
    guest.acknowledge()
    command(guest, 0)
    assert (status().host_cmd, status().guest_cmd) == (1, 0)
    assert guest.registers[CONFIG + 8] == 1
    assert guest.registers[INTERRUPT_STATUS] & 2
    assert hint(guest, 12 * MIB) == 0
    assert guest.counters()["free_page_hint_count"] == 1


def test_a_run_that_is_not_acknowledged_lasts_until_it_is_stopped(guest: Guest) -> None:
    guest.balloon.start_hinting(acknowledge_on_stop=False)
    command(guest, 2)
    command(guest, 0)
    assert guest.balloon.hinting_status().host_cmd == 2
    guest.balloon.stop_hinting()
    assert guest.balloon.hinting_status().host_cmd == 1
    guest.balloon.start_hinting(acknowledge_on_stop=True)
    assert guest.balloon.hinting_status().host_cmd == 3
    # What the driver said at the end of the last run is not the end of this one.
    guest.notify(guest.queue(F_HINT))
    guest.settle()
    assert guest.balloon.hinting_status().host_cmd == 3


def test_hints_of_a_run_that_is_over_are_not_believed(guest: Guest) -> None:
    guest.fill()
    guest.balloon.start_hinting(acknowledge_on_stop=True)
    command(guest, 2)
    guest.balloon.start_hinting(acknowledge_on_stop=True)
    assert hint(guest, 8 * MIB) == 0
    command(guest, 3)
    assert hint(guest, 8 * MIB) == 2 * MIB


def test_without_hinting_nothing_can_be_asked_of_it() -> None:
    with Guest() as guest:
        for call in (
            lambda: guest.balloon.start_hinting(True),
            guest.balloon.stop_hinting,
            guest.balloon.hinting_status,
        ):
            with pytest.raises(ConfigError, match="Attempting to use hinting when not enabled"):
                call()


def test_a_driver_that_does_not_want_all_has_the_queues_of_what_it_wants() -> None:
    with Guest(features=F_VERSION_1 | F_REPORT, **ALL) as guest:
        guest.fill()
        assert guest.send(2, [Buffer(8 * MIB, 2 * MIB, True)]) == 1
        assert guest.counters()["free_page_report_freed"] == 2 * MIB


# -- statistics --------------------------------------------------------------------------------------------------


def entries(**values: int) -> bytes:
    return b"".join(struct.pack("<HQ", STATISTICS_NAMES.index(name), value) for name, value in values.items())


def tell(guest: Guest, content: bytes, **buffer: Any) -> None:
    """What the driver does when it has its buffer, or at first."""
    guest.memory.write(LISTS, content)
    ring = guest.rings[2]
    ring.offer(ring.add([Buffer(LISTS, len(content), **buffer)]))
    guest.notify(2)
    guest.settle()


def wait(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_statistics_are_those_that_the_driver_has_told(guest: Guest) -> None:
    guest.balloon.resize(5)
    guest.registers[CONFIG + 4] = 600
    found = msgspec.to_builtins(guest.balloon.statistics())
    assert found == {"target_pages": 1280, "actual_pages": 600, "target_mib": 5, "actual_mib": 2}
    values = {name: index * 7 + 1 for index, name in enumerate(STATISTICS_NAMES)}
    tell(guest, entries(**values))
    found = msgspec.to_builtins(guest.balloon.statistics())
    assert {name: found[name] for name in values} == values
    assert guest.rings[2].reap() == [], "the buffer stays with the device"
    guest.balloon.poll_statistics(1800)
    assert len(guest.rings[2].reap()) == 1, "and goes back when it wants others"
    tell(guest, entries(free_memory=(1 << 64) - 1))
    found = guest.balloon.statistics()
    assert (found.free_memory, found.total_memory) == ((1 << 64) - 1, values["total_memory"])
    assert guest.counters()["stats_updates_count"] == 2
    assert guest.counters()["stats_update_fails"] == 0


def test_statistics_are_asked_for_at_every_interval() -> None:
    with Guest(stats_interval_s=1) as guest:
        for _ in range(2):
            tell(guest, entries(swap_in=1))
            wait(guest.rings[2].reap)


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (struct.pack("<HQ", 16, 5), {}),
        (struct.pack("<HQ", 65535, 5), {}),
        (entries(swap_in=5)[:-1], {}),
        (bytes(2570), {}),
        (bytes(10), {"writable": True}),
    ],
    ids=["unknown", "nonsense", "cut", "too many", "to be written"],
)
def test_statistics_that_are_none_are_counted_and_asked_for_again(
    guest: Guest, content: bytes, options: Any
) -> None:
    tell(guest, content, **options)
    assert guest.counters()["stats_update_fails"] == 1
    assert guest.balloon.statistics().swap_in is None
    guest.balloon.poll_statistics(60)
    assert len(guest.rings[2].reap()) == 1
    tell(guest, entries(swap_in=3))
    assert guest.balloon.statistics().swap_in == 3


def test_a_driver_with_several_buffers_gets_all_but_one_back(guest: Guest) -> None:
    for value in (1, 2, 3):
        tell(guest, entries(swap_in=value))
    assert len(guest.rings[2].reap()) == 2
    assert guest.balloon.statistics().swap_in == 3
    assert guest.counters()["stats_update_fails"] == 2


def test_statistics_cannot_be_begun_or_ended_while_it_runs(guest: Guest) -> None:
    with pytest.raises(ConfigError, match="Statistics cannot be enabled/disabled after activation"):
        guest.balloon.poll_statistics(0)
    with Guest() as other:
        other.balloon.poll_statistics(0)
        with pytest.raises(ConfigError, match="Statistics cannot be enabled/disabled after activation"):
            other.balloon.poll_statistics(1)
        with pytest.raises(ConfigError, match="Received stats query when stats are disabled"):
            other.balloon.statistics()


def test_after_a_reset_nothing_is_left_of_the_driver(guest: Guest) -> None:
    tell(guest, entries(swap_in=3))
    guest.registers[CONFIG + 4] = 7
    guest.balloon.start_hinting(acknowledge_on_stop=True)
    command(guest, 2)
    guest.start()
    assert msgspec.to_builtins(guest.balloon.statistics()) == {
        "target_pages": 0,
        "actual_pages": 0,
        "target_mib": 0,
        "actual_mib": 0,
    }
    assert guest.registers[CONFIG + 8] == 0
    assert guest.balloon.hinting_status().guest_cmd is None
    guest.balloon.poll_statistics(60)
    assert guest.rings[2].reap() == []


# -- saved state -------------------------------------------------------------------------------------------------


def test_a_restored_balloon_goes_on(guest: Guest) -> None:
    guest.balloon.resize(9)
    guest.registers[CONFIG + 4] = 600
    tell(guest, entries(swap_in=3, direct_reclaim=4))
    guest.balloon.start_hinting(acknowledge_on_stop=False)
    command(guest, 2)
    guest.acknowledge()
    guest.io.pause()
    state, content = through_a_file(guest.transport.save()), guest.memory.read(0, ROOM)
    with Guest(**ALL, features=F_VERSION_1 | F_EVENT_IDX) as other:
        other.io.pause()
        other.memory.write(0, content)
        other.interrupts()
        other.transport.restore(state)
        other.io.resume()
        other.settle()
        found = other.balloon.statistics()
        assert (found.target_mib, found.actual_pages) == (9, 600)
        assert (found.swap_in, found.direct_reclaim, found.swap_out) == (3, 4, None)
        # The run has ended, and the driver hears of it.
        assert msgspec.to_builtins(other.balloon.hinting_status()) == {"host_cmd": 1, "guest_cmd": 2}
        assert other.registers[CONFIG + 8] == 1
        assert other.registers[INTERRUPT_STATUS] & 2
        assert other.interrupts() >= 1
        # The device has the buffer, and gives it back when it wants to know more.
        used = other.memory.read(guest.rings[2].used + 2, 2)
        other.balloon.poll_statistics(60)
        assert other.memory.read(guest.rings[2].used + 2, 2) != used
        other.balloon.start_hinting(acknowledge_on_stop=False)
        assert other.balloon.hinting_status().host_cmd == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_pages": 1 << 32},
        {"hint_guest": -1},
        {"interval_s": 0},
        {"interval_s": 1 << 16},
        {"statistics": (1,)},
        {"statistics": (1 << 64, *[None] * 15)},
    ],
    ids=str,
)
def test_a_state_that_is_none_is_refused(guest: Guest, wrong: dict[str, Any]) -> None:
    own = guest.balloon.save_own()
    assert isinstance(own, BalloonState)
    guest.balloon.restore_own(own)
    with pytest.raises(ValueError, match=r"balloon|statistics"):
        guest.balloon.restore_own(msgspec.structs.replace(own, **wrong))
