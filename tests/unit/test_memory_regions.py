"""Guest memory whose regions come and go: who is told, in which order, and what nobody may notice."""

from __future__ import annotations

import fcntl
import gc
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError, MemoryAccessError
from crackle.memory import BACKINGS, GuestMemory, Region, huge_pages_missing, region

PAGE = 4096
SIZE = 1 << 20
HIGH = 1 << 32
MIB = 1 << 20
HUGE = 2 * MIB


class Listener:
    """Notes what it is told; `refuses` and `fails` name the regions at which it raises."""

    def __init__(self, log: list[tuple[str, str, int]], name: str = "") -> None:
        self.log, self.name = log, name
        self.refuses: set[int] = set()
        self.fails: set[int] = set()

    def region_added(self, region: Region) -> None:
        self.log.append((self.name, "added", region.gpa))
        if region.gpa in self.refuses:
            raise ConfigError("not for me")

    def region_removed(self, region: Region) -> None:
        self.log.append((self.name, "removed", region.gpa))
        assert len(memoryview(region)) == region.size, "it is mapped until everybody has been told"
        if region.gpa in self.fails:
            raise OSError("cannot let go")


@pytest.fixture
def memory():
    with GuestMemory([(0, SIZE), (HIGH, SIZE)]) as memory:
        yield memory


def layout(memory: GuestMemory) -> list[tuple[int, int]]:
    return [(each.gpa, each.size) for each in memory.regions]


def mapped(region: Region) -> bool:
    try:
        return memoryview(region).nbytes > 0
    except (BufferError, ValueError):
        return False


def dirty(memory: GuestMemory, index: int) -> set[int]:
    bits = int.from_bytes(memory.take_dirty(index), "little")
    return {page for page in range(bits.bit_length()) if bits >> page & 1}


# -- adding and removing -------------------------------------------------------------------------------------


def test_what_is_added_can_be_used_and_what_is_removed_cannot(memory: GuestMemory) -> None:
    added = memory.add_region(2 * SIZE, SIZE)
    assert layout(memory) == [(0, SIZE), (2 * SIZE, SIZE), (HIGH, SIZE)]
    assert memory.size == 3 * SIZE
    memory.write(2 * SIZE + 5, b"new")
    assert memory.read(2 * SIZE, 9) == b"\0\0\0\0\0new\0"
    memory.remove_region(added)
    assert layout(memory) == [(0, SIZE), (HIGH, SIZE)]
    assert memory.size == 2 * SIZE
    assert not mapped(added)
    with pytest.raises(MemoryAccessError):
        memory.read(2 * SIZE, 1)


def test_a_region_that_was_there_from_the_beginning_can_go(memory: GuestMemory) -> None:
    memory.write(0, b"stays")
    memory.remove_region(memory.regions[1])
    assert layout(memory) == [(0, SIZE)]
    assert memory.read(0, 5) == b"stays"
    with pytest.raises(ConfigError, match="last region"):
        memory.remove_region(memory.regions[0])


@pytest.mark.parametrize(
    ("gpa", "size", "why"),
    [
        (0, PAGE, "overlaps the one at 0x0"),
        (SIZE - PAGE, 2 * PAGE, "overlaps the one at 0x0"),
        (HIGH - PAGE, 2 * SIZE, "overlaps the one at 0x100000000"),
        (0, 2 * HIGH, "overlaps"),
        (SIZE, 0, "not a multiple"),
        (SIZE + 1, PAGE, "not a multiple"),
        (-PAGE, PAGE, "begins below address 0"),
        (1 << 52, PAGE, "beyond 52 bits"),
        (2 * HIGH, 1 << 51, "cannot map"),
    ],
)
def test_a_region_that_cannot_be_had_is_refused_and_nothing_changes(
    memory: GuestMemory, gpa: int, size: int, why: str
) -> None:
    log: list[tuple[str, str, int]] = []
    listener = Listener(log)
    memory.add_listener(listener)
    before = memory.regions
    with pytest.raises(ConfigError, match=why):
        memory.add_region(gpa, size)
    assert (memory.regions, memory.size, log) == (before, 2 * SIZE, [])


def test_sixteen_regions_are_the_most() -> None:
    with GuestMemory([(i * 2 * PAGE, PAGE) for i in range(15)]) as memory:
        last = memory.add_region(HIGH, PAGE)
        with pytest.raises(ConfigError, match="16 regions already; remove one"):
            memory.add_region(2 * HIGH, PAGE)
        memory.remove_region(last)
        memory.add_region(2 * HIGH, PAGE)


def test_a_region_goes_once_and_only_from_its_own_memory(memory: GuestMemory) -> None:
    added = memory.add_region(2 * SIZE, SIZE)
    memory.remove_region(added)
    with pytest.raises(ConfigError, match="no region of this guest memory"):
        memory.remove_region(added)
    with GuestMemory([(0, SIZE)]) as other, pytest.raises(ConfigError, match="no region of this"):
        memory.remove_region(other.regions[0])


def test_a_region_is_not_removed_under_a_view(memory: GuestMemory) -> None:
    added = memory.add_region(2 * SIZE, SIZE)
    view = memoryview(added)
    with pytest.raises(BufferError, match="in use by a memoryview"):
        memory.remove_region(added)
    view[:3] = b"yes"
    assert memory.read(2 * SIZE, 3) == b"yes"
    view.release()
    memory.remove_region(added)


def test_closed_memory_takes_no_region() -> None:
    memory = GuestMemory([(0, SIZE)])
    memory.close()
    with pytest.raises(ConfigError, match="closed"):
        memory.add_region(HIGH, SIZE)


@pytest.mark.parametrize("backing", ["anonymous", "memfd", "transparent", "transparent-memfd"])
def test_nothing_is_left_of_regions_that_came_and_went(backing: str) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("\n")

    with GuestMemory([(0, SIZE)], backing=backing) as memory:
        memory.remove_region(memory.add_region(HIGH, 4 * MIB))
        gc.collect()
        before = len(os.listdir("/proc/self/fd")), mappings()
        for i in range(50):
            memory.remove_region(memory.add_region(HIGH + i * HUGE, 4 * MIB))
        assert len(os.listdir("/proc/self/fd")) == before[0]
        assert abs(mappings() - before[1]) < 10


# -- listeners -----------------------------------------------------------------------------------------------


def test_listeners_are_told_in_order_and_of_what_goes_the_other_way_round(memory: GuestMemory) -> None:
    log: list[tuple[str, str, int]] = []
    first, second = Listener(log, "slots"), Listener(log, "device")
    memory.add_listener(first)
    memory.add_listener(second)
    added = memory.add_region(2 * SIZE, SIZE)
    memory.remove_region(added)
    assert log == [
        ("slots", "added", 2 * SIZE),
        ("device", "added", 2 * SIZE),
        ("device", "removed", 2 * SIZE),
        ("slots", "removed", 2 * SIZE),
    ]


def test_a_listener_that_refuses_undoes_the_addition_for_those_before_it(memory: GuestMemory) -> None:
    log: list[tuple[str, str, int]] = []
    first, second, third = (Listener(log, name) for name in "abc")
    second.refuses.add(2 * SIZE)
    for each in (first, second, third):
        memory.add_listener(each)
    with pytest.raises(ConfigError, match="not for me"):
        memory.add_region(2 * SIZE, SIZE)
    assert log == [("a", "added", 2 * SIZE), ("b", "added", 2 * SIZE), ("a", "removed", 2 * SIZE)]
    assert layout(memory) == [(0, SIZE), (HIGH, SIZE)]
    second.refuses.clear()
    memory.add_region(2 * SIZE, SIZE)


def test_a_listener_that_fails_to_let_go_keeps_the_mapping_and_all_are_told(memory: GuestMemory) -> None:
    log: list[tuple[str, str, int]] = []
    first, second = Listener(log, "a"), Listener(log, "b")
    second.fails.add(2 * SIZE)
    memory.add_listener(first)
    memory.add_listener(second)
    added = memory.add_region(2 * SIZE, SIZE)
    log.clear()
    with pytest.raises(OSError, match="cannot let go"):
        memory.remove_region(added)
    assert log == [("b", "removed", 2 * SIZE), ("a", "removed", 2 * SIZE)]
    assert layout(memory) == [(0, SIZE), (HIGH, SIZE)], "no address leads there any more"
    assert mapped(added), "but whoever could not let go may still use it"
    memory.close()
    assert not mapped(added)


def test_who_is_dropped_or_has_left_is_not_told(memory: GuestMemory) -> None:
    log: list[tuple[str, str, int]] = []
    dropped, left = Listener(log, "dropped"), Listener(log, "left")
    memory.add_listener(dropped)
    memory.add_listener(left)
    del dropped
    memory.remove_listener(left)
    memory.remove_listener(left)
    gc.collect()
    memory.add_region(2 * SIZE, SIZE)
    assert log == []


# -- ranges across regions -----------------------------------------------------------------------------------


def test_a_range_across_adjacent_regions_is_read_and_written_as_one(memory: GuestMemory) -> None:
    memory.add_region(SIZE, PAGE)
    memory.add_region(SIZE + PAGE, SIZE)
    data = os.urandom(3 * PAGE)
    memory.write(SIZE - PAGE, data)
    assert memory.read(SIZE - PAGE, 3 * PAGE) == data
    assert memory.read(SIZE - 1, 2) == data[PAGE - 1 : PAGE + 1]


def test_a_file_is_loaded_across_adjacent_regions(memory: GuestMemory, tmp_path: Path) -> None:
    memory.add_region(SIZE, SIZE)
    data = os.urandom(3 * PAGE)
    path = tmp_path / "image"
    path.write_bytes(b"head" + data)
    with open(path, "rb") as file:
        memory.load(SIZE - PAGE, file.fileno(), 4, len(data))
        assert memory.read(SIZE - PAGE, len(data)) == data
        with pytest.raises(MemoryAccessError):
            memory.load(2 * SIZE - PAGE, file.fileno(), 4, len(data))


def test_a_write_that_runs_out_of_adjacent_regions_writes_nothing(memory: GuestMemory) -> None:
    memory.add_region(SIZE, PAGE)
    with pytest.raises(MemoryAccessError, match="is not inside guest memory"):
        memory.write(SIZE - 4, b"x" * (PAGE + 5))
    assert memory.read(SIZE - 4, PAGE + 4) == bytes(PAGE + 4)


def test_dirty_pages_are_noted_in_each_of_the_regions_and_in_those_added_later(memory: GuestMemory) -> None:
    memory.track_dirty(True)
    memory.add_region(SIZE, 2 * PAGE)
    memory.write(SIZE - 1, b"ab")
    assert [dirty(memory, i) for i in range(3)] == [{SIZE // PAGE - 1}, {0}, set()]
    memory.write(SIZE + 2 * PAGE - 1, b"z")
    assert [dirty(memory, i) for i in range(3)] == [set(), {1}, set()]
    assert memory.tracking


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 11), st.integers(1, 3)),
        st.tuples(st.just("remove"), st.integers(0, 11), st.just(0)),
        st.tuples(st.just("write"), st.integers(0, 12 * PAGE), st.integers(0, 3 * PAGE)),
        st.tuples(st.just("read"), st.integers(0, 12 * PAGE), st.integers(0, 3 * PAGE)),
    ),
    max_size=30,
)


@given(steps=STEPS)
def test_any_sequence_leaves_what_a_plain_model_says(steps: list[tuple[str, int, int]]) -> None:
    """The model: one byte array of the whole space, and whether each page is there and to which region it belongs."""
    content = bytearray(16 * PAGE)
    owner: dict[int, Region] = {}
    with GuestMemory([(1 << 30, PAGE)]) as memory:
        memory.track_dirty(True)
        for number, (what, at, size) in enumerate(steps):
            if what == "add":
                pages = range(at, at + size)
                if owner.keys() & set(pages):
                    with pytest.raises(ConfigError, match="overlaps"):
                        memory.add_region(at * PAGE, size * PAGE)
                else:
                    owner |= dict.fromkeys(pages, memory.add_region(at * PAGE, size * PAGE))
                    content[at * PAGE : (at + size) * PAGE] = bytes(size * PAGE)
            elif what == "remove":
                if at in owner:
                    gone = owner[at]
                    memory.remove_region(gone)
                    owner = {page: each for page, each in owner.items() if each is not gone}
            else:
                whole = set(range(at // PAGE, (at + max(size, 1) - 1) // PAGE + 1)) <= owner.keys()
                data = bytes((number + 1,)) * size
                try:
                    if what == "write":
                        memory.write(at, data)
                        content[at : at + size] = data
                    else:
                        assert memory.read(at, size) == content[at : at + size]
                except MemoryAccessError:
                    assert not whole
                else:
                    assert whole
        assert memory.size == (1 + len(owner)) * PAGE


# -- what backs it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backing", ["anonymous", "transparent", "memfd", "transparent-memfd"])
def test_large_regions_lie_as_huge_pages_need_it(backing: str) -> None:
    places = [(0, 6 * MIB), (HIGH + MIB, 5 * MIB), (2 * HIGH + 3 * PAGE, 4 * MIB)]
    with GuestMemory(places, backing=backing) as memory:
        memory.add_region(4 * HIGH, 4 * MIB)
        assert [(each.hva - each.gpa) % HUGE for each in memory.regions] == [0] * 4
        for each in memory.regions:
            memory.write(each.gpa + each.size - 3, b"end")


@pytest.mark.parametrize("backing", ["anonymous", "transparent", "memfd"])
def test_no_core_dump_shows_it_and_no_forked_process_has_it(backing: str) -> None:
    with GuestMemory([(0, 8 * MIB)], backing=backing) as memory:
        assert {"dd", "dc"} <= flags(memory.regions[0])


def flags(region: Region) -> set[str]:
    """Those of its mapping (proc(5), smaps, VmFlags)."""
    _, found, after = Path("/proc/self/smaps").read_text().partition(f"{region.hva:x}-")
    assert found
    return set(next(line for line in after.splitlines() if line.startswith("VmFlags")).split()[1:])


def test_transparent_memory_is_in_huge_pages_where_the_host_has_them() -> None:
    if huge_pages_missing("transparent") is not None:
        pytest.skip(f"no transparent huge pages: {huge_pages_missing('transparent')}")
    with GuestMemory([(0, 8 * MIB)], backing="transparent") as memory:
        memory.write(0, bytes(8 * MIB))
        address = f"{memory.regions[0].hva:x}-"
        _, found, after = Path("/proc/self/smaps").read_text().partition(address)
        assert found
        amount = next(line for line in after.splitlines() if line.startswith("AnonHugePages"))
        assert int(amount.split()[1]) > 0


def test_who_shares_the_memory_cannot_change_its_size() -> None:
    with GuestMemory([(0, SIZE)], backing="memfd") as memory:
        added = memory.add_region(HIGH, SIZE)
        for fd in (memory.regions[0].fd, added.fd):
            for size in (0, PAGE, 2 * SIZE):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, size)
            with pytest.raises(PermissionError):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert os.pwrite(added.fd, b"shared", added.offset) == 6
        assert memory.read(HIGH, 6) == b"shared"


@pytest.mark.parametrize(
    ("backing", "files", "why"),
    [
        ("anonymous", {}, None),
        ("memfd", {"shmem_enabled": "always [never]"}, None),
        ("hugepages", {"enabled": "always madvise [never]"}, None),
        ("transparent", {"enabled": "always [madvise] never"}, None),
        ("transparent", {"enabled": "always madvise [never]"}, "enabled says always madvise [never]"),
        ("transparent", {}, "this host's kernel has none"),
        ("transparent-memfd", {"shmem_enabled": "always advise [deny] never"}, "shmem_enabled says"),
        ("transparent-memfd", {"shmem_enabled": "[advise] never", "enabled": "[never]"}, None),
        (
            "transparent",
            {"enabled": "always [madvise] never", "hugepages-2048kB/enabled": "inherit [never]"},
            "2048kB/enabled says",
        ),
        (
            "transparent",
            {"enabled": "always madvise [never]", "hugepages-2048kB/enabled": "[inherit] never"},
            "/enabled says always madvise [never]",
        ),
        (
            "transparent",
            {"enabled": "always madvise [never]", "hugepages-2048kB/enabled": "always [madvise] never"},
            None,
        ),
    ],
)
def test_huge_pages_that_the_host_refuses_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backing: str, files: dict[str, str], why: str | None
) -> None:
    (tmp_path / "hugepages-2048kB").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(region, "HUGE_PAGES", str(tmp_path))
    assert backing in BACKINGS
    found = huge_pages_missing(backing)
    assert found is None if why is None else found is not None and why in found
