"""Devices written in Python: what the driver sees of them, and what their author can rely on."""

from __future__ import annotations

import gc
import struct
import threading
from collections.abc import Iterator

import msgspec
import pytest
from tests.support.driver import (
    CONFIG,
    DEVICE_ID,
    DRIVER_OK,
    F_INDIRECT,
    F_VERSION_1,
    NEEDS_RESET,
    STATUS,
    Bench,
    Buffer,
    Ring,
    through_a_file,
)

import crackle
from crackle.errors import ConfigError, StateError
from crackle.memory import GuestMemory
from crackle.virtio.custom.device import PythonDevice, Request, RequestQueue

RING, DATA = 0x1000, 0x8000


class Upper(crackle.VirtioDevice):
    """Answers what it is sent, in capitals."""

    device_id = 42
    queue_sizes = (16, 8)
    features = 1 << 3
    config = b"0123456789abcdef"
    writable_config = 4

    def __init__(self) -> None:
        self.told: list[object] = []
        self.threads: set[int] = set()

    def handle_queue(self, index: int, queue: RequestQueue) -> None:
        self.threads.add(threading.get_native_id())
        for request in queue:
            data = request.read()
            self.told.append((index, data))
            if data == b"bang":
                raise RuntimeError("an author's mistake")
            request.write(data.upper())
            request.complete()

    def activated(self, features: int) -> None:
        self.told.append(("activated", features))

    def reset(self) -> None:
        self.told.append("reset")

    def config_written(self) -> None:
        self.told.append(("config", self.read_config()))

    def save(self) -> bytes:
        return repr(len(self.told)).encode()

    def restore(self, state: bytes) -> None:
        self.told = [None] * int(state)


class Keeper(Upper):
    """Keeps every request."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Request] = []

    def handle_queue(self, index: int, queue: RequestQueue) -> None:
        assert index == 0
        self.kept += queue


def bench(device: crackle.VirtioDevice) -> Bench:
    return Bench(PythonDevice(GuestMemory([(0, 1 << 20)]), device))


@pytest.fixture
def upper() -> Iterator[tuple[Upper, Bench]]:
    device = Upper()
    with bench(device) as host:
        yield device, host


@pytest.fixture
def keeper() -> Iterator[tuple[Keeper, Bench]]:
    device = Keeper()
    with bench(device) as host:
        yield device, host


def send(host: Bench, ring: Ring, data: bytes, room: int = 64, at: int = DATA) -> int:
    host.memory.write(at, data)
    head = ring.add([Buffer(at, len(data)), Buffer(at + 0x1000, room, True)])
    ring.offer(head)
    host.notify()
    host.settle()
    return head


def test_the_driver_sees_what_the_class_says(upper: tuple[Upper, Bench]) -> None:
    _, host = upper
    assert host.registers[DEVICE_ID] == 42
    assert host.registers.offered() & 0xFF == 1 << 3
    assert struct.pack("<I", host.registers[CONFIG + 4]) == b"4567"
    assert [queue.max_size for queue in host.device.queues] == [16, 8]


def test_a_request_is_read_answered_and_the_driver_interrupted(upper: tuple[Upper, Bench]) -> None:
    device, host = upper
    ring = host.begin(RING, 16, F_VERSION_1 | 1 << 3)
    head = send(host, ring, b"hello")
    assert ring.reap() == [(head, 5)]
    assert host.memory.read(DATA + 0x1000, 6) == b"HELLO\0"
    assert host.interrupts() == 1
    assert device.told == ["reset", ("activated", F_VERSION_1 | 1 << 3), (0, b"hello")]
    assert threading.get_native_id() not in device.threads


def test_buffers_are_one_stream_however_the_driver_cuts_them(upper: tuple[Upper, Bench]) -> None:
    _, host = upper
    ring = host.begin(RING, 16, F_VERSION_1 | F_INDIRECT)
    host.memory.write(DATA, b"abcdefgh")
    pieces = [Buffer(DATA, 3), Buffer(DATA + 3, 1), Buffer(DATA + 4, 4)]
    room = [Buffer(DATA + 0x100, 5, True), Buffer(DATA + 0x200, 1, True), Buffer(DATA + 0x300, 9, True)]
    ring.offer(ring.add(pieces + room, direct=1, table=0x7000))
    host.notify()
    host.settle()
    assert [host.memory.read(DATA + at, n) for at, n in ((0x100, 5), (0x200, 1), (0x300, 3))] == [
        b"ABCDE",
        b"F",
        b"GH\0",
    ]


def test_an_exception_breaks_the_device_until_the_driver_resets_it(
    upper: tuple[Upper, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host = upper
    seen: list[object] = []
    monkeypatch.setattr("threading.excepthook", lambda event: seen.append(event.exc_value))
    send(host, host.begin(RING, 16), b"bang")
    assert host.registers[STATUS] & NEEDS_RESET
    assert [str(error) for error in seen] == ["an author's mistake"]
    assert host.device.counters()["failures"] == 1
    ring = host.begin(RING, 16)
    send(host, ring, b"again")
    assert host.memory.read(DATA + 0x1000, 5) == b"AGAIN"


def test_a_guest_that_breaks_a_device_again_and_again_does_not_fill_the_log(
    upper: tuple[Upper, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host = upper
    seen: list[object] = []
    monkeypatch.setattr("threading.excepthook", lambda event: seen.append(event.exc_value))
    for _ in range(100):
        send(host, host.begin(RING, 16), b"bang")
    assert host.device.counters()["failures"] == 100
    # Ten at once, and two a second from then on.
    assert 10 <= len(seen) < 100


def test_an_answer_that_does_not_fit_is_the_authors_error(keeper: tuple[Keeper, Bench]) -> None:
    device, host = keeper
    send(host, host.begin(RING, 16), b"x", room=4)
    (request,) = device.kept
    assert (request.readable, request.writable) == (1, 4)
    request.write(b"abc")
    with pytest.raises(ValueError, match="2 bytes do not fit into the 1 that are left"):
        request.write(b"de")
    request.write(memoryview(b"d"))
    request.complete()
    assert host.memory.read(DATA + 0x1000, 4) == b"abcd"


def test_requests_can_be_kept_and_completed_in_any_order_from_any_thread(
    keeper: tuple[Keeper, Bench],
) -> None:
    device, host = keeper
    ring = host.begin(RING, 16)
    heads = [send(host, ring, bytes([65 + n]), at=DATA + n) for n in range(5)]
    assert ring.reap() == []
    assert [request.read(100) for request in device.kept] == [b"A", b"B", b"C", b"D", b"E"]
    for request in reversed(device.kept):
        request.complete()
    assert ring.reap() == [(head, 0) for head in reversed(heads)]
    with pytest.raises(StateError, match="completed already"):
        device.kept[0].complete()


def test_a_request_from_before_a_reset_can_only_be_dropped(keeper: tuple[Keeper, Bench]) -> None:
    device, host = keeper
    send(host, host.begin(RING, 16), b"old")
    ring = host.begin(RING, 16)
    (request,) = device.kept
    host.memory.write(DATA + 0x1000, bytes(8))
    for attempt in (request.read, lambda: request.write(b"late"), request.complete):
        with pytest.raises(StateError, match="reset the device"):
            attempt()
    assert host.memory.read(DATA + 0x1000, 8) == bytes(8)
    assert ring.reap() == []


def test_a_driver_that_offers_more_than_its_queue_holds_breaks_it(keeper: tuple[Keeper, Bench]) -> None:
    device, host = keeper
    ring = host.begin(RING, 4)
    head = ring.add([Buffer(DATA, 8)])
    for _ in range(3):
        ring.offer(head, head)
        host.notify()
        host.settle()
    assert host.registers[STATUS] & NEEDS_RESET
    assert len(device.kept) == 4


def test_the_driver_writes_only_what_it_may_of_the_configuration(upper: tuple[Upper, Bench]) -> None:
    device, host = upper
    host.begin(RING, 16)
    host.settle()
    host.registers[CONFIG] = 0x44434241
    host.registers[CONFIG + 4] = 0x44434241
    host.settle()
    assert device.told[-1] == ("config", b"ABCD456789abcdef")
    assert host.device.cfg_fails == 1


def test_a_device_changes_its_configuration_and_the_driver_hears_of_it(upper: tuple[Upper, Bench]) -> None:
    device, host = upper
    host.begin(RING, 16)
    host.settle()
    host.interrupts()
    generation = host.device.config_generation
    device.write_config(8, b"!?")
    assert host.device.config_generation == generation + 1
    assert host.interrupts() == 1
    assert struct.pack("<I", host.registers[CONFIG + 8]) == b"!?ab"
    with pytest.raises(ValueError, match="2 bytes at 15 are not inside 16"):
        device.write_config(15, b"!?")


def test_a_saved_device_goes_on_where_it_was(upper: tuple[Upper, Bench]) -> None:
    _, host = upper
    ring = host.begin(RING, 16)
    send(host, ring, b"one")
    state = host.transport.save()
    other = Upper()
    with bench(other) as second:
        second.memory.write(0, host.memory.read(0, 1 << 20))
        second.transport.restore(through_a_file(state))
        assert len(other.told) == 3
        ring.memory = second.memory
        ring.reap()
        send(second, ring, b"two")
        assert other.told[-1] == (0, b"two")
        assert second.registers[STATUS] & DRIVER_OK


def test_a_feature_without_one_that_it_needs_is_refused_before_the_driver_uses_it() -> None:
    device = Upper()
    device.features = 0b1111
    device.feature_needs = {3: (0, 1), 2: (3,)}
    with bench(device) as host:
        for accepted, kept in (
            (0b1000, False),
            (0b1001, True),
            (0b1010, True),
            (0b0110, False),
            (0b1110, True),
        ):
            assert host.registers.negotiate(F_VERSION_1 | accepted) is kept, bin(accepted)
            host.registers.drive()
            assert bool(host.registers[STATUS] & DRIVER_OK) is kept
            assert not host.registers[STATUS] & NEEDS_RESET


def test_requests_that_were_kept_come_again_in_their_order_after_a_restore(
    keeper: tuple[Keeper, Bench],
) -> None:
    device, host = keeper
    ring = host.begin(RING, 16)
    heads = [send(host, ring, bytes([65 + n]), at=DATA + n) for n in range(6)]
    for n in (4, 1):
        device.kept[n].write(b"done")
        device.kept[n].complete()
    device.kept[2].write(b"half")
    state = host.transport.save()
    assert state.device.queues[0].in_flight == tuple(heads[n] for n in (0, 2, 3, 5))

    other = Keeper()
    with bench(other) as second:
        second.memory.write(0, host.memory.read(0, 1 << 20))
        ring.memory = second.memory
        second.transport.restore(through_a_file(state))
        # Saved again before the device has looked at them, they are still there.
        assert second.transport.save().device == state.device
        last = ring.add([Buffer(DATA + 6, 1)])
        ring.offer(last)
        second.settle()
        assert [request.read() for request in other.kept] == [b"A", b"C", b"D", b"F", bytes(1)]
        assert second.transport.save().device.queues[0].in_flight == (
            *(heads[n] for n in (0, 2, 3, 5)),
            last,
        )
        for request in other.kept[::-1]:
            request.complete()
        assert [head for head, _ in ring.reap()] == [
            heads[4],
            heads[1],
            last,
            *(heads[n] for n in (5, 3, 2, 0)),
        ]
        assert second.transport.save().device.queues[0].in_flight == ()


def test_what_a_devices_own_thread_does_during_a_pause_comes_when_the_machine_goes_on(
    keeper: tuple[Keeper, Bench],
) -> None:
    device, host = keeper
    ring = host.begin(RING, 16)
    heads = [send(host, ring, bytes([65 + n]), at=DATA + n * 0x100) for n in range(3)]
    host.memory.write(DATA + 0x1000, bytes(0x300))
    device.kept[1].write(b"be")
    host.interrupts()
    host.device.drain()
    before, paused = host.memory.read(0, 1 << 20), host.transport.save()
    assert paused.device.queues[0].in_flight == tuple(heads)

    def work() -> None:
        for data in (b"fo", b"re"):
            device.kept[1].write(data)
        device.kept[1].complete()
        device.write_config(0, b"news")
        assert device.queue(0).take() is None

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with pytest.raises(StateError, match="completed already"):
        device.kept[1].complete()
    assert device.read_config().startswith(b"news")
    assert host.memory.read(0, 1 << 20) == before
    assert (host.transport.save(), host.interrupts()) == (paused, 0)

    host.device.kick()
    assert host.memory.read(DATA + 0x1100, 8) == b"before".ljust(8, b"\0")
    assert ring.reap() == [(heads[1], 6)]
    assert host.interrupts() > 0
    device.kept[0].complete()
    assert ring.reap() == [(heads[0], 0)]
    state = host.transport.save().device
    assert state.queues[0].in_flight == (heads[2],)
    assert state.config_generation == paused.device.config_generation + 1


def test_what_was_postponed_ends_with_the_device(keeper: tuple[Keeper, Bench]) -> None:
    device, host = keeper
    send(host, host.begin(RING, 16), b"one")
    (request,) = device.kept
    host.device.drain()
    request.write(b"late")
    host.transport.device.close()
    host.device.kick()
    assert host.memory.read(DATA + 0x1000, 4) == bytes(4)


def test_a_reset_ends_what_was_kept(keeper: tuple[Keeper, Bench]) -> None:
    _, host = keeper
    send(host, host.begin(RING, 16), b"old")
    host.begin(RING, 16)
    assert host.transport.save().device.queues[0].in_flight == ()


@pytest.mark.parametrize("in_flight", [tuple(range(17)), (65535,)])
def test_a_state_with_impossible_chains_in_flight_is_refused_or_breaks_the_queue(
    keeper: tuple[Keeper, Bench], in_flight: tuple[int, ...]
) -> None:
    device, host = keeper
    host.begin(RING, 16)
    state = host.device.save()
    queue = msgspec.structs.replace(state.queues[0], in_flight=in_flight)
    changed = msgspec.structs.replace(state, queues=(queue, state.queues[1]))
    if len(in_flight) > 16:
        with pytest.raises(ValueError, match="17 saved chains in flight, the queue has 16 entries"):
            host.device.restore(changed)
        return
    host.device.restore(changed)
    host.settle()
    assert host.registers[STATUS] & NEEDS_RESET
    assert device.kept == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("device_id", 0, "device_id is 0"),
        ("queue_sizes", (), "names 0 queues; give 1 to 8"),
        ("queue_sizes", (3,), "power of two"),
        ("config", bytes(257), "257 bytes of configuration space"),
        ("writable_config", 17, "17 of them writable"),
        ("features", -1, "cannot be a device"),
        ("feature_needs", {64: (1,)}, "cannot be a device"),
        ("feature_needs", {1: (-1,)}, "cannot be a device"),
        ("feature_needs", dict.fromkeys(range(17), (0,)), "17 features need others, at most 16"),
    ],
)
def test_a_class_that_describes_no_device_is_refused(field: str, value: object, message: str) -> None:
    device = Upper()
    setattr(device, field, value)
    with pytest.raises(ConfigError, match=message):
        PythonDevice(GuestMemory([(0, 1 << 20)]), device)


def test_a_device_is_one_machines_and_free_again_when_that_is_gone() -> None:
    device = Upper()
    with pytest.raises(StateError, match="belongs to no running microVM"):
        device.queue(0)
    with bench(device):
        with pytest.raises(ConfigError, match="belongs to another microVM"):
            bench(device)
        assert device.queue(1).index == 1
    with bench(device) as again:
        send(again, again.begin(RING, 16), b"x")
    assert device.told[-1] == (0, b"x")


def test_nothing_is_left_when_a_device_is_dropped() -> None:
    with bench(Keeper()) as host:
        send(host, host.begin(RING, 16), b"x")
    del host
    gc.collect()
    assert not [found for found in gc.get_objects() if isinstance(found, Keeper)]
