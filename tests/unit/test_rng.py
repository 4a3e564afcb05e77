"""virtio-rng as a driver finds it: bytes, limits, chains that are none, and saved state (virtio 1.2, section 5.4)."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest

from crackle.memory import GuestMemory
from crackle.schema.rate_limiter import RateLimiter, TokenBucket
from crackle.virtio.rng.device import Rng, RngState
from support.driver import (
    DEVICE_ID,
    F_EVENT_IDX,
    F_VERSION_1,
    NEEDS_RESET,
    STATUS,
    Bench,
    Buffer,
    Ring,
    through_a_file,
)

RINGS, DATA, SIZE = 0x0, 0x10000, 1 << 20
MOST = 64 << 10
HOUR_MS = 3_600_000


class Guest(Bench):
    """A driver of the device, initialised."""

    def __init__(self, limiter: RateLimiter | None = None, features: int = F_VERSION_1) -> None:
        super().__init__(Rng(GuestMemory(((0, SIZE),)), limiter=limiter))
        self.ring = self.begin(RINGS, 256, features)

    @property
    def rng(self) -> Rng:
        assert isinstance(self.device, Rng)
        return self.device

    def ask(self, *chains: list[Buffer]) -> list[int]:
        """How many bytes each of the chains that are answered got."""
        self.ring.offer(*[self.ring.add(chain) for chain in chains])
        return self.answers()

    def answers(self) -> list[int]:
        self.notify()
        self.settle()
        return [written for _, written in self.ring.reap()]

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.rng.counters()
        return found


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest() as guest:
        yield guest


def buffer(size: int, at: int = DATA) -> list[Buffer]:
    return [Buffer(at, size, True)]


def test_it_is_an_entropy_source_with_one_queue(guest: Guest) -> None:
    assert guest.registers[DEVICE_ID] == 4
    assert len(guest.device.queues) == 1


@pytest.mark.parametrize("features", [F_VERSION_1, F_VERSION_1 | F_EVENT_IDX])
def test_a_buffer_is_filled_with_what_nobody_foresees(features: int) -> None:
    with Guest(features=features) as guest:
        assert guest.ask(buffer(4096)) == [4096]
        first = guest.memory.read(DATA, 4096)
        assert guest.memory.read(DATA + 4096, 4096) == bytes(4096)
        assert len(set(first)) > 200
        assert guest.interrupts() == 1
        guest.acknowledge()
        assert guest.ask(buffer(4096)) == [4096]
        assert guest.memory.read(DATA, 4096) != first
        assert guest.counters()["entropy_bytes"] == 8192
        assert guest.counters()["entropy_event_count"] == 2


def test_a_scattered_buffer_is_filled_in_all_its_parts(guest: Guest) -> None:
    parts = [Buffer(DATA + i * 1000, size, True) for i, size in enumerate((1, 0, 300, 17))]
    assert guest.ask(parts) == [318]
    for part in parts:
        end = part.gpa + part.size
        assert guest.memory.read(end, 100) == bytes(100)
        assert not part.size or any(guest.memory.read(part.gpa, part.size)) or part.size == 1


def test_many_requests_are_answered_in_one_turn(guest: Guest) -> None:
    assert guest.ask(*[buffer(32, DATA + i * 32) for i in range(200)]) == [32] * 200
    blocks = {guest.memory.read(DATA + i * 32, 32) for i in range(200)}
    assert len(blocks) == 200
    assert guest.interrupts() == 1


def test_a_request_gets_64_kib_at_most(guest: Guest) -> None:
    assert guest.ask(buffer(MOST + 1), buffer(SIZE - DATA)) == [MOST, MOST]
    assert guest.memory.read(DATA + MOST, 4096) == bytes(4096)
    # The same page again and again, which makes a chain larger than memory.
    assert guest.ask([Buffer(DATA, SIZE - DATA, True)] * 100) == [MOST]


def test_what_is_written_is_noted(guest: Guest) -> None:
    guest.memory.track_dirty(True)
    guest.ask([Buffer(DATA, 10, True), Buffer(DATA + 3 * 4096, 5000, True)])
    bits = int.from_bytes(guest.memory.take_dirty(0), "little")
    page = DATA >> 12
    written = {page + i for i in range(8) if bits >> page + i & 1}
    assert written == {page, page + 3, page + 4}


def test_an_empty_chain_is_answered_with_nothing(guest: Guest) -> None:
    assert guest.ask([Buffer(DATA, 0, True)], buffer(8)) == [0, 8]
    assert guest.counters()["entropy_event_count"] == 2
    assert guest.counters()["entropy_event_fails"] == 0


@pytest.mark.parametrize(
    "chain", [[Buffer(DATA, 64)], [Buffer(DATA, 64), Buffer(DATA + 64, 64, True)]], ids=["only", "first"]
)
def test_a_chain_that_is_to_be_read_gets_nothing_and_is_counted(guest: Guest, chain: list[Buffer]) -> None:
    assert guest.ask(chain, buffer(8)) == [0, 8]
    assert guest.memory.read(DATA + 64, 64) == bytes(64)
    assert guest.counters()["entropy_event_fails"] == 1


@pytest.mark.parametrize("what", ["outside", "looped", "ahead"])
def test_a_chain_that_is_none_stops_the_device_until_its_reset(guest: Guest, what: str) -> None:
    if what == "outside":
        guest.ask(buffer(8, SIZE - 4))
    elif what == "looped":
        head = guest.ring.add([Buffer(DATA, 8, True), Buffer(DATA, 8, True)])
        last = guest.ring.chains[head][-1]
        guest.ring.write_descriptor(last, DATA, 8, 3, head)
        guest.ring.offer(head)
        guest.answers()
    else:
        guest.ring.next_avail = 1000
        guest.ask(buffer(8))
    assert guest.registers[STATUS] & NEEDS_RESET
    assert guest.counters()["entropy_event_fails"] == 1
    guest.ring = guest.begin(RINGS, 256)
    assert guest.ask(buffer(8)) == [8]


def limited(bandwidth: TokenBucket | None = None, ops: TokenBucket | None = None) -> Guest:
    return Guest(RateLimiter(bandwidth, ops))


def wait_answers(ring: Ring, count: int) -> list[int]:
    """Bytes of so many more requests: some are answered by the limiter's timer, which no test can hurry."""
    done: list[int] = []
    until = time.monotonic() + 30
    while len(done) < count:
        assert time.monotonic() < until
        done += [written for _, written in ring.reap()]
        time.sleep(0.001)
    return done


def test_requests_beyond_the_limit_wait_in_the_queue() -> None:
    with limited(ops=TokenBucket(3, HOUR_MS)) as guest:
        assert guest.ask(*[buffer(8)] * 5) == [8, 8, 8]
        assert guest.rng.queues[0].save().next_avail == 3
        assert guest.answers() == []
        assert guest.counters()["entropy_rate_limiter_throttled"] == 2
        guest.rng.update_limiter(0, RateLimiter(ops=TokenBucket(0, 0)))
        assert wait_answers(guest.ring, 2) == [8, 8]
        assert guest.counters()["rate_limiter_event_count"] == 1


def test_bytes_that_are_given_count_and_those_that_are_not_do_not() -> None:
    with limited(TokenBucket(MOST + 100, HOUR_MS)) as guest:
        assert guest.ask(buffer(SIZE - DATA), [Buffer(DATA, 90)], buffer(100), buffer(1)) == [MOST, 0, 100]


def test_the_limiter_s_timer_serves_what_waits() -> None:
    with limited(TokenBucket(1000, 20)) as guest:
        heads = [guest.ring.add(buffer(1000)) for _ in range(4)]
        guest.ring.offer(*heads)
        guest.notify()
        assert wait_answers(guest.ring, 4) == [1000] * 4
        assert guest.counters()["rate_limiter_event_count"] >= 3


def test_a_restored_device_has_what_the_limiter_had_and_answers_what_waited() -> None:
    with limited(ops=TokenBucket(3, HOUR_MS)) as guest:
        assert guest.ask(*[buffer(8)] * 4) == [8, 8, 8]
        guest.io.pause()
        state, content = through_a_file(guest.transport.save()), guest.memory.read(0, SIZE)
        own = guest.rng.save_own()
        assert isinstance(own, RngState)
        assert own.limiter.ops is not None
        assert own.limiter.ops.level == 0
    with Guest(RateLimiter(ops=TokenBucket(3, HOUR_MS))) as other:
        other.io.pause()
        ring = Ring(other.memory, RINGS, 256)
        other.memory.write(0, content)
        other.transport.restore(state)
        other.io.resume()
        ring.next_used, ring.chains = 3, {head: [head] for head in range(256)}
        other.settle()
        assert ring.reap() == []
        other.rng.update_limiter(0, RateLimiter(ops=TokenBucket(0, 0)))
        assert wait_answers(ring, 1) == [8]


def test_the_state_of_another_device_is_refused(guest: Guest) -> None:
    state = msgspec.structs.replace(through_a_file(guest.transport.save()).device, own={"mac": None})
    with pytest.raises(ValueError, match="not of a Rng"):
        guest.rng.restore(state)
