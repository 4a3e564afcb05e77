"""virtio-block as a driver finds it: requests, however cut, against the backing file (virtio 1.2, 5.2)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.virtio.block.device import Block
from support import driver
from support.disk import (
    ARENA,
    DISCARD,
    FEATURES,
    FLUSH,
    GET_ID,
    HIGH,
    IN,
    IOERR,
    LOW,
    OK,
    OUT,
    PAGE,
    RING,
    SECTOR,
    SECTORS,
    TABLE,
    UNSUPP,
    UNTOUCHED,
    Disk,
    submit_reads,
)
from support.driver import F_EVENT_IDX, NEEDS_RESET, STATUS, Buffer, Ring

F_RO, F_FLUSH = 1 << 5, 1 << 9


@pytest.fixture(scope="module", params=["Sync", "Async"], autouse=True)
def engine(request: pytest.FixtureRequest) -> str:
    """Everything here holds for both engines."""
    Disk.engine = request.param
    return request.param


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    with Disk(tmp_path / "disk") as disk:
        yield disk


# -- reading and writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sector", "count"), [(0, 1), (63, 1), (5, 8), (0, 64), (64, 0)])
def test_a_read_gives_what_is_in_the_file(disk: Disk, sector: int, count: int) -> None:
    answer = disk.request(IN, sector, room=count * SECTOR)
    assert answer == (OK, disk.contents[sector * SECTOR :][: count * SECTOR], count * SECTOR + 1)


@pytest.mark.parametrize(("sector", "count"), [(0, 1), (63, 1), (5, 8), (0, 64), (64, 0)])
def test_a_write_changes_those_sectors_and_no_others(disk: Disk, sector: int, count: int) -> None:
    before, data = disk.contents, os.urandom(count * SECTOR)
    assert disk.request(OUT, sector, data) == (OK, b"", 1)
    assert disk.contents == before[: sector * SECTOR] + data + before[(sector + count) * SECTOR :]


@given(data=st.data(), count=st.integers(0, 6), write=st.booleans())
def test_the_driver_may_cut_its_buffers_anyhow(
    tmp_path_factory, data: st.DataObject, count: int, write: bool
) -> None:
    """The frames of a request are of any size and number, the header and the status included (2.7.4)."""
    cuts = st.lists(st.integers(0, 4096), max_size=12)
    sector = data.draw(st.integers(0, SECTORS - count), label="sector")
    out_cuts, in_cuts = (
        data.draw(cuts, label="cuts of what is read"),
        data.draw(cuts, label="of what is written"),
    )
    direct = data.draw(st.integers(0, len(out_cuts) + len(in_cuts) + 2), label="direct descriptors")
    with Disk(tmp_path_factory.mktemp("block") / "disk") as disk:
        before, payload = disk.contents, os.urandom(count * SECTOR)
        if write:
            answer = disk.request(OUT, sector, payload, out_cuts=out_cuts, in_cuts=in_cuts, direct=direct)
            assert answer == (OK, b"", 1)
            assert disk.contents == before[: sector * SECTOR] + payload + before[(sector + count) * SECTOR :]
        else:
            answer = disk.request(
                IN, sector, room=count * SECTOR, out_cuts=out_cuts, in_cuts=in_cuts, direct=direct
            )
            expected = before[sector * SECTOR : (sector + count) * SECTOR]
            assert answer == (OK, expected, count * SECTOR + 1)
            assert disk.contents == before


def test_every_byte_may_have_a_buffer_of_its_own(disk: Disk) -> None:
    answer = disk.request(GET_ID, room=20, out_cuts=range(1, 16), in_cuts=range(1, 21))
    assert answer.status == OK
    assert disk.request(IN, 3, room=SECTOR, out_cuts=range(1, 16), in_cuts=range(3, 240)) == (
        OK,
        disk.contents[3 * SECTOR : 4 * SECTOR],
        SECTOR + 1,
    )


@pytest.mark.parametrize(
    ("sector", "size"),
    [
        (64, SECTOR),
        (63, 2 * SECTOR),
        (65, 0),
        (0, 65 * SECTOR),
        (1 << 55, SECTOR),
        ((1 << 64) - 1, SECTOR),
        ((1 << 64) - 1, 2 * SECTOR),
        (0, SECTOR - 1),
        (0, SECTOR + 1),
        (0, 1),
    ],
)
def test_what_is_beyond_the_disk_or_no_whole_sectors_is_refused(disk: Disk, sector: int, size: int) -> None:
    before = disk.contents
    answer = disk.request(IN, sector, room=size)
    assert (answer.status, answer.data) == (IOERR, bytes([UNTOUCHED]) * size)
    assert disk.request(OUT, sector, os.urandom(size)).status == IOERR
    assert disk.contents == before
    assert disk.device.execute_fails == 2


def test_a_read_only_disk_takes_no_writes(tmp_path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SECTORS * SECTOR))
    path.chmod(0o400)
    with Disk(path, read_only=True) as disk:
        assert disk.registers.offered() & F_RO
        before = disk.contents
        assert disk.request(OUT, 0, bytes(SECTOR)).status == IOERR
        assert disk.contents == before
        assert disk.request(IN, 0, room=SECTOR).data == before[:SECTOR]


def test_a_rest_of_the_file_that_is_no_sector_is_out_of_reach(tmp_path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SECTOR + 511))
    with Disk(path) as disk:
        assert disk.device.size == SECTOR
        assert disk.request(IN, 1, room=SECTOR).status == IOERR


@pytest.mark.parametrize("size", [0, SECTOR - 1])
def test_a_file_smaller_than_a_sector_is_an_empty_disk(tmp_path, size: int) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(size))
    with Disk(path) as disk:
        assert disk.device.size == 0
        assert disk.request(IN, 0, room=SECTOR).status == IOERR
        assert disk.request(OUT, 0, bytes(SECTOR)).status == IOERR
    assert path.stat().st_size == size


@pytest.mark.parametrize("path", ["/", "/dev/null", "/dev/zero"])
def test_what_has_no_blocks_is_an_empty_disk(path: str) -> None:
    with Disk(Path(path), read_only=path == "/") as disk:
        assert disk.device.size == 0
        assert disk.request(IN, 0, room=SECTOR).status == IOERR
        assert disk.request(GET_ID, 0, room=20).status == OK


def test_a_file_that_shrank_is_an_error_and_nothing_worse(disk: Disk) -> None:
    os.truncate(disk.path, 10 * SECTOR)
    assert disk.request(IN, 9, room=2 * SECTOR).status == IOERR
    assert disk.request(IN, 9, room=SECTOR).status == OK


# -- other requests ------------------------------------------------------------------------------------------


def test_flush_is_offered_only_where_it_is_honoured(tmp_path) -> None:
    for writeback in (False, True):
        with Disk(tmp_path / "disk", writeback=writeback) as disk:
            assert bool(disk.registers.offered() & F_FLUSH) == writeback
            assert disk.request(FLUSH) == (OK, b"", 1)
            assert disk.device.counters()["flush_count"] == 1


def test_the_name_of_the_disk_fills_20_bytes_at_most(disk: Disk) -> None:
    status = os.stat(disk.path)
    name = f"{status.st_dev}{status.st_rdev}{status.st_ino}".encode()[:20].ljust(20, b"\0")
    assert disk.request(GET_ID, room=20) == (OK, name, 21)
    assert disk.request(GET_ID, room=7) == (OK, name[:7], 8)
    assert disk.request(GET_ID, room=30) == (OK, name + bytes([UNTOUCHED]) * 10, 21)
    assert disk.request(GET_ID, room=20, in_cuts=(1, 13)).data == name


@pytest.mark.parametrize("kind", [2, 3, DISCARD, 13, 0x80000000, 0xFFFFFFFF])
def test_an_unknown_request_is_unsupported(disk: Disk, kind: int) -> None:
    before = disk.contents
    assert disk.request(kind, 0, bytes(SECTOR), room=SECTOR) == (UNSUPP, bytes([UNTOUCHED]) * SECTOR, 1)
    assert disk.contents == before
    assert disk.device.invalid_requests == 1


def test_a_request_without_a_whole_header_gets_no_answer(disk: Disk) -> None:
    for readable in ([], [Buffer(ARENA, 15)], [Buffer(ARENA, 8), Buffer(ARENA, 7)]):
        answer = disk.run(readable, [Buffer(0x20000, 10, True)])
        assert answer == (UNTOUCHED, bytes([UNTOUCHED]) * 9, 0)
    assert disk.device.invalid_requests == 3
    assert not disk.registers[STATUS] & NEEDS_RESET


def test_a_request_without_room_for_a_status_is_not_carried_out(disk: Disk) -> None:
    before = disk.contents
    disk.memory.write(ARENA, struct.pack("<IIQ", OUT, 0, 0) + bytes(SECTOR))
    assert disk.run([Buffer(ARENA, 16 + SECTOR)], []).written == 0
    assert disk.run([Buffer(ARENA, 16 + SECTOR)], [Buffer(ARENA, 0, True)]).written == 0
    assert disk.contents == before
    assert disk.device.invalid_requests == 2


# -- many at once --------------------------------------------------------------------------------------------


def test_requests_are_served_in_the_order_in_which_they_were_made_available(disk: Disk) -> None:
    heads = submit_reads(disk, 80)
    disk.interrupts()
    disk.notify()
    disk.settle()
    assert [head for head, _ in disk.ring.reap()] == heads
    for i in range(80):
        assert disk.memory.read(HIGH + i * PAGE, SECTOR) == disk.contents[i % SECTORS * SECTOR :][:SECTOR]
    assert 1 <= disk.interrupts() < 10  # one, unless the machine was so busy that it took two turns
    assert (disk.device.counters()["read_count"], disk.device.read_bytes) == (80, 80 * SECTOR)


@pytest.mark.parametrize("event", [0, 1, 39, 40, 41, 79, 80, 81, 200, 65535])
def test_one_interrupt_for_a_batch_that_passes_the_used_event_and_none_otherwise(
    tmp_path, event: int
) -> None:
    with Disk(tmp_path / "disk", features=FEATURES | F_EVENT_IDX) as disk:
        submit_reads(disk, 40)
        disk.notify()
        disk.settle()
        assert disk.interrupts() == 1  # the first is always announced
        disk.acknowledge()
        disk.ring.reap()
        disk.ring.set_used_event(event)
        submit_reads(disk, 40)
        disk.notify()
        disk.settle()
        assert len(disk.ring.reap()) == 40
        assert disk.interrupts() == (1 if 40 <= event < 80 else 0)


def test_the_device_asks_to_be_notified_of_the_next_chain(tmp_path) -> None:
    with Disk(tmp_path / "disk", features=FEATURES | F_EVENT_IDX) as disk:
        for count in (1, 40, 3):
            submit_reads(disk, count)
            disk.notify()
            disk.settle()
            disk.ring.reap()
            assert disk.ring.avail_event == disk.ring.next_avail


def test_a_notification_without_a_request_is_counted(disk: Disk) -> None:
    disk.settle()
    before = disk.device.empty_events
    disk.notify()
    disk.settle()
    assert disk.device.empty_events == before + 1
    assert disk.interrupts() == 0


def test_the_time_that_requests_took_is_told(disk: Disk) -> None:
    assert disk.device.counters()["read_agg"] == {"min_us": 0, "max_us": 0, "sum_us": 0}
    for i in range(10):
        disk.request(IN, i, room=SECTOR)
        disk.request(OUT, i, bytes(SECTOR))
    for told in (disk.device.counters()["read_agg"], disk.device.counters()["write_agg"]):
        assert 0 <= told["min_us"] <= told["max_us"] <= told["sum_us"] <= 10 * told["max_us"]


# -- dirty pages ---------------------------------------------------------------------------------------------


def dirty_pages(memory: GuestMemory, region: int) -> set[int]:
    bits = int.from_bytes(memory.take_dirty(region), "little")
    return {page for page in range(bits.bit_length()) if bits >> page & 1}


def test_every_page_that_a_request_wrote_is_dirty(disk: Disk) -> None:
    disk.memory.write(ARENA, struct.pack("<IIQ", IN, 0, 0))
    disk.memory.track_dirty(True)
    writable = [Buffer(HIGH + 2 * PAGE + 100, PAGE, True), Buffer(HIGH + 9 * PAGE, 3 * PAGE + 1, True)]
    disk.ring.offer(disk.ring.add([Buffer(ARENA, 16), *writable]))
    disk.memory.take_dirty(0)
    disk.notify()
    disk.settle()
    assert disk.memory.read(HIGH + 12 * PAGE, 1) == bytes([OK])
    assert dirty_pages(disk.memory, 1) >= {2, 3, 9, 10, 11, 12}
    assert disk.ring.used // PAGE in dirty_pages(disk.memory, 0)


def test_a_read_that_came_in_parts_leaves_no_page_out(disk: Disk) -> None:
    os.truncate(disk.path, 2 * PAGE + 100)  # the disk says more: the read gets this much, and then nothing
    disk.memory.write(ARENA, struct.pack("<IIQ", IN, 0, 0))
    disk.memory.track_dirty(True)
    disk.ring.offer(disk.ring.add([Buffer(ARENA, 16), Buffer(HIGH, 4 * PAGE, True), Buffer(ARENA, 1, True)]))
    disk.notify()
    disk.settle()
    assert disk.memory.read(HIGH + 2 * PAGE, 100) == disk.contents[2 * PAGE :]
    assert dirty_pages(disk.memory, 1) >= {0, 1, 2}


# -- the backing file ----------------------------------------------------------------------------------------


def test_another_file_can_be_put_behind_the_disk(disk: Disk, tmp_path) -> None:
    other = tmp_path / "other"
    other.write_bytes(os.urandom(3 * SECTOR))
    before = disk.request(GET_ID, room=20).data
    disk.device.update(str(other))
    assert (disk.device.path, disk.device.size, disk.device.updates) == (str(other), 3 * SECTOR, 1)
    assert disk.request(IN, 2, room=SECTOR).data == other.read_bytes()[2 * SECTOR :]
    assert disk.request(IN, 3, room=SECTOR).status == IOERR
    assert disk.request(GET_ID, room=20).data != before


def test_an_update_that_fails_leaves_the_old_file(disk: Disk, tmp_path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"Error manipulating the backing file"):
            disk.device.update(str(path))
    assert disk.request(IN, 0, room=SECTOR).data == disk.contents[:SECTOR]
    assert (disk.device.updates, disk.device.update_fails) == (0, 2)
    assert disk.registers[driver.CONFIG_GENERATION] == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_updates_while_requests_are_served_never_show_a_mixture(disk: Disk, tmp_path) -> None:
    files = []
    for n in range(2):
        files.append(tmp_path / f"disk{n}")
        files[n].write_bytes(bytes([n + 1]) * SECTORS * SECTOR)
    disk.device.update(str(files[0]))
    for n in range(50):
        submit_reads(disk, 60)
        disk.notify()
        disk.device.update(str(files[n % 2]))
        disk.settle()
        disk.ring.reap()
        seen = [set(disk.memory.read(HIGH + i * PAGE, SECTOR)) for i in range(60)]
        assert all(found in ({1}, {2}) for found in seen)


@pytest.mark.parametrize("read_only", [False, True])
def test_what_cannot_be_opened_as_a_disk_is_refused(tmp_path, read_only: bool) -> None:
    pipe, listening = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(listening))
    with GuestMemory([(0, LOW)]) as memory:
        for path, words in ((pipe, "named pipe"), (listening, "No such device or address")):
            with pytest.raises(ConfigError, match=words):
                Block(memory, str(path), read_only=read_only)
        with pytest.raises(ConfigError, match="Is a directory"):
            Block(memory, str(tmp_path), read_only=False)
        with pytest.raises(ConfigError, match=os.strerror(errno.ENOENT)):
            Block(memory, str(tmp_path / "missing"), read_only=read_only)
        with pytest.raises(ConfigError, match="NUL byte"):
            Block(memory, "disk\0", read_only=read_only)
        with pytest.raises(ConfigError, match="surrogates"):
            Block(memory, "disk\ud800", read_only=read_only)


def test_the_ring_may_have_a_single_entry(tmp_path) -> None:
    with Disk(tmp_path / "disk") as disk:
        disk.ring = disk.begin(RING, 1, FEATURES)
        # One descriptor has one direction, and an indirect table may not be longer than the queue.
        disk.memory.write(ARENA, struct.pack("<IIQ", IN, 0, 0))
        disk.ring.offer(disk.ring.add([Buffer(ARENA, 16), Buffer(ARENA, 1, True)], direct=0, table=TABLE))
        disk.notify()
        disk.settle()
        assert disk.device.fault == "descriptor chain longer than the queue"


def test_the_driver_sees_a_whole_ring_of_requests_served(disk: Disk) -> None:
    """As many chains as the ring has entries, each an indirect one."""
    disk.memory.write(ARENA, struct.pack("<IIQ", IN, 0, 1))
    heads = []
    for i in range(256):
        chain = [Buffer(ARENA, 16), Buffer(HIGH + SECTOR * i, SECTOR, True), Buffer(ARENA + 16 + i, 1, True)]
        heads.append(disk.ring.add(chain, direct=0, table=0x80000 + 64 * i))
    disk.ring.offer(*heads)
    disk.notify()
    disk.settle()
    assert disk.ring.reap() == [(head, SECTOR + 1) for head in heads]
    assert disk.memory.read(HIGH, 256 * SECTOR) == disk.contents[SECTOR : 2 * SECTOR] * 256


def test_a_ring_serves_on_across_the_wrap_of_its_indices(tmp_path) -> None:
    with Disk(tmp_path / "disk") as disk:
        disk.ring = disk.begin(RING, 256)
        state = disk.device.save()
        disk.io.pause()
        queue = msgspec.structs.replace(state.queues[0], next_avail=65_400, next_used=65_400)
        disk.ring = Ring(disk.memory, RING, 256, start=65_400)
        disk.device.restore(msgspec.structs.replace(state, queues=(queue,)))
        disk.io.resume()
        for _ in range(5):
            heads = submit_reads(disk, 80)
            disk.notify()
            disk.settle()
            assert [head for head, _ in disk.ring.reap()] == heads
