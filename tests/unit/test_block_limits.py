"""virtio-block under a rate limiter: what waits, where it waits, and that it goes on."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crackle.schema.rate_limiter import RateLimiter, TokenBucket
from support.disk import (
    ARENA,
    FEATURES,
    FLUSH,
    GET_ID,
    IN,
    OK,
    OUT,
    RING,
    SECTOR,
    Disk,
    submit_reads,
)
from support.driver import NO_NOTIFY, Buffer, Ring, through_a_file

HOUR_MS = 3_600_000


@pytest.fixture(scope="module", params=["Sync", "Async"], autouse=True)
def engine(request: pytest.FixtureRequest) -> str:
    Disk.engine = request.param
    return request.param


def limited(path: Path, bandwidth: int | None = None, ops: int | None = None, **options: Any) -> Disk:
    """A disk with buckets of so many tokens for the next hour."""
    buckets = [None if size is None else TokenBucket(size, HOUR_MS) for size in (bandwidth, ops)]
    return Disk(path, limiter=RateLimiter(*buckets), **options)


def answered(disk: Disk) -> int:
    disk.notify()
    disk.settle()
    return len(disk.ring.reap())


def wait_answers(disk: Disk, count: int, seconds: float = 30.0) -> None:
    """Until so many more requests are answered: some by the limiter's timer, which no test can hurry."""
    end = time.monotonic() + seconds
    found = 0
    while found < count:
        assert time.monotonic() < end, f"{found} of {count} requests answered"
        found += len(disk.ring.reap())
        time.sleep(0.001)
    assert found == count


def test_requests_beyond_the_limit_stay_in_the_queue(tmp_path: Path) -> None:
    with limited(tmp_path / "disk", ops=5) as disk:
        heads = submit_reads(disk, 12)
        assert answered(disk) == 5
        assert disk.device.queues[0].save().next_avail == 5
        # Once, and once more where some of the five were only done in a later turn, which was refused the sixth again.
        refused = disk.device.throttled_events
        assert 1 <= refused <= 6
        assert disk.device.limiter.events == 0
        # Nothing is even looked at until the timer fires.
        assert answered(disk) == 0
        assert disk.device.throttled_events == refused + 1
        assert len(heads) - disk.device.counters()["read_count"] == 7


def test_a_driver_without_an_event_index_is_told_when_notifications_are_no_use(tmp_path: Path) -> None:
    with limited(tmp_path / "disk", ops=5) as disk:
        assert disk.ring.used_flags == 0
        submit_reads(disk, 5)
        assert answered(disk) == 5
        assert disk.ring.used_flags == 0, "whoever has nothing to do wants to be told"
        submit_reads(disk, 3)
        assert answered(disk) == 0
        assert disk.ring.used_flags == NO_NOTIFY, "what waits for the limiter's timer need not be announced"
        disk.device.update_limiter(0, RateLimiter(ops=TokenBucket(0, 0)))
        disk.settle()
        assert len(disk.ring.reap()) == 3
        assert disk.ring.used_flags == 0


def test_bytes_of_reads_and_writes_count_and_no_others(tmp_path: Path) -> None:
    with limited(tmp_path / "disk", bandwidth=4 * SECTOR, writeback=True) as disk:
        for _ in range(5):
            assert disk.request(FLUSH).status == OK
            assert disk.request(GET_ID, room=20).status == OK
        assert disk.request(IN, 0, room=2 * SECTOR).status == OK
        assert disk.request(OUT, 0, bytes(2 * SECTOR)).status == OK
        disk.memory.write(ARENA, struct.pack("<IIQ", IN, 0, 0))
        disk.ring.offer(disk.ring.add([Buffer(ARENA, 16), Buffer(ARENA + 1024, SECTOR + 1, True)]))
        assert answered(disk) == 0


def test_every_kind_of_request_is_an_operation(tmp_path: Path) -> None:
    with limited(tmp_path / "disk", ops=4) as disk:
        assert disk.request(FLUSH).status == OK
        assert disk.request(GET_ID, room=20).status == OK
        assert disk.request(IN, 1 << 50, room=SECTOR).status != OK
        assert disk.request(0x1234, 0, room=1).status != OK
        submit_reads(disk, 1)
        assert answered(disk) == 0


def test_a_limit_that_is_lifted_lets_everything_go(tmp_path: Path) -> None:
    with limited(tmp_path / "disk", ops=1, bandwidth=SECTOR) as disk:
        submit_reads(disk, 60)
        assert answered(disk) == 1
        disk.device.update_limiter(0, RateLimiter(ops=TokenBucket(0, 0)))
        disk.device.update_limiter(0, RateLimiter(bandwidth=TokenBucket(0, 0)))
        wait_answers(disk, 59)
        assert disk.device.counters()["rate_limiter_event_count"] >= 1


def test_a_limit_can_be_set_while_the_guest_runs(tmp_path: Path) -> None:
    with Disk(tmp_path / "disk") as disk:
        submit_reads(disk, 60)
        assert answered(disk) == 60
        disk.device.update_limiter(0, RateLimiter(ops=TokenBucket(7, HOUR_MS)))
        submit_reads(disk, 60)
        assert answered(disk) == 7
        disk.device.update_limiter(0, RateLimiter(ops=TokenBucket(7, 0)))
        assert answered(disk) == 53


def test_what_waits_goes_on_when_the_bucket_fills(tmp_path: Path) -> None:
    limiter = RateLimiter(ops=TokenBucket(10, 50, one_time_burst=5))
    with Disk(tmp_path / "disk", limiter=limiter) as disk:
        begin = time.monotonic()
        submit_reads(disk, 80)
        disk.notify()
        wait_answers(disk, 80)
        # 15 at once, and 65 at 200 a second.
        assert time.monotonic() - begin >= 0.3
        assert disk.device.counters()["read_count"] == 80
        assert disk.device.limiter.events >= 3


def test_what_waits_is_saved_and_goes_on_elsewhere(tmp_path: Path) -> None:
    with limited(tmp_path / "disk", ops=5) as disk:
        submit_reads(disk, 8)
        assert answered(disk) == 5
        disk.io.pause()
        disk.device.drain()
        state = disk.transport.save()
        image = disk.memory.read(0, 1 << 20), disk.memory.read(1 << 32, 1 << 20)
        disk.io.resume()
    with limited(tmp_path / "disk", ops=100) as other:
        other.io.pause()
        other.memory.write(0, image[0])
        other.memory.write(1 << 32, image[1])
        other.transport.restore(through_a_file(state))
        other.io.resume()
        other.settle()
        assert other.device.counters()["read_count"] == 0
        assert other.device.limiter.save().ops.size == 5
        other.device.update_limiter(0, RateLimiter(ops=TokenBucket(100, HOUR_MS)))
        ring = Ring.__new__(Ring)
        ring.__dict__.update(disk.ring.__dict__, memory=other.memory)
        other.ring = ring
        wait_answers(other, 3)


def test_a_state_without_a_limiter_is_no_disks(tmp_path: Path) -> None:
    with Disk(tmp_path / "disk") as disk:
        disk.io.pause()
        state = disk.transport.save()
        with pytest.raises(ValueError, match="what was saved is not of a Block"):
            disk.device.restore(msgspec.structs.replace(state.device, own=None))
        disk.io.resume()


def test_a_reset_forgets_what_waited(tmp_path: Path) -> None:
    with limited(tmp_path / "disk", ops=5) as disk:
        submit_reads(disk, 8)
        assert answered(disk) == 5
        disk.ring = disk.begin(RING, 256, FEATURES)
        disk.device.update_limiter(0, RateLimiter(ops=TokenBucket(0, 0)))
        assert disk.request(IN, 0, room=SECTOR).data == disk.contents[:SECTOR]
        assert disk.device.counters()["read_count"] == 6
        assert os.path.getsize(disk.path) == len(disk.contents)
