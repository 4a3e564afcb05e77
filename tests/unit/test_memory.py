"""Guest memory: what is inside, what is refused, who owns the mapping, which pages are dirty."""

from __future__ import annotations

import gc
import os

import pytest

from crackle.errors import ConfigError, MemoryAccessError
from crackle.memory import GuestMemory

PAGE = 4096
LOW, HIGH = 1 << 20, 1 << 32


@pytest.fixture
def memory():
    with GuestMemory([(0, LOW), (HIGH, LOW)]) as memory:
        yield memory


def dirty(memory: GuestMemory, index: int) -> set[int]:
    """Numbers of the dirty pages of a region."""
    bits = int.from_bytes(memory.take_dirty(index), "little")
    return {page for page in range(bits.bit_length()) if bits >> page & 1}


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- access --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpa", [0, 1, LOW - 3, HIGH, HIGH + LOW - 3])
def test_what_is_written_can_be_read(memory: GuestMemory, gpa: int) -> None:
    memory.write(gpa, b"abc")
    assert memory.read(gpa, 3) == b"abc"


def test_memory_starts_as_zeros(memory: GuestMemory) -> None:
    assert memory.size == 2 * LOW
    assert memory.read(0, LOW) + memory.read(HIGH, LOW) == bytes(2 * LOW)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (LOW - 1, 2),
        (LOW, 1),
        (LOW, 0),
        (HIGH - 1, 2),
        (HIGH + LOW, 1),
        (0, LOW + 1),
        (0, HIGH + 1),  # begins and ends in memory, with a hole between
        (-1, 1),
        (0, -1),
        (1 << 64, 1),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 2),
        (0, 1 << 63),
        (0, 1 << 64),
        (1, (1 << 64) - 1),
    ],
)
def test_a_range_that_is_not_inside_one_region_is_refused(memory: GuestMemory, gpa: int, size: int) -> None:
    with pytest.raises(MemoryAccessError, match="is not inside guest memory"):
        memory.read(gpa, size)
    with pytest.raises(MemoryAccessError, match="is not inside guest memory"):
        memory.load(gpa, 0, 0, size)
    if 0 <= size <= 2 * LOW:
        with pytest.raises(MemoryAccessError, match="is not inside guest memory"):
            memory.write(gpa, bytes(size))


def test_a_write_that_does_not_fit_writes_nothing(memory: GuestMemory) -> None:
    with pytest.raises(MemoryAccessError):
        memory.write(LOW - 2, b"abc")
    assert memory.read(LOW - 2, 2) == bytes(2)


def test_any_contiguous_buffer_can_be_written(memory: GuestMemory) -> None:
    for data in (b"abcd", bytearray(b"efgh"), memoryview(b"xijkl")[1:], b""):
        memory.write(5, data)
        assert memory.read(5, len(data)) == bytes(data)
    with pytest.raises(BufferError):
        memory.write(5, memoryview(b"abcdef")[::2])


def test_a_file_is_read_straight_into_memory(memory: GuestMemory, tmp_path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(bytes(range(256)) * 16)
    fd = os.open(path, os.O_RDONLY)
    try:
        memory.load(HIGH + 7, fd, 100, 1000)
        assert memory.read(HIGH + 6, 1002) == b"\0" + (bytes(range(256)) * 16)[100:1100] + b"\0"
        memory.load(0, fd, 4096, 0)
        with pytest.raises(ConfigError, match="file ends 4 bytes before offset 4100"):
            memory.load(0, fd, 4000, 100)
    finally:
        os.close(fd)
    with pytest.raises(ConfigError, match="Bad file descriptor"):
        memory.load(0, fd, 0, 1)


def test_a_region_is_a_writable_buffer(memory: GuestMemory) -> None:
    first, second = memory.regions
    assert (first.gpa, first.size, second.gpa, second.size) == (0, LOW, HIGH, LOW)
    assert (first.fd, first.offset) == (-1, 0)
    assert first.hva % PAGE == second.hva % PAGE == 0
    with memoryview(second) as view:
        assert (view.nbytes, view.readonly) == (LOW, False)
        view[10:13] = b"xyz"
    assert memory.read(HIGH + 10, 3) == b"xyz"


# -- life ----------------------------------------------------------------------------------------------------


def test_memory_is_not_unmapped_under_a_view(memory: GuestMemory) -> None:
    view = memoryview(memory.regions[1])
    with pytest.raises(BufferError, match="in use by a memoryview"):
        memory.close()
    memory.write(HIGH, b"still here")
    assert view[:10] == b"still here"
    view.release()
    memory.close()


def test_a_view_keeps_its_mapping_alive() -> None:
    memory = GuestMemory([(0, LOW)])
    memory.write(3, b"abc")
    view = memoryview(memory.regions[0])
    del memory
    gc.collect()
    assert view[3:6] == b"abc"


def test_closed_memory_refuses_access() -> None:
    memory = GuestMemory([(0, LOW)])
    region = memory.regions[0]
    memory.close()
    memory.close()
    assert memory.size == 0
    assert memory.regions == ()
    for access in (lambda: memory.read(0, 1), lambda: memory.write(0, b"x"), lambda: memory.load(0, 0, 0, 1)):
        with pytest.raises(MemoryAccessError, match="guest memory is closed"):
            access()
    with pytest.raises((BufferError, ValueError), match="guest memory is closed"):
        memoryview(region)


def test_closing_gives_mapping_and_descriptor_back() -> None:
    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum("guest-memory" in line for line in maps)

    gc.collect()  # what earlier tests have left to it
    before = fds()
    with GuestMemory([(0, LOW), (HIGH, LOW)], backing="memfd") as memory:
        assert mapped() == 2
        assert fds() == before + 1
        assert memory.regions[0].fd == memory.regions[1].fd >= 0
    assert mapped() == 0
    assert fds() == before
    GuestMemory([(0, LOW)], backing="memfd")
    gc.collect()
    assert mapped() == 0
    assert fds() == before


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        ([], "needs 1 to 16 regions, not 0"),
        ([(i << 20, PAGE) for i in range(17)], "needs 1 to 16 regions, not 17"),
        ([(0, 0)], "of 0x0 bytes is not a multiple of 0x1000"),
        ([(0, -PAGE)], "is not a multiple of 0x1000"),
        ([(0, PAGE + 1)], "of 0x1001 bytes is not a multiple of 0x1000"),
        ([(1, PAGE)], "region at 0x1 of"),
        ([(-PAGE, PAGE)], "overlaps"),
        ([(0, 2 * PAGE), (PAGE, PAGE)], "at 0x1000 overlaps the one before it, which ends at 0x2000"),
        ([(PAGE, PAGE), (0, PAGE)], "at 0x0 overlaps the one before it"),
        ([((1 << 52) - PAGE, 2 * PAGE)], "beyond 52 bits"),
        ([(1 << 64, PAGE)], "beyond 52 bits"),
    ],
)
def test_a_wrong_layout_is_refused(layout: list[tuple[int, int]], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        GuestMemory(layout)


def test_what_the_host_cannot_give_is_refused_and_nothing_is_left() -> None:
    gc.collect()  # what earlier tests have left to it
    before = fds()
    with pytest.raises(ConfigError, match="unknown memory backing 'floppy': expected one of anonymous"):
        GuestMemory([(0, LOW)], backing="floppy")
    with pytest.raises(ConfigError, match=r"cannot map .* of guest memory"):
        GuestMemory([(0, LOW), (HIGH, 1 << 51)])
    with pytest.raises(ConfigError, match=r"cannot make a memfd|cannot map"):
        GuestMemory([(0, LOW), (HIGH, 1 << 51)], backing="memfd")
    with pytest.raises(ConfigError, match="not a multiple of 0x200000"):
        GuestMemory([(0, LOW)], backing="hugepages")
    assert fds() == before


def test_memory_is_laid_out_once() -> None:
    with GuestMemory([(0, LOW)]) as memory, pytest.raises(ConfigError, match="already laid out"):
        memory.__init__([(0, LOW)])


# -- backings ------------------------------------------------------------------------------------------------


def test_memfd_memory_is_shared_with_who_maps_the_descriptor() -> None:
    with GuestMemory([(0, LOW), (HIGH, LOW)], backing="memfd") as memory:
        memory.write(HIGH + 5, b"seen")
        region = memory.regions[1]
        assert (memory.regions[0].offset, region.offset) == (0, LOW)
        assert os.pread(region.fd, 4, region.offset + 5) == b"seen"
        os.pwrite(region.fd, b"back", 9)
        assert memory.read(9, 4) == b"back"


@pytest.mark.parametrize("shared", [False, True])
def test_file_memory_starts_as_the_file_and_is_written_back_only_when_shared(tmp_path, shared: bool) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(bytes(PAGE) + b"low".ljust(LOW, b"-") + b"high".ljust(LOW, b"-"))
    with open(path, "r+b") as file:
        layout = [(0, LOW), (HIGH, LOW)]
        with GuestMemory(layout, backing="file", fd=file.fileno(), offset=PAGE, shared=shared) as memory:
            assert memory.read(0, 4) + memory.read(HIGH, 5) == b"low-high-"
            assert [region.offset for region in memory.regions] == [PAGE, PAGE + LOW]
            memory.write(0, b"new")
        assert not file.closed
    assert path.read_bytes()[PAGE : PAGE + 3] == (b"new" if shared else b"low")


def test_a_file_too_short_for_the_layout_is_refused(tmp_path) -> None:
    """Touching a page beyond the file's end would kill the process."""
    path = tmp_path / "snapshot"
    path.write_bytes(bytes(LOW))
    with open(path, "r+b") as file:
        GuestMemory([(0, LOW)], backing="file", fd=file.fileno()).close()
        for layout, offset in (([(0, LOW + PAGE)], 0), ([(0, LOW)], PAGE), ([(0, LOW), (HIGH, PAGE)], 0)):
            with pytest.raises(ConfigError, match="file of guest memory has 1048576 bytes"):
                GuestMemory(layout, backing="file", fd=file.fileno(), offset=offset)
    with pytest.raises(ConfigError, match="Bad file descriptor"):
        GuestMemory([(0, LOW)], backing="file", fd=-1)


def test_transparent_huge_pages_behave_as_memory() -> None:
    with GuestMemory([(0, 4 << 20)], backing="transparent") as memory:
        memory.write(3 << 20, b"abc")
        assert memory.read(3 << 20, 3) == b"abc"


# -- dirty pages ---------------------------------------------------------------------------------------------


def test_every_page_touched_by_a_write_is_dirty_until_it_is_taken(memory: GuestMemory) -> None:
    assert memory.take_dirty(0) == b""
    memory.write(0, b"before")
    memory.track_dirty(True)
    assert memory.tracking
    assert dirty(memory, 0) == dirty(memory, 1) == set()
    memory.write(2 * PAGE - 1, b"ab")
    memory.write(HIGH + 70 * PAGE, bytes(3 * PAGE))
    memory.write(LOW - 1, b"z")
    memory.write(5 * PAGE, b"")
    assert dirty(memory, 0) == {1, 2, LOW // PAGE - 1}
    assert dirty(memory, 1) == {70, 71, 72}
    assert dirty(memory, 0) == dirty(memory, 1) == set()


def test_a_loaded_file_is_dirty_and_a_read_is_not(memory: GuestMemory, tmp_path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(bytes(2 * PAGE))
    memory.track_dirty(True)
    memory.read(9 * PAGE, PAGE)
    with open(path, "rb") as file:
        memory.load(3 * PAGE, file.fileno(), 0, 2 * PAGE)
    assert dirty(memory, 0) == {3, 4}


def test_the_bitmap_is_as_long_as_kvms(memory: GuestMemory) -> None:
    with GuestMemory([(0, 65 * PAGE), (HIGH, 64 * PAGE)]) as odd:
        odd.track_dirty(True)
        assert [len(odd.take_dirty(i)) for i in (0, 1)] == [16, 8]
        odd.write(64 * PAGE, b"x")
        assert dirty(odd, 0) == {64}
    with pytest.raises(IndexError, match="no memory region 2"):
        memory.take_dirty(2)
    with pytest.raises(IndexError, match="no memory region -1"):
        memory.take_dirty(-1)


def test_tracking_can_be_stopped_and_begun_again_clean(memory: GuestMemory) -> None:
    memory.track_dirty(True)
    memory.write(0, b"x")
    memory.track_dirty(False)
    assert not memory.tracking
    assert memory.take_dirty(0) == b""
    memory.write(PAGE, b"x")
    memory.track_dirty(True)
    assert dirty(memory, 0) == set()
