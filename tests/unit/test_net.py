"""virtio-net as a driver finds it: frames, however cut, between its rings and a real TAP (virtio 1.2, 5.1)."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.schema.rate_limiter import RateLimiter, TokenBucket
from crackle.telemetry.names import SECTIONS
from crackle.virtio.net.device import Net
from crackle.virtio.net.tap import open_tap
from support import driver
from support.card import (
    ARENA,
    F_MRG,
    HEADER,
    HIGH,
    LOW,
    MAC,
    MAX_FRAME,
    MERGE,
    PEER,
    RX,
    TX,
    Card,
    Link,
    frame,
    tcp_segment,
    udp_segment,
)
from support.driver import F_EVENT_IDX, F_INDIRECT, F_VERSION_1, NEEDS_RESET, STATUS, Buffer, through_a_file
from support.network import Namespace

PAGE = 4096
F_CSUM, F_GUEST_CSUM, F_MTU, F_MAC = 1 << 0, 1 << 1, 1 << 3, 1 << 5
F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_UFO = 1 << 7, 1 << 8, 1 << 10
F_HOST_TSO4, F_HOST_TSO6, F_HOST_UFO = 1 << 11, 1 << 12, 1 << 14
F_GUEST_USO4, F_GUEST_USO6, F_HOST_USO = 1 << 54, 1 << 55, 1 << 56
PLAIN = F_VERSION_1 | F_INDIRECT
LARGE = MERGE | F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_HOST_TSO4


@pytest.fixture
def link(namespace: Namespace) -> Iterator[Link]:
    with Link(namespace, mac=MAC) as link:
        yield link


# -- transmitting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [14, 60, 61, 1000, 1514])
@pytest.mark.parametrize("cuts", [(HEADER,), (), (1, 2, 3, 12, 13, 26), (700,)])
def test_what_the_guest_sends_leaves_by_the_tap(link: Link, size: int, cuts: Sequence[int]) -> None:
    sent = frame(size)
    link.send(bytes(HEADER) + sent, cuts=cuts)
    assert link.host.frames(1) == [sent]
    assert len(link.tx.reap()) == 1
    counted = link.device.counters()
    assert (counted["tx_packets_count"], counted["tx_bytes_count"], counted["tx_count"]) == (
        1,
        HEADER + size,
        1,
    )
    assert counted["tx_spoofed_mac_count"] == counted["tap_write_fails"] == counted["tx_fails"] == 0


def test_frames_leave_in_the_order_of_the_ring(link: Link) -> None:
    sent = [frame(60 + n, seed=n + 1) for n in range(100)]
    link.send(*(bytes(HEADER) + one for one in sent))
    assert link.host.frames(100) == sent
    assert [written for _, written in link.tx.reap()] == [0] * 100


def test_indirect_chains_are_sent_too(link: Link) -> None:
    sent = frame(1500)
    link.send(bytes(HEADER) + sent, cuts=range(0, 1500, 7), direct=0)
    assert link.host.frames(1) == [sent]


def test_a_large_segment_passes_whole_with_its_header(namespace: Namespace) -> None:
    with Link(namespace, LARGE, headers=True) as link:
        header, sent = tcp_segment(60_000)
        link.send(header + sent, cuts=range(0, 60_000, 4000))
        [got] = link.host.frames(1)
        assert got[10:] == sent  # an AF_PACKET header has no num_buffers
        assert got[:10] == header[:10]


@pytest.mark.parametrize("size", [0, 1, HEADER - 1])
def test_a_frame_without_a_whole_header_is_malformed(link: Link, size: int) -> None:
    link.send(bytes(size) or b"x", cuts=())
    link.send(bytes(HEADER) + frame(60))
    assert link.host.frames(1) == [frame(60)]
    assert link.device.tx_malformed == 1
    assert len(link.tx.reap()) == 2
    assert not link.registers[STATUS] & NEEDS_RESET


def test_a_frame_larger_than_any_is_malformed(link: Link) -> None:
    link.send(bytes(MAX_FRAME + 1), cuts=range(0, MAX_FRAME, 4096))
    assert link.device.tx_malformed == 1
    assert link.host.nothing_more()


def test_what_the_tap_refuses_is_counted_and_used(link: Link) -> None:
    link.send(bytes(HEADER) + frame(13))
    assert link.device.tap_write_fails == 1
    assert len(link.tx.reap()) == 1


def test_a_chain_to_write_into_is_no_frame(link: Link) -> None:
    link.tx.offer(link.tx.add([Buffer(ARENA, 100), Buffer(ARENA + PAGE, 100, True)]))
    link.notify(TX)
    link.settle()
    assert (link.device.tx_fails, link.tx.reap()[0][1]) == (1, 0)


def test_frames_from_another_address_are_counted_and_forwarded(link: Link) -> None:
    other = frame(60, source=PEER)
    link.send(bytes(HEADER) + frame(60), bytes(HEADER) + other)
    assert link.host.frames(2) == [frame(60), other]
    assert link.device.counters()["tx_spoofed_mac_count"] == 1


def test_frames_from_another_address_are_dropped_where_that_is_asked_for(namespace: Namespace) -> None:
    with Link(namespace, mac=MAC, drop_spoofed=True) as link:
        other, mine = frame(600, source=PEER), frame(700)
        for cuts in ((HEADER,), (), (3, 15, 20, 30, 50, 52, 53, 54, 55), tuple(range(1, 100))):
            link.send(bytes(HEADER) + other, bytes(HEADER) + mine, cuts=cuts)
            assert link.host.frames(1) == [mine]
        assert link.host.nothing_more()
        assert link.device.tx_spoofed == 4
        assert len(link.tx.reap()) == 8


def test_the_time_that_writes_take_is_told(link: Link) -> None:
    link.send(*(bytes(HEADER) + frame(1500, seed=n + 1) for n in range(50)))
    told = link.device.counters()["tap_write_agg"]
    assert 0 <= told["min_us"] <= told["max_us"] <= told["sum_us"]


def test_one_interrupt_at_most_for_each_group_of_frames(namespace: Namespace) -> None:
    with Link(namespace, MERGE | F_EVENT_IDX) as link:
        link.tx.set_used_event(0xFFFF)
        link.send(bytes(HEADER) + frame(60))
        link.interrupts()
        link.acknowledge()
        link.send(*(bytes(HEADER) + frame(60) for _ in range(64)))
        assert len(link.tx.reap()) == 65
        assert link.interrupts() == 0
        link.tx.set_used_event(70)
        link.send(*(bytes(HEADER) + frame(60) for _ in range(64)))
        assert link.interrupts() == 1


# -- receiving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [PLAIN, MERGE, LARGE])
def test_what_the_host_sends_arrives(namespace: Namespace, features: int) -> None:
    with Link(namespace, features, mac=MAC) as link:
        link.provide(*([[MAX_FRAME]] * 8))
        sent = [frame(size, source=PEER, target=MAC) for size in (14, 60, 1000, 1514)]
        for one in sent:
            link.host.send(one)
        got = link.wait_received(4)
        assert [data for _, data in got] == sent
        assert all(header == bytes(10) + b"\1\0" for header, _ in got)
        counted = link.device.counters()
        assert counted["rx_packets_count"] == 4
        assert counted["rx_bytes_count"] == sum(map(len, sent)) + 4 * HEADER


def test_a_frame_fills_as_many_merged_buffers_as_it_needs(namespace: Namespace) -> None:
    with Link(namespace, MERGE, mtu=9000) as link:
        link.provide(*([[200, 60], [13], [300]] * 60))
        sent = [frame(size, seed=n + 1) for n, size in enumerate((9014, 60, 3000, 9014))]
        for one in sent:
            link.host.send(one)
        assert [data for _, data in link.wait_received(4)] == sent


def test_a_large_segment_arrives_whole(namespace: Namespace) -> None:
    with Link(namespace, LARGE, headers=True) as link:
        link.provide(*([[1526]] * 200))
        header, sent = tcp_segment(60_000)
        link.host.send(header[:10] + sent)
        [(got, data)] = link.wait_received(1)
        assert data == sent
        assert (got[1], got[4:6]) == (header[1], header[4:6])  # the kind of segment and its size
        assert struct.unpack_from("<H", got, 10)[0] == -(-(HEADER + len(sent)) // 1526)


def test_large_segments_of_udp_pass_both_ways_where_the_host_has_them(namespace: Namespace) -> None:
    with Link(namespace, LARGE, headers=True) as link:
        uso = F_GUEST_USO4 | F_GUEST_USO6 | F_HOST_USO
        if not link.registers.offered() & uso:
            pytest.skip("the host's kernel does not segment UDP")
        link.begin_both(LARGE | uso)
        link.provide(*([[1526]] * 200))
        header, sent = udp_segment(40_000)
        link.host.send(header[:10] + sent)
        assert [data for _, data in link.wait_received(1)] == [sent]
        link.send(header + sent, cuts=(HEADER,))
        assert link.host.frames(1) == [header[:10] + sent]


def test_a_driver_without_large_frames_gets_them_in_parts(namespace: Namespace) -> None:
    with Link(namespace, MERGE | F_GUEST_CSUM, headers=True) as link:
        link.provide(*([[1526]] * 200))
        header, sent = tcp_segment(14_000)
        link.host.send(header[:10] + sent)
        got = link.wait_received(10)
        assert sum(len(data) - 54 for _, data in got) == 14_000
        assert all(len(data) <= 1514 and header[1] == 0 for header, data in got)


def test_frames_wait_in_the_tap_until_the_driver_has_room(link: Link) -> None:
    sent = [frame(500, seed=n + 1) for n in range(20)]
    for one in sent:
        link.host.send(one)
    link.settle()
    assert link.received() == []
    assert link.device.no_rx_buffer > 0
    link.provide(*([[4096]] * 30))
    assert [data for _, data in link.wait_received(20)] == sent


def test_the_thread_sleeps_while_the_driver_has_no_room(link: Link) -> None:
    for n in range(20):
        link.host.send(frame(500, seed=n + 1))
    link.settle()
    before = link.io.wakeups
    time.sleep(0.2)
    assert link.io.wakeups <= before + 1


def test_room_for_large_frames_is_waited_for_where_they_may_come(namespace: Namespace) -> None:
    with Link(namespace, LARGE) as link:
        link.provide([MAX_FRAME - 1])
        link.host.send(frame(60))
        link.settle()
        assert link.received() == []
        link.provide([HEADER])
        assert [data for _, data in link.wait_received(1)] == [frame(60)]


def test_a_frame_is_never_passed_on_cut_short(namespace: Namespace) -> None:
    with Link(namespace, MERGE, mtu=9000) as link:
        link.provide([1600])
        link.host.send(frame(9014))
        link.host.send(frame(60))
        link.settle()
        link.provide([4000], [4000], [4000])
        assert [data for _, data in link.wait_received(1)] == [frame(60)]
        assert link.device.rx_fails == 1
        link.provide(*([[4000]] * 3))
        link.host.send(frame(9014))
        assert [data for _, data in link.wait_received(1)] == [frame(9014)]


def test_buffers_that_are_too_small_come_back_empty(namespace: Namespace) -> None:
    with Link(namespace, PLAIN) as link:
        link.provide([1525], [2000])
        link.host.send(frame(60))
        link.settle()
        (_, first), (_, second) = link.rx.reap()
        assert (first, second) == (0, HEADER + 60)
        assert link.device.rx_fails == 1


def test_a_chain_to_read_from_is_no_receive_buffer(link: Link) -> None:
    link.rx.offer(link.rx.add([Buffer(ARENA, 100), Buffer(ARENA + PAGE, 4096, True)]))
    link.provide([4096])
    link.host.send(frame(60))
    link.settle()
    assert [written for _, written in link.rx.reap()] == [0, HEADER + 60]


def test_buffers_that_are_no_use_do_not_disturb_the_frames_around_them(link: Link) -> None:
    link.provide([4000], [HEADER - 1], [4000], [4], [4000], [4000])
    for n in range(3):
        link.host.send(frame(1000, seed=n + 1))
        link.settle()
    used = link.rx.reap()
    assert [written for _, written in used] == [HEADER + 1000, 0, HEADER + 1000, 0, HEADER + 1000]
    assert link.device.rx_fails >= 2


def test_an_interface_whose_other_end_is_gone_is_quiet() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with Card(ours.detach()) as card:
        card.provide(*([[4096]] * 20))
        theirs.close()
        card.send(bytes(HEADER) + frame(60))
        assert card.device.tap_write_fails == 1
        before = card.io.wakeups
        time.sleep(0.05)
        assert card.io.wakeups <= before + 1


def test_pages_that_a_frame_was_written_to_are_dirty(namespace: Namespace) -> None:
    with Link(namespace, MERGE) as link:
        heads = [
            link.rx.add([Buffer(HIGH + 2 * PAGE + 4000, 200, True)]),
            link.rx.add([Buffer(HIGH + 7 * PAGE, 4 * PAGE, True)]),
        ]
        link.memory.track_dirty(True)
        link.rx.offer(*heads)
        link.memory.take_dirty(1)
        link.notify(RX)
        link.host.send(frame(1400))
        link.settle()
        bits = int.from_bytes(link.memory.take_dirty(1), "little")
        assert {page for page in range(bits.bit_length()) if bits >> page & 1} == {2, 3, 7}


@given(data=st.data())
def test_frames_survive_any_cut_in_both_directions(data: st.DataObject) -> None:
    sizes = st.lists(st.integers(14, 9014), min_size=1, max_size=6)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.settimeout(10)
    with closing(theirs), Card(ours.detach(), MERGE) as card:
        cuts = data.draw(st.lists(st.integers(0, 9026), max_size=30), label="cuts")
        sent = [bytes(HEADER) + frame(size, seed=n + 1) for n, size in enumerate(data.draw(sizes))]
        for one in sent:
            card.send(one, cuts=cuts, direct=data.draw(st.sampled_from([None, 0, 1])))
            assert theirs.recv(1 << 17) == one
        chain = st.lists(st.integers(12, 5000), min_size=1, max_size=5)
        chains = data.draw(st.lists(chain, min_size=20, max_size=30), label="receive chains")
        card.provide(*chains, *([[9100]] * 8), direct=0)
        coming = [bytes(HEADER) + frame(size, seed=n + 1) for n, size in enumerate(data.draw(sizes))]
        for one in coming:
            theirs.send(one)
        got = card.wait_received(len(coming))
        assert [body for _, body in got] == [one[HEADER:] for one in coming]


def test_interrupts_are_as_the_driver_asks(namespace: Namespace) -> None:
    with Link(namespace, MERGE | F_EVENT_IDX) as link:
        link.provide(*([[4096]] * 100))
        link.host.send(frame(60))
        link.wait_received(1)
        link.settle()
        assert link.interrupts() == 1  # the first is always announced
        link.acknowledge()
        link.rx.set_used_event(10)
        for _ in range(9):
            link.host.send(frame(60))
        link.wait_received(9)
        link.settle()
        assert link.interrupts() == 0
        link.host.send(frame(60))
        link.wait_received(1)
        link.settle()
        assert link.interrupts() == 1


def test_every_metric_of_the_section_is_told(link: Link) -> None:
    assert sorted(link.device.counters()) == sorted(SECTIONS["net"].split())


# -- negotiation ---------------------------------------------------------------------------------------------


def test_what_is_offered(namespace: Namespace) -> None:
    always = F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_UFO | F_HOST_TSO4 | F_HOST_TSO6
    always |= F_HOST_UFO | F_MRG | F_INDIRECT | F_EVENT_IDX | F_VERSION_1
    uso = F_GUEST_USO4 | F_GUEST_USO6 | F_HOST_USO
    with Link(namespace) as link:
        assert link.registers.offered() & ~uso == always
        assert link.registers.offered() & uso in (0, uso)
        assert link.registers[driver.DEVICE_ID] == 1
    with Link(namespace, mac=MAC) as link:
        assert link.registers.offered() & ~uso == always | F_MAC
        assert b"".join(link.bus.read(link.ADDRESS + 0x100 + n, 1).to_bytes(1) for n in range(6)) == MAC


def test_the_mtu_is_told(namespace: Namespace) -> None:
    name = namespace.tap()
    with namespace.entered():
        fd = open_tap(name)
    with Card(fd, mtu=9000) as card:
        assert card.registers.offered() & F_MTU
        assert card.bus.read(card.ADDRESS + 0x100 + 10, 2) == 9000


def test_the_configuration_space_cannot_be_written(link: Link) -> None:
    link.bus.write(link.ADDRESS + 0x100, 1, 0xFF)
    assert link.bus.read(link.ADDRESS + 0x100, 1) == MAC[0]
    assert link.device.counters()["cfg_fails"] == 1


def test_segments_without_checksums_are_refused_before_the_driver_uses_them(link: Link) -> None:
    # 5.1.3.1, and 3.1.1: the driver reads FEATURES_OK back.
    offered = link.registers.offered()
    for need, features in (
        (F_GUEST_CSUM, (F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_UFO, F_GUEST_USO4, F_GUEST_USO6)),
        (F_CSUM, (F_HOST_TSO4, F_HOST_TSO6, F_HOST_UFO, F_HOST_USO)),
    ):
        for feature in features:
            if feature & offered:
                assert not link.registers.negotiate(PLAIN | feature | (F_CSUM | F_GUEST_CSUM) ^ need)
                assert link.registers.negotiate(PLAIN | feature | need)
    assert link.device.counters()["activate_fails"] == 0
    link.begin_both(MERGE)
    link.send(bytes(HEADER) + frame(60))
    assert link.host.frames(1) == [frame(60)]


def test_a_reset_gives_up_what_was_taken_ahead(link: Link) -> None:
    link.provide(*([[4096]] * 50))
    link.settle()
    link.begin_both(MERGE)
    link.provide([4096])
    link.host.send(frame(60))
    assert [data for _, data in link.wait_received(1)] == [frame(60)]


# -- hostile rings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [RX, TX])
def test_a_broken_ring_asks_for_a_reset_and_the_other_driver_life_is_a_new_one(
    link: Link, queue: int
) -> None:
    ring = (link.rx, link.tx)[queue]
    ring.write_descriptor(0, LOW - 10, 100, 2 if queue == RX else 0, 0)
    ring.chains[0] = [0]
    ring.offer(0)
    link.notify(queue)
    link.host.send(frame(60))
    link.settle()
    assert link.registers[STATUS] & NEEDS_RESET
    assert link.device.fault == "descriptor points outside guest memory"
    link.begin_both(MERGE)
    link.provide([4096], [4096])
    link.host.send(frame(61))
    assert [data for _, data in link.wait_received(1)][-1:] in ([frame(60)], [frame(61)])
    link.send(bytes(HEADER) + frame(62))
    assert link.host.frames(1) == [frame(62)]


def test_receive_chains_of_single_bytes_do_no_harm(link: Link) -> None:
    for _ in range(10):
        link.provide([1] * 250, direct=0)
    link.host.send(frame(300))
    link.settle()
    before = link.io.wakeups
    time.sleep(0.05)
    assert link.io.wakeups <= before + 1
    assert not link.registers[STATUS] & NEEDS_RESET
    assert link.received() == []


def test_a_frame_that_ends_where_the_buffers_do(link: Link) -> None:
    link.provide([HEADER + 60], [1600])
    link.host.send(frame(60))
    assert [data for _, data in link.wait_received(1)] == [frame(60)]
    link.settle()
    assert link.rx.used_idx == 1


# -- limits --------------------------------------------------------------------------------------------------


def limit(*, size: int = 0, ops: int = 0, ms: int = 100) -> RateLimiter:
    return RateLimiter(
        TokenBucket(size, ms) if size else None,
        TokenBucket(ops, ms) if ops else None,
    )


def test_frames_beyond_the_limit_stay_in_the_ring(namespace: Namespace) -> None:
    with Link(namespace, tx_limiter=limit(ops=5, ms=60_000)) as link:
        link.send(*(bytes(HEADER) + frame(60 + n) for n in range(20)))
        assert len(link.host.frames(5)) == 5
        assert link.host.nothing_more()
        assert len(link.tx.reap()) == 5
        assert link.device.counters()["tx_rate_limiter_throttled"] >= 1
        assert link.transport.save().device.queues[TX].next_avail == 5
        link.device.update_limiter(TX, limit(ops=1000, ms=60_000))
        assert link.host.frames(15) == [frame(60 + n) for n in range(5, 20)]
        assert link.device.counters()["tx_rate_limiter_event_count"] == 1


def test_frames_beyond_the_limit_stay_in_the_tap_and_are_not_told(namespace: Namespace) -> None:
    with Link(namespace, rx_limiter=limit(ops=5, ms=60_000)) as link:
        link.provide(*([[4096]] * 40))
        sent = [frame(60 + n) for n in range(20)]
        for one in sent:
            link.host.send(one)
        assert [data for _, data in link.wait_received(5)] == sent[:5]
        time.sleep(0.05)  # nothing is drained, as settle() would
        assert link.received() == []
        assert link.device.counters()["rx_rate_limiter_throttled"] >= 1
        link.device.update_limiter(RX, RateLimiter(None, TokenBucket(0, 0)))
        assert [data for _, data in link.wait_received(15)] == sent[5:]


def test_a_frame_held_back_is_given_out_when_the_machine_is_saved(namespace: Namespace) -> None:
    with Link(namespace, rx_limiter=limit(ops=2, ms=60_000)) as link:
        link.provide(*([[4096]] * 40))
        for n in range(4):
            link.host.send(frame(60 + n))
        link.wait_received(2)
        link.io.pause()
        link.device.drain()
        assert [data for _, data in link.received()] == [frame(62)]
        assert link.transport.save().device.queues[RX].next_avail == 3


def test_bytes_are_limited_to_what_is_configured(namespace: Namespace) -> None:
    # 100 kB every 100 ms; what is in the bucket at first comes on top.
    with Link(namespace, tx_limiter=limit(size=100_000)) as link:
        message = bytes(HEADER) + frame(1488)
        begin, sent, first = time.monotonic(), 0, 0
        while (now := time.monotonic()) - begin < 1.0:
            if len(link.tx.free) > 100:
                link.place = ARENA
                link.send(*([message] * 40))
            sent += 1500 * len(link.tx.reap())
            first = first or (sent if now - begin > 0.2 else 0)
            time.sleep(0.002)
        rate = (sent - 100_000) / (time.monotonic() - begin)
        assert 0.9e6 < rate < 1.1e6


# -- the wire ------------------------------------------------------------------------------------------------


SERVICE = bytes((169, 254, 169, 254))


def ipv4(target: bytes, size: int = 40) -> bytes:
    body = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + size, 1, 0, 64, 17, 0, bytes((10, 0, 0, 2)), target)
    return PEER + MAC + struct.pack(">H", 0x0800) + body + bytes(size)


def arp(target: bytes, operation: int = 1) -> bytes:
    head = struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation)
    return b"\xff" * 6 + MAC + b"\x08\x06" + head + MAC + bytes((10, 0, 0, 2)) + bytes(6) + target


@pytest.fixture
def wired(namespace: Namespace) -> Iterator[tuple[Link, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.settimeout(10)
    with closing(theirs), Link(namespace, mac=MAC) as link:
        link.device.detour(ours.detach(), SERVICE)
        yield link, theirs


def test_frames_for_the_service_take_the_wire_and_no_others(wired: tuple[Link, socket.socket]) -> None:
    link, theirs = wired
    header = b"\1" + bytes(HEADER - 1)
    for cuts in ((HEADER,), (), tuple(range(1, 80, 3))):
        for detoured in (ipv4(SERVICE), ipv4(SERVICE, 1400), arp(SERVICE)):
            link.send(header + detoured, cuts=cuts)
            assert theirs.recv(1 << 17) == header + detoured
        for other in (
            ipv4(bytes((169, 254, 169, 253))),
            arp(bytes((10, 0, 0, 1))),
            arp(SERVICE, 2),
            frame(60),
        ):
            link.send(bytes(HEADER) + other, cuts=cuts)
            assert link.host.frames(1) == [other]
    assert link.host.nothing_more()
    assert (link.device.wire_sent, link.device.tx_frames) == (9, 12)


@pytest.mark.parametrize("size", [13, 14, 20, 33, 41])
def test_a_frame_too_short_to_name_the_service_goes_to_the_tap(
    wired: tuple[Link, socket.socket], size: int
) -> None:
    link, _ = wired
    link.send(bytes(HEADER) + ipv4(SERVICE)[: min(size, 33)], bytes(HEADER) + arp(SERVICE)[:size])
    assert link.device.wire_sent == 0
    assert link.device.tx_frames + link.device.tap_write_fails == 2


def test_what_the_service_sends_arrives_among_the_rest(wired: tuple[Link, socket.socket]) -> None:
    link, theirs = wired
    link.provide(*([[4096]] * 100))
    answers = [frame(100 + n, seed=n + 1) for n in range(20)]
    for n, one in enumerate(answers):
        theirs.send(bytes(HEADER) + one)
        link.host.send(frame(300 + n))
    got = [data for _, data in link.wait_received(40)]
    assert [data for data in got if len(data) < 300] == answers
    assert [data for data in got if len(data) >= 300] == [frame(300 + n) for n in range(20)]


def test_a_service_that_is_behind_loses_frames_and_stops_nobody(wired: tuple[Link, socket.socket]) -> None:
    link, theirs = wired
    for _ in range(40):
        link.place = ARENA
        link.send(*([bytes(HEADER) + ipv4(SERVICE, 1400)] * 20))
        link.tx.reap()
    assert link.device.wire_dropped > 0
    assert link.device.wire_sent + link.device.wire_dropped == 800
    link.send(bytes(HEADER) + frame(60))
    assert link.host.frames(1) == [frame(60)]
    theirs.close()
    link.send(bytes(HEADER) + ipv4(SERVICE), bytes(HEADER) + frame(61))
    assert link.host.frames(1) == [frame(61)]


# -- saved state ---------------------------------------------------------------------------------------------


def test_a_restored_interface_goes_on_with_offloads_and_limits(namespace: Namespace) -> None:
    limits = {"rx_limiter": limit(ops=1000), "tx_limiter": limit(size=1 << 20)}
    with Link(namespace, LARGE, headers=True, mac=MAC, **limits) as link:
        link.provide(*([[1526]] * 200))
        link.host.send(bytes(10) + frame(60))
        link.wait_received(1)
        link.send(bytes(HEADER) + frame(70))
        link.host.frames(1)
        link.io.pause()
        link.device.drain()
        saved = link.transport.save()
        assert saved.device.queues[RX].next_avail == saved.device.queues[RX].next_used == 1
        image = [link.memory.read(0, LOW), link.memory.read(HIGH, LOW)]
        with Link(namespace, LARGE, headers=True, mac=MAC, **limits) as other:
            other.io.pause()
            other.memory.write(0, image[0])
            other.memory.write(HIGH, image[1])
            other.rx, other.tx, other.buffers, other.place = link.rx, link.tx, link.buffers, link.place
            other.rx.memory = other.tx.memory = other.memory
            other.transport.restore(through_a_file(saved))
            other.io.resume()
            header, sent = tcp_segment(60_000)
            other.host.send(header[:10] + sent)
            assert [data for _, data in other.wait_received(1)] == [sent]
            other.send(bytes(HEADER) + frame(71))
            assert other.host.frames(1)[0][10:] == frame(71)


def test_state_of_another_interface_is_refused(namespace: Namespace) -> None:
    with Link(namespace, mac=MAC) as link, Link(namespace, mac=PEER) as other:
        link.io.pause()
        with pytest.raises(ValueError, match="are not"):
            other.device.restore_own(link.device.save_own())
        with pytest.raises(ValueError, match="what was saved is not of a Net: Expected `object`, got `null`"):
            other.device.restore(msgspec.structs.replace(other.device.save(), own=None))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mac": b"12345"}, "6 bytes"),
        ({"mtu": 67}, "MTU 67 is out of range"),
        ({"mtu": 65536}, "out of range"),
        ({"drop_spoofed": True}, "guest_mac"),
    ],
)
def test_bad_options_leave_the_descriptor_to_the_caller(options: dict[str, Any], words: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with closing(ours), closing(theirs), GuestMemory([(0, 1 << 20)]) as memory:
        with pytest.raises(ConfigError, match=words):
            Net(memory, ours.fileno(), **options)
        assert ours.fileno() >= 0
        ours.send(b"still open")
