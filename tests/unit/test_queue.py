"""The device's side of a split virtqueue, against a driver's side written from virtio 1.2, section 2.7."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.memory import GuestMemory
from crackle.virtio.queue import Virtqueue
from crackle.virtio.state import QueueState
from support.driver import INDIRECT, NEXT, NO_INTERRUPT, WRITE, Buffer, Ring, queue_for

RING, TABLES, DATA, SIZE = 0x1000, 0x8000, 0x10000, 0x40000
HIGH = 1 << 32
"""A second region, as on a machine with more than 3 GiB; its last byte is the last of guest memory."""


@pytest.fixture
def memory():
    with GuestMemory([(0, SIZE), (HIGH, SIZE)]) as memory:
        yield memory


def as_taken(buffers: list[Buffer]) -> list[tuple[int, int, bool]]:
    """What `take` shows of a chain: empty buffers carry nothing and are left out."""
    return [tuple(buffer) for buffer in buffers if buffer.size]


places = st.one_of(st.integers(DATA, SIZE - 0x1000), st.integers(HIGH, HIGH + SIZE - 0x1000))
pieces = st.tuples(places, st.integers(0, 0x1000))


@st.composite
def chains(draw: st.DrawFn, longest: int) -> list[Buffer]:
    """Readable buffers, then writable ones, as 2.7.4.2 asks."""
    found = draw(st.lists(pieces, min_size=1, max_size=longest))
    first_writable = draw(st.integers(0, len(found)))
    return [Buffer(gpa, size, i >= first_writable) for i, (gpa, size) in enumerate(found)]


# -- what a driver may do ------------------------------------------------------------------------------------


@given(data=st.data(), order=st.integers(0, 5), start=st.integers(0, 0xFFFF))
def test_chains_come_out_as_they_were_put_in(data: st.DataObject, order: int, start: int) -> None:
    size = 1 << order
    with GuestMemory([(0, SIZE), (HIGH, SIZE)]) as memory:
        ring = Ring(memory, RING, size, start)
        queue = queue_for(ring)
        used = []
        for _ in range(data.draw(st.integers(1, 4), label="batches")):
            waiting = []
            for buffers in data.draw(st.lists(chains(size), max_size=4), label="chains"):
                direct = data.draw(st.integers(0, len(buffers)), label="direct descriptors")
                if len(ring.free) < direct + (direct < len(buffers)):
                    break
                table = TABLES + 16 * size * len(waiting)
                waiting.append((ring.add(buffers, direct=direct, table=table), as_taken(buffers)))
            ring.offer(*(head for head, _ in waiting))
            taken = [queue.take() for _ in waiting]
            assert taken == waiting
            assert queue.take() is None
            # The device may finish them in any order.
            for head, _ in data.draw(st.permutations(waiting), label="order of use"):
                written = data.draw(st.integers(0, 2**32 - 1), label="bytes written")
                queue.give(head, written)
                used.append((head, written))
            assert ring.reap() == used
            used.clear()


@pytest.mark.parametrize("size", [1, 4, 256])
def test_the_indices_wrap_around_at_65536(memory: GuestMemory, size: int) -> None:
    ring = Ring(memory, RING, size, start=65_000)
    queue = queue_for(ring)
    for n in range(70_000 // size):
        heads = []
        for i in range(size):
            heads.append(ring.add([Buffer(DATA + n + i, 1 + i)]))
        ring.offer(*heads)
        for i, head in enumerate(heads):
            assert queue.take() == (head, [(DATA + n + i, 1 + i, False)])
            queue.give(head, 0)
        assert ring.reap() == [(head, 0) for head in heads]
    assert queue.take() is None


def test_a_chain_may_be_as_long_as_the_queue(memory: GuestMemory) -> None:
    for direct in (256, 0, 17):
        ring = Ring(memory, RING, 256)
        queue = queue_for(ring)
        buffers = [Buffer(DATA + i, 1, i >= 100) for i in range(256)]
        head = ring.add(buffers, direct=direct, table=TABLES)
        ring.offer(head)
        assert queue.take() == (head, as_taken(buffers))


def test_nothing_is_taken_before_it_is_offered(memory: GuestMemory) -> None:
    ring = Ring(memory, RING, 8)
    queue = queue_for(ring)
    head = ring.add([Buffer(DATA, 16)])
    assert queue.take() is None
    ring.offer(head)
    assert queue.take() is not None
    assert queue.take() is None


def test_the_saved_state_goes_on_where_it_stopped(memory: GuestMemory) -> None:
    ring = Ring(memory, RING, 8, start=65_534)
    queue = queue_for(ring)
    heads = [ring.add([Buffer(DATA + i, 16)]) for i in range(4)]
    ring.offer(*heads)
    assert [queue.take()[0] for _ in range(2)] == heads[:2]
    queue.give(heads[0], 1)
    queue.give(heads[1], 2)
    state = queue.save()
    assert (state.next_avail, state.next_used) == (0, 0)

    other = Virtqueue(memory, 256)
    other.restore(state, event_idx=False, indirect=False)
    assert other.save() == state
    assert [other.take()[0] for _ in range(2)] == heads[2:]
    other.give(heads[2], 3)
    assert ring.reap() == [(heads[0], 1), (heads[1], 2), (heads[2], 3)]


# -- interrupts (2.7.7, 2.7.10) ------------------------------------------------------------------------------


def test_without_event_index_the_driver_suppresses_interrupts_by_a_flag(memory: GuestMemory) -> None:
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring)
    wanted = []
    for flags in (0, NO_INTERRUPT, 0):
        ring.set_flags(flags)
        ring.set_used_event(ring.next_used + 100)  # means nothing here
        head = ring.add([Buffer(DATA, 1)])
        ring.offer(head)
        queue.take()
        wanted.append(queue.give(head, 0))
        ring.reap()
    assert wanted == [True, False, True]


@pytest.mark.parametrize("event_idx", [False, True])
def test_in_a_turn_only_a_driver_with_an_event_index_is_told_before_the_last(
    memory: GuestMemory, event_idx: bool
) -> None:
    ring = Ring(memory, RING, 8)
    queue = queue_for(ring, event_idx=event_idx)
    ring.set_used_event(0)
    wanted = []
    for last in (False, False, True, False, True):
        head = ring.add([Buffer(DATA, 1)])
        ring.offer(head)
        queue.take()
        wanted.append(queue.give(head, 0, last=last))
        # What was used is seen all the same.
        assert [used for used, _ in ring.reap()] == [head]
    assert wanted == ([True, False, False, False, False] if event_idx else [False, False, True, False, True])


@given(
    start=st.integers(0, 0xFFFF), events=st.lists(st.integers(-3, 3) | st.integers(0, 0xFFFF), max_size=20)
)
def test_with_event_index_an_interrupt_comes_when_the_used_index_passes_the_event(
    start: int, events: list[int]
) -> None:
    with GuestMemory([(0, SIZE)]) as memory:
        ring = Ring(memory, RING, 4, start)
        queue = queue_for(ring, event_idx=True)
        ring.set_flags(NO_INTERRUPT)  # to be ignored once event indices are negotiated
        first = True
        for distance in events:
            event = (ring.next_used + distance) & 0xFFFF
            ring.set_used_event(event)
            head = ring.add([Buffer(DATA, 1)])
            ring.offer(head)
            queue.take()
            # After a start the device cannot know what the driver saw last, and interrupts to be sure.
            assert queue.give(head, 0) == (first or event == ring.next_used)
            first = False
            ring.reap()


# -- what a driver may not do --------------------------------------------------------------------------------


def broken_by(queue: Virtqueue) -> str:
    """What breaks the queue; it must then stay broken."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        queue.take()
    with pytest.raises(ValueError, match=r"\w"):
        queue.take()
    return str(caught.value)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (SIZE, 1),
        (SIZE - 1, 2),
        (HIGH - 1, 1),
        (HIGH + SIZE - 1, 2),
        (HIGH, 0xFFFFFFFF),
        (0xFFFFFFFFFFFFFFFF, 1),
        (0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFFFFFFF000, 0x1001),
        (0xC0000000, 4),
    ],
)
def test_a_buffer_outside_guest_memory_breaks_the_queue(memory: GuestMemory, gpa: int, size: int) -> None:
    for direct in (2, 0):
        ring = Ring(memory, RING, 4)
        queue = queue_for(ring)
        ring.offer(ring.add([Buffer(DATA, 16), Buffer(gpa, size)], direct=direct, table=TABLES))
        assert broken_by(queue) == "descriptor points outside guest memory"


@pytest.mark.parametrize("gpa", [0, SIZE - 1, HIGH, HIGH + SIZE - 1])
def test_the_first_and_last_bytes_of_memory_are_inside(memory: GuestMemory, gpa: int) -> None:
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring)
    ring.offer(ring.add([Buffer(gpa, 1, True)]))
    assert queue.take()[1] == [(gpa, 1, True)]


@pytest.mark.parametrize("head", [4, 5, 0xFFFF])
def test_a_head_beyond_the_table_breaks_the_queue(memory: GuestMemory, head: int) -> None:
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring)
    ring.offer(head)
    assert broken_by(queue) == "descriptor index beyond its table"


@pytest.mark.parametrize("table", [-1, TABLES])
def test_a_next_beyond_the_table_breaks_the_queue(memory: GuestMemory, table: int) -> None:
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring)
    head = ring.add([Buffer(DATA, 1)] * 3, direct=3 if table < 0 else 0, table=table)
    ring.write_descriptor(head if table < 0 else 0, DATA, 1, NEXT, 4 if table < 0 else 3, table)
    ring.offer(head)
    assert broken_by(queue) == "descriptor index beyond its table"


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("table", [-1, TABLES])
def test_a_loop_ends_and_breaks_the_queue(memory: GuestMemory, table: int, size: int) -> None:
    ring = Ring(memory, RING, 8)
    queue = queue_for(ring)
    head = ring.add([Buffer(DATA, 1)] * 2, direct=2 if table < 0 else 0, table=table)
    first, second = ring.chains[head] if table < 0 else (0, 1)
    ring.write_descriptor(first, DATA, size, NEXT, second, table)
    ring.write_descriptor(second, DATA, size, NEXT, first, table)
    ring.offer(head)
    assert broken_by(queue) == "descriptor chain longer than the queue"


def test_an_indirect_chain_longer_than_the_queue_breaks_it(memory: GuestMemory) -> None:
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring)
    ring.offer(ring.add([Buffer(DATA, 1)] * 5, direct=0, table=TABLES))
    assert broken_by(queue) == "descriptor chain longer than the queue"


def test_a_readable_buffer_after_a_writable_one_breaks_the_queue(memory: GuestMemory) -> None:
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring)
    ring.offer(ring.add([Buffer(DATA, 1), Buffer(DATA, 1, True), Buffer(DATA, 1)]))
    assert broken_by(queue) == "device-readable descriptor after a device-writable one"


@pytest.mark.parametrize(
    ("gpa", "size", "flags", "why"),
    [
        (TABLES, 0, INDIRECT, "indirect table of a wrong size"),
        (TABLES, 15, INDIRECT, "indirect table of a wrong size"),
        (TABLES, 17, INDIRECT, "indirect table of a wrong size"),
        (TABLES, 16 * 257, INDIRECT, "indirect table of a wrong size"),
        (TABLES, 0xFFFFFFF0, INDIRECT, "indirect table of a wrong size"),
        (SIZE - 8, 16, INDIRECT, "indirect table outside guest memory"),
        (0xFFFFFFFFFFFFFFF8, 16, INDIRECT, "indirect table outside guest memory"),
        (TABLES, 16, INDIRECT | NEXT, "indirect descriptor where none is allowed"),
    ],
)
def test_a_bad_indirect_descriptor_breaks_the_queue(
    memory: GuestMemory, gpa: int, size: int, flags: int, why: str
) -> None:
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring)
    head = ring.add([Buffer(DATA, 1)])
    ring.write_descriptor(head, gpa, size, flags, 0)
    ring.offer(head)
    assert broken_by(queue) == why


def test_indirect_tables_do_not_nest(memory: GuestMemory) -> None:
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring)
    head = ring.add([Buffer(DATA, 1)], direct=0, table=TABLES)
    ring.write_descriptor(0, TABLES, 16, INDIRECT, 0, TABLES)
    ring.offer(head)
    assert broken_by(queue) == "indirect descriptor where none is allowed"


def test_indirect_tables_must_have_been_negotiated(memory: GuestMemory) -> None:
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring, indirect=False)
    ring.offer(ring.add([Buffer(DATA, 1)], direct=0, table=TABLES))
    assert broken_by(queue) == "indirect descriptor where none is allowed"


def test_the_write_flag_of_an_indirect_descriptor_is_ignored(memory: GuestMemory) -> None:
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring)
    head = ring.add([Buffer(DATA, 1)], direct=0, table=TABLES)
    ring.write_descriptor(head, TABLES, 16, INDIRECT | WRITE, 0)
    ring.offer(head)
    assert queue.take() == (head, [(DATA, 1, False)])


def test_more_chains_than_entries_break_the_queue(memory: GuestMemory) -> None:
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring)
    head = ring.add([Buffer(DATA, 1)])
    ring.offer(*[head] * 5)
    assert broken_by(queue) == "available index ran ahead by more than the queue's size"


def test_an_available_index_that_goes_back_breaks_the_queue(memory: GuestMemory) -> None:
    ring = Ring(memory, RING, 4, start=7)
    queue = queue_for(ring)
    ring.next_avail -= 1
    ring.offer()
    assert broken_by(queue) == "available index ran ahead by more than the queue's size"


# -- set-up --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 3, 257, 512])
def test_a_queue_has_a_power_of_two_of_entries(memory: GuestMemory, size: int) -> None:
    with pytest.raises(ValueError, match=f"power of two of entries up to 256, not {size}"):
        Virtqueue(memory, size)


GOOD = {"size": 16, "desc": 0x1000, "avail": 0x2000, "used": 0x3000}


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 3},
        {"desc": 0x1008},
        {"avail": 0x2001},
        {"used": 0x3002},
        {"desc": SIZE - 16 * 16 + 16},
        {"avail": SIZE - 6 - 2 * 16 + 2},
        {"used": SIZE - 4 - 8 * 16},
        {"desc": SIZE},
        {"avail": 0xFFFFFFFFFFFFFFF0},
        {"used": HIGH - 0x10},
    ],
)
def test_a_queue_that_is_misaligned_or_outside_memory_is_refused(
    memory: GuestMemory, wrong: dict[str, int]
) -> None:
    state = QueueState(**GOOD | wrong, ready=True, next_avail=0, next_used=0)
    queue = Virtqueue(memory, 64)
    with pytest.raises(ValueError, match="outside guest memory"):
        queue.restore(state, event_idx=False, indirect=False)
    with pytest.raises(ValueError, match="not enabled"):
        queue.take()
    with pytest.raises(ValueError, match="not enabled"):
        queue.give(0, 0)


@pytest.mark.parametrize(
    "edge", [{"desc": SIZE - 16 * 16}, {"avail": SIZE - 6 - 2 * 16}, {"used": HIGH + SIZE - 8 - 8 * 16}]
)
def test_a_queue_may_reach_to_the_end_of_memory(memory: GuestMemory, edge: dict[str, int]) -> None:
    queue = Virtqueue(memory, 64)
    state = QueueState(**GOOD | edge, ready=True, next_avail=0, next_used=0)
    queue.restore(state, event_idx=True, indirect=False)
    assert queue.ready
    assert queue.take() is None
    queue.give(0, 0)


def test_a_saved_queue_must_not_be_larger_than_this_one(memory: GuestMemory) -> None:
    state = QueueState(**GOOD, ready=True, next_avail=0, next_used=0)
    with pytest.raises(ValueError, match="saved queue of 16 entries, this device has 8"):
        Virtqueue(memory, 8).restore(state, event_idx=False, indirect=False)


def test_a_size_the_guest_wrote_and_never_enabled_can_be_saved_and_restored(memory: GuestMemory) -> None:
    for size in (0, 3, 0xFFFF):
        state = QueueState(**GOOD | {"size": size}, ready=False, next_avail=0, next_used=0)
        queue = Virtqueue(memory, 64)
        queue.restore(state, event_idx=False, indirect=False)
        assert queue.save() == state


def test_a_queue_over_closed_memory_is_not_touched() -> None:
    memory = GuestMemory([(0, SIZE)])
    ring = Ring(memory, RING, 4)
    queue = queue_for(ring)
    memory.close()
    with pytest.raises(ValueError, match="not enabled"):
        queue.take()
    with pytest.raises(ValueError, match="not enabled"):
        queue.give(0, 0)


def test_what_the_device_writes_into_the_ring_is_noted_as_dirty(memory: GuestMemory) -> None:
    ring = Ring(memory, HIGH + 0x3000 - 16 * 4 - 16, 4)  # the used ring starts a page
    assert ring.used == HIGH + 0x3000
    queue = queue_for(ring)
    head = ring.add([Buffer(DATA, 1)])
    ring.offer(head)
    memory.track_dirty(True)
    queue.take()
    assert not any(memory.take_dirty(0) + memory.take_dirty(1))
    queue.give(head, 0)
    assert int.from_bytes(memory.take_dirty(1), "little") == 1 << 3
    assert not any(memory.take_dirty(0))
