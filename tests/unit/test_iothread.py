"""The I/O thread: it serves what is ready, stands still when told, and sleeps otherwise."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest

from crackle.devices.serial import Serial
from crackle.errors import StateError
from crackle.kvm.bus import Bus
from crackle.memory import GuestMemory
from crackle.runtime.iothread import IoThread, Watch
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


def test_nothing_is_served_while_it_is_paused_and_all_of_it_afterwards(bench: Bench) -> None:
    ring = bench.begin(RING, 64)
    for _ in range(20):
        bench.io.pause()
        submit(ring)
        bench.notify()
        assert ring.reap() == []
        bench.io.resume()
        bench.settle()
        assert len(ring.reap()) == 1


def test_what_was_submitted_before_a_pause_is_served_once_whenever_that_is(bench: Bench) -> None:
    ring = bench.begin(RING, 64)
    for _ in range(2000):
        submit(ring)
        bench.notify()
        # The thread has probably not woken up when it is told to rest, and again to rest.
        bench.io.pause()
        bench.io.resume()
        bench.io.pause()
        bench.io.resume()
        bench.settle()
        assert len(ring.reap()) == 1


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
    bench.io.settle()  # it has its name now
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
        io.settle()
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


class Pipe:
    """A descriptor that a loop watches, readable from the start, and what its handler does."""

    def __init__(self, io: IoThread, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls
        self.victim: Pipe | None = None
        self.fd = os.eventfd(1, os.EFD_NONBLOCK)
        self.watch = io.watch(self.fd, self.ready)

    def ready(self) -> None:
        self.calls.append(self.name)
        if self.victim is not None:
            self.victim.remove()

    def remove(self) -> None:
        self.watch.remove()
        with contextlib.suppress(OSError):
            os.close(self.fd)


@pytest.mark.parametrize("victim", ["itself", "the other"])
def test_a_handler_removes_a_source_of_the_same_batch_which_is_not_called_any_more(victim: str) -> None:
    io, calls = IoThread("python"), list[str]()
    pipes = [Pipe(io, name, calls) for name in ("a", "b")]
    for pipe, other in zip(pipes, pipes[::-1], strict=True):
        pipe.victim = pipe if victim == "itself" else other
    # Both are ready, and found by the same look.
    assert io.step() == (2 if victim == "itself" else 1)
    assert calls == (["a", "b"] if victim == "itself" else calls[:1])
    io.step()
    # Who has removed itself is never called again; of the two that removed each other, the first goes on.
    assert len(calls) == 2
    assert len(set(calls)) == (2 if victim == "itself" else 1)
    for pipe in pipes:
        pipe.remove()
    io.close()


def test_a_source_removed_by_another_thread_is_not_running_afterwards_and_its_owner_goes() -> None:
    io, entered, go_on = IoThread("python"), threading.Event(), threading.Event()

    class Slow:
        done = False

        def __call__(self) -> None:
            entered.set()
            go_on.wait(20)
            self.done = True

    def remove(watch: Watch, slow: Slow) -> None:
        watch.remove()
        seen.append(slow.done)

    seen: list[bool] = []
    slow = Slow()
    gone = weakref.ref(slow)
    fd = os.eventfd(1, os.EFD_NONBLOCK)
    watch = io.watch(fd, slow)
    io.start()
    assert entered.wait(20)
    remover = threading.Thread(target=remove, args=(watch, slow))
    remover.start()
    assert seen == []  # the handler runs
    go_on.set()
    remover.join(20)
    assert seen == [True]
    del watch, slow, remover
    gc.collect()
    assert gone() is None
    os.close(fd)
    io.close()


def test_sources_come_and_go_by_the_thousand_while_they_are_ready() -> None:
    io, calls = IoThread("python"), list[str]()
    io.start()
    before = fds()
    for _ in range(1000):
        pipes = [Pipe(io, "x", calls) for _ in range(4)]
        for pipe in pipes:
            pipe.remove()
        count = len(calls)
    io.settle()
    assert len(calls) == count
    assert fds() == before
    io.close()


@pytest.mark.parametrize("state", ["new", "paused", "closed"])
def test_a_source_is_removed_whatever_the_thread_does(state: str) -> None:
    io, calls = IoThread("python"), list[str]()
    pipe = Pipe(io, "x", calls)
    if state != "new":
        io.start()
        io.pause()
    if state == "closed":
        io.close()
    calls.clear()
    pipe.remove()
    if state == "paused":
        io.resume()
        io.settle()
    assert calls == []
    io.close()
