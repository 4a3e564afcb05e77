"""The I/O thread: it serves what is ready, stands still when told, and sleeps otherwise."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest

from crackle.devices.serial import Serial
from crackle.errors import StateError
from crackle.kvm.bus import Bus
from crackle.memory import GuestMemory
from crackle.runtime.iothread import IoThread
from crackle.virtio.block.device import Block
from support.driver import F_VERSION_1, Bench, Buffer, Ring

FLUSH = (4).to_bytes(16, "little")
HEADER, STATUS, RING = 0x4000, 0x5000, 0x1000


@pytest.fixture
def bench(tmp_path) -> Iterator[Bench]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    with Bench(Block(GuestMemory([(0, 1 << 20)]), str(path))) as bench:
        bench.memory.write(HEADER, FLUSH)
        yield bench


def submit(ring: Ring) -> None:
    ring.offer(ring.add([Buffer(HEADER, 16), Buffer(STATUS, 1, True)]))


def threads() -> int:
    """How many I/O threads there are."""
    count = 0
    for task in glob("/proc/self/task/*"):
        with contextlib.suppress(OSError):  # it ended while we looked
            count += Path(task, "comm").read_text() == "io\n"
    return count


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_pause_serves_what_was_submitted_and_then_nothing_more(bench: Bench) -> None:
    ring = bench.begin(RING, 64)
    for _ in range(20):
        submit(ring)
        bench.notify()
        bench.io.pause()
        assert len(ring.reap()) == 1
        submit(ring)
        bench.notify()
        assert ring.reap() == []
        bench.io.resume()
        bench.settle()
        assert len(ring.reap()) == 1


def test_a_pause_right_after_a_resume_serves_what_came_between(bench: Bench) -> None:
    ring = bench.begin(RING, 64)
    for _ in range(2000):
        bench.io.pause()
        submit(ring)
        bench.notify()
        # The thread has probably not woken up when it is told to rest again.
        bench.io.resume()
        bench.io.pause()
        assert len(ring.reap()) == 1
        bench.io.resume()


def test_pause_and_resume_are_idempotent(bench: Bench) -> None:
    ring = bench.begin(RING, 64)
    bench.io.resume()
    bench.io.pause()
    bench.io.pause()
    bench.io.resume()
    bench.io.resume()
    submit(ring)
    bench.notify()
    bench.settle()
    assert len(ring.reap()) == 1


def test_an_idle_thread_does_not_wake_up(bench: Bench) -> None:
    ring = bench.begin(RING, 64)
    bench.settle()
    assert len(ring.reap()) == 0
    bench.io.pause()
    before = bench.io.wakeups
    # At rest, and nothing is ready: neither time nor the rings can wake it.
    submit(ring)
    assert not threading.Event().wait(0.2)
    assert bench.io.wakeups == before
    bench.io.resume()
    bench.settle()
    awake = bench.io.wakeups
    assert not threading.Event().wait(0.2)
    assert bench.io.wakeups <= awake + 1  # the resume itself
    assert ring.reap() == []


def test_stop_ends_the_thread_wherever_it_is(bench: Bench) -> None:
    before = threads()
    bench.io.pause()
    bench.io.stop()
    assert threads() == before - 1
    bench.io.stop()
    bench.io.pause()
    bench.io.resume()
    bench.io.close()
    bench.io.close()


def test_threads_stopping_it_at_once_all_wait_for_its_end() -> None:
    for _ in range(50):
        io = IoThread()
        before = threads()
        io.start()
        stopping = [threading.Thread(target=io.close) for _ in range(4)]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        assert threads() == before


def test_it_starts_once_and_not_after_close() -> None:
    io = IoThread()
    io.pause()
    io.resume()
    io.start()
    with pytest.raises(StateError, match="started already"):
        io.start()
    io.close()
    with pytest.raises(StateError, match="started already"):
        io.start()
    unused = IoThread()
    unused.close()
    with pytest.raises(StateError, match="is closed"):
        unused.start()


def test_a_forgotten_thread_ends_and_its_devices_give_their_descriptors_back(tmp_path) -> None:
    """A serial console and its I/O thread refer to each other: only the collector finds them."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    gc.collect()
    before = threads(), fds()
    reading, writing = os.pipe()
    for _ in range(5):
        block = Block(GuestMemory([(0, 1 << 20)]), str(path))
        io = IoThread()
        block.attach(io)
        Serial(reading).attach(Bus("pio"), 0x3F8, io)
        io.start()
        os.write(writing, b"typed while everything goes away")
        os.eventfd_write(block.notify_fds[0], 1)
        del block, io
        gc.collect()
    os.close(reading)
    os.close(writing)
    assert (threads(), fds()) == before


def test_many_queues_are_served_by_one_thread(tmp_path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    io, benches = IoThread(), []
    try:
        for _ in range(40):  # more than the thread asks for at once
            bench = Bench(Block(GuestMemory([(0, 1 << 20)]), str(path)), io)
            benches.append((bench, bench.begin(RING, 4, F_VERSION_1)))
            bench.memory.write(HEADER, FLUSH)
        io.start()
        io.pause()
        for bench, ring in benches:
            submit(ring)
            bench.notify()
        io.resume()
        io.pause()
        assert [len(ring.reap()) for _, ring in benches] == [1] * 40
    finally:
        io.close()
        for bench, _ in benches:
            bench.close()


def test_a_step_serves_what_is_ready_on_the_calling_thread(tmp_path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    io = IoThread()
    before = threads()
    with Bench(Block(GuestMemory([(0, 1 << 20)]), str(path)), io) as bench:
        bench.memory.write(HEADER, FLUSH)
        ring = bench.begin(RING, 64)
        while io.step():
            pass
        submit(ring)
        bench.notify()
        assert ring.reap() == []
        assert io.step() == 1
        assert len(ring.reap()) == 1
        assert io.step() == 0
        assert threads() == before
        io.start()
        with pytest.raises(StateError):
            io.step()
