"""virtio-vsock as a driver and host programs find it: connections, streams, credit and ends (virtio 1.2, 5.10)."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crackle.errors import ConfigError
from crackle.memory import GuestMemory
from crackle.virtio.vsock.device import Vsock, VsockState
from support.driver import F_VERSION_1, through_a_file
from support.vsock import (
    CID,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    EVENT,
    HOST,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUT_BOTH,
    SHUT_RCV,
    SHUT_SEND,
    SHUTDOWN,
    Guest,
    Packet,
)

ROOM = 256 << 10


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "v.sock")


@pytest.fixture
def guest(path: str) -> Iterator[Guest]:
    with Guest(path) as guest:
        yield guest


def host_socket(timeout: float = 5) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.settimeout(timeout)
    return found


def host_connects(guest: Guest, port: int = 52) -> tuple[socket.socket, int]:
    """A host program's connection to the guest's `port`, accepted; and the port that it was given."""
    host = host_socket()
    host.connect(guest.vsock.uds_path)
    host.sendall(b"CONNECT %d\n" % port)
    request = guest.packet(REQUEST)
    assert (request.src_cid, request.dst_cid, request.dst_port) == (HOST, CID, port)
    guest.send(RESPONSE, port, request.src_port)
    assert host.recv(32) == b"OK %d\n" % request.src_port
    return host, request.src_port


def listener(guest: Guest, port: int, backlog: int = 128) -> socket.socket:
    """A host program that waits for the guest to connect to `port`."""
    server = host_socket()
    server.bind(f"{guest.vsock.uds_path}_{port}")
    server.listen(backlog)
    return server


def guest_connects(guest: Guest, src: int = 1000, dst: int = 80) -> socket.socket:
    """A connection of the guest's to a host program, which has accepted."""
    path = f"{guest.vsock.uds_path}_{dst}"
    server = listener(guest, dst)
    guest.send(REQUEST, src, dst)
    response = guest.packet(RESPONSE)
    assert (response.src_cid, response.dst_cid) == (HOST, CID)
    assert (response.src_port, response.dst_port) == (dst, src)
    accepted, _ = server.accept()
    accepted.settimeout(5)
    server.close()
    os.unlink(path)
    return accepted


def ended(host: socket.socket) -> bool:
    """Whether the host program finds its connection closed."""
    try:
        return host.recv(1) == b""
    except ConnectionResetError:
        return True


# -- connecting ----------------------------------------------------------------------------------------------


def test_a_host_program_reaches_a_port_of_the_guest(guest: Guest) -> None:
    host, port = host_connects(guest, 1234)
    assert 1 << 30 <= port < 1 << 31
    host.sendall(b"hello")
    data = guest.packet(RW)
    assert (data.src_port, data.dst_port, data.len, data.data) == (port, 1234, 5, b"hello")
    guest.send(RW, 1234, port, b"hello yourself")
    assert host.recv(99) == b"hello yourself"


def test_the_guest_reaches_a_host_program(guest: Guest) -> None:
    host = guest_connects(guest, 1000, 80)
    guest.send(RW, 1000, 80, b"GET /")
    assert host.recv(99) == b"GET /"
    host.sendall(b"200")
    assert guest.packet(RW).data == b"200"


@pytest.mark.parametrize(
    "line", [b"connect 7\n", b"CONNECT\t 7\r\n", b"Connect 7 please\n", b"CONNECT 0007\n"]
)
def test_the_connect_line_is_read_as_a_person_would_write_it(guest: Guest, line: bytes) -> None:
    host = host_socket()
    host.connect(guest.vsock.uds_path)
    for byte in line:
        host.sendall(bytes([byte]))
        guest.settle()
    assert guest.packet(REQUEST).dst_port == 7


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"CONNECT\n",
        b"CONNECT x\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"CONNECTED 1\n",
        b"HELO 1\n",
        b"CONNECT 7x\n",
        b"CONNECT" + b" " * 40 + b"7\n",
        b"CONNECT 1" + b"0" * 40,
        b"C" * 32,
    ],
)
def test_a_bad_connect_line_ends_the_connection(guest: Guest, line: bytes) -> None:
    host = host_socket()
    host.connect(guest.vsock.uds_path)
    host.sendall(line)
    assert ended(host)
    assert guest.quiet()
    assert guest.vsock.connections == 0


def test_what_follows_the_connect_line_at_once_is_the_guests(guest: Guest) -> None:
    host = host_socket()
    host.connect(guest.vsock.uds_path)
    host.sendall(b"CONNECT 9\nearly")
    host.shutdown(socket.SHUT_WR)
    request = guest.packet(REQUEST)
    assert guest.quiet()
    guest.send(RESPONSE, 9, request.src_port)
    assert host.recv(32) == b"OK %d\n" % request.src_port
    assert guest.packet(RW).data == b"early"
    assert guest.packet(SHUTDOWN).flags == SHUT_SEND


def test_a_port_nobody_listens_on_in_the_guest_ends_the_host_programs_connection(guest: Guest) -> None:
    host = host_socket()
    host.connect(guest.vsock.uds_path)
    host.sendall(b"CONNECT 9\n")
    request = guest.packet(REQUEST)
    guest.send(RST, 9, request.src_port)
    assert ended(host)
    assert guest.quiet()


def test_a_guest_that_does_not_answer_loses_the_connection_after_two_seconds(guest: Guest) -> None:
    host = host_socket(10)
    host.connect(guest.vsock.uds_path)
    begin = time.monotonic()
    host.sendall(b"CONNECT 9\n")
    guest.packet(REQUEST)
    assert ended(host)
    assert time.monotonic() - begin > 1.9
    assert guest.packet(RST).dst_port == 9


def test_deadlines_stand_still_while_the_machine_is_paused(guest: Guest) -> None:
    host = host_socket(10)
    host.connect(guest.vsock.uds_path)
    host.sendall(b"CONNECT 9\n")
    request = guest.packet(REQUEST)
    guest.io.pause()
    guest.io.clock.pause()
    time.sleep(2.5)
    guest.io.clock.resume()
    guest.io.resume()
    guest.settle()
    assert guest.quiet()
    guest.send(RESPONSE, 9, request.src_port)
    assert host.recv(32) == b"OK %d\n" % request.src_port
    # And one that goes on being silent still has its two seconds, which end.
    late = host_socket(10)
    late.connect(guest.vsock.uds_path)
    late.sendall(b"CONNECT 10\n")
    guest.packet(REQUEST)
    assert ended(late)


def test_a_host_program_that_gives_up_before_it_is_accepted_is_reset(guest: Guest) -> None:
    host = host_socket()
    host.connect(guest.vsock.uds_path)
    host.sendall(b"CONNECT 9\n")
    guest.packet(REQUEST)
    host.close()
    assert guest.packet(RST).dst_port == 9
    assert guest.vsock.connections == 0


def test_a_host_port_without_a_listener_resets_the_guest(guest: Guest) -> None:
    guest.send(REQUEST, 1000, 81)
    reset = guest.packet(RST)
    assert (reset.src_port, reset.dst_port) == (81, 1000)
    listener(guest, 82).close()
    guest.send(REQUEST, 1000, 82)
    assert guest.packet(RST).src_port == 82
    assert guest.vsock.connections == 0


def test_a_path_with_no_room_for_the_port_resets_the_guest(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    path += "x" * (104 - len(path))
    with Guest(path) as guest:
        guest.send(REQUEST, 1000, 4_000_000_000)
        assert guest.packet(RST).src_port == 4_000_000_000


def test_a_full_backlog_is_waited_for(guest: Guest) -> None:
    server = listener(guest, 80, backlog=1)
    for src in range(6):
        guest.send(REQUEST, src, 80)
    accepted = [server.accept()[0]]
    answers = [guest.packet(RESPONSE)]
    while len(answers) < 6:
        accepted.append(server.accept()[0])
        answers.append(guest.packet(RESPONSE))
    assert sorted(answer.dst_port for answer in answers) == list(range(6))


def test_a_backlog_that_stays_full_resets_the_guest(guest: Guest) -> None:
    server = listener(guest, 80, backlog=0)
    for src in range(3):
        guest.send(REQUEST, src, 80)
    ops = sorted(guest.packet(within=10).op for _ in range(3))
    assert ops[-1] == RST
    assert RESPONSE in ops
    server.close()


# -- packets that are wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, 0xFFFF])
def test_a_packet_of_no_connection_is_answered_with_a_reset(guest: Guest, op: int) -> None:
    guest.send(op, 5, 6)
    reset = guest.packet(RST)
    assert (reset.src_cid, reset.dst_cid, reset.src_port, reset.dst_port) == (HOST, CID, 6, 5)
    assert (reset.len, reset.type) == (0, 1)


def test_a_reset_of_no_connection_is_not_answered(guest: Guest) -> None:
    guest.send(RST, 5, 6)
    guest.send(RST, 5, 6, dst_cid=77)
    guest.send(RST, 5, 6, type=9)
    assert guest.quiet()


@pytest.mark.parametrize(
    "fields", [{"dst_cid": 7}, {"src_cid": 9}, {"type": 2}, {"type": 0}, {"dst_cid": 1 << 63}]
)
def test_a_packet_for_another_host_guest_or_type_is_answered_with_a_reset(
    guest: Guest, fields: dict[str, int]
) -> None:
    server = listener(guest, 6)
    guest.send(REQUEST, 5, 6, **fields)
    reset = guest.packet(RST)
    assert (reset.src_cid, reset.dst_cid) == (fields.get("dst_cid", HOST), CID)
    assert (reset.src_port, reset.dst_port) == (6, 5)
    server.close()


def test_a_header_that_is_cut_short_is_used_and_counted(guest: Guest) -> None:
    for size in (0, 1, 43):
        head = guest.tx.add([*([] if not size else [(0x3000000, size, False)]), (0x3000000, 0, False)])  # type: ignore[list-item]
        guest.tx.offer(head)
    guest.notify(1)
    guest.settle()
    assert [written for _, written in guest.tx.reap()] == [0, 0, 0]
    assert guest.vsock.tx_errors == 3
    assert guest.quiet()


@pytest.mark.parametrize("op", [REQUEST, RW, SHUTDOWN])
def test_more_data_announced_than_sent_begins_no_connection(guest: Guest, op: int) -> None:
    server = listener(guest, 80)
    guest.send(op, 1000, 80, b"12345", len=6)
    assert guest.packet(RST).dst_port == 1000
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()


def test_more_data_announced_than_sent_ends_the_connection(guest: Guest) -> None:
    host = guest_connects(guest)
    guest.send(RW, 1000, 80, b"12345", len=6)
    assert guest.packet(RST).dst_port == 1000
    assert ended(host)
    assert guest.vsock.tx_errors == 1


@pytest.mark.parametrize("op", [REQUEST])
def test_a_second_request_for_a_connection_ends_it(guest: Guest, op: int) -> None:
    host = guest_connects(guest)
    guest.send(op, 1000, 80)
    assert guest.packet(RST).dst_port == 1000
    assert ended(host)


@pytest.mark.parametrize("op", [0, 8, RESPONSE, 0xFFFF])
def test_an_operation_that_means_nothing_here_changes_nothing(guest: Guest, op: int) -> None:
    host = guest_connects(guest)
    guest.send(op, 1000, 80)
    guest.send(RW, 1000, 80, b"")
    assert guest.quiet()
    guest.send(RW, 1000, 80, b"still here")
    assert host.recv(99) == b"still here"


def test_receive_buffers_too_small_for_a_header_are_returned_empty(path: str) -> None:
    with Guest(path, size=43, buffers=4) as guest:
        guest.send(RW, 1, 2)
        guest.settle()
        assert [written for _, written in guest.rx.reap()] == [0] * 4
        assert guest.vsock.rx_errors == 4


def test_receive_buffers_without_room_for_data_carry_no_data(path: str) -> None:
    with Guest(path, size=44, buffers=8) as guest:
        host, _ = host_connects(guest)
        host.sendall(b"x")
        guest.settle()
        guest.size = 100
        while guest.quiet():
            pass
        assert guest.packet(RW).data == b"x"


def test_resets_wait_for_receive_buffers_and_none_is_lost(path: str) -> None:
    with Guest(path, buffers=0) as guest:
        for src in range(500):
            guest.post(Packet(op=RW, src_port=src, dst_port=6))
            if src % 100 == 99:
                guest.settle()
                guest.tx.reap()
        answers = set()
        guest.give(*(0x100000 + 4096 * n for n in range(64)))
        while len(answers) < 500:
            answers.add(guest.packet(RST).dst_port)
        assert answers == set(range(500))


def test_a_broken_queue_ends_the_connections(guest: Guest) -> None:
    host = guest_connects(guest)
    guest.tx.write_descriptor(0, 1 << 40, 44, 0, 0)
    guest.tx.offer(0)
    guest.notify(1)
    assert ended(host)
    assert guest.device.fault is not None
    assert guest.vsock.connections == 0


# -- streams, credit -----------------------------------------------------------------------------------------


def test_the_guests_credit_is_kept_to_the_byte(guest: Guest) -> None:
    server = listener(guest, 80)
    guest.send(REQUEST, 1, 80, buf_alloc=10_000)
    guest.packet(RESPONSE)
    host, _ = server.accept()
    data = random.randbytes(30_000)
    host.sendall(data)
    got = b""
    asked = 0
    while len(got) < len(data):
        packet = guest.packet()
        if packet.op == CREDIT_REQUEST:
            asked += 1
            assert len(got) % 10_000 == 0
            assert guest.quiet()
            guest.send(CREDIT_UPDATE, 1, 80, buf_alloc=10_000, fwd_cnt=len(got))
        else:
            got += packet.data
    assert got == data
    assert asked >= 2
    server.close()


def test_counts_wrap_at_32_bits(guest: Guest) -> None:
    """The guest says that it has passed on what it was never sent: to the device, a count that is about to wrap."""
    server = listener(guest, 80)
    start = 0xFFFFF000
    guest.send(REQUEST, 1, 80, buf_alloc=0x2000, fwd_cnt=start)
    guest.packet(RESPONSE)
    host, _ = server.accept()
    # In its eyes 0x1000 bytes are on their way: those from `start` to 0.
    host.sendall(bytes(0x3000))
    got = len(guest.packet(RW).data)
    while got < 0x1000:
        got += len(guest.packet(RW).data)
    assert got == 0x1000
    assert guest.packet(CREDIT_REQUEST)
    guest.send(CREDIT_UPDATE, 1, 80, buf_alloc=0x2000, fwd_cnt=0x1000)
    while got < 0x3000:
        packet = guest.packet()
        got += len(packet.data)
    assert got == 0x3000


def test_credit_below_what_is_on_its_way_is_none(guest: Guest) -> None:
    server = listener(guest, 80)
    guest.send(REQUEST, 1, 80, buf_alloc=4000)
    guest.packet(RESPONSE)
    host, _ = server.accept()
    host.sendall(bytes(4000))
    assert len(guest.packet(RW).data) == 4000
    guest.send(CREDIT_UPDATE, 1, 80, buf_alloc=100, fwd_cnt=1000)
    host.sendall(b"more")
    assert guest.packet(CREDIT_REQUEST)
    assert guest.quiet()
    guest.send(CREDIT_UPDATE, 1, 80, buf_alloc=100, fwd_cnt=4000)
    assert guest.packet(RW).data == b"more"


def test_a_guest_that_ignores_its_credit_is_reset(guest: Guest) -> None:
    host = guest_connects(guest)
    for _ in range(40):
        guest.send(RW, 1000, 80, bytes(60_000))
        if guest.vsock.connections == 0:
            break
    packets = []
    while not packets or packets[-1].op != RST:
        packets.append(guest.packet())
    assert guest.vsock.connections == 0
    host.close()


def test_a_slow_host_program_gets_everything_and_the_guest_hears_of_the_room(guest: Guest) -> None:
    host = guest_connects(guest)
    data = random.randbytes(3_000_000)
    sent, forwarded, got = 0, 0, bytearray()
    while len(got) < len(data):
        while sent < len(data) and sent - forwarded < ROOM:
            size = min(8192, ROOM - (sent - forwarded), len(data) - sent)
            guest.send(RW, 1000, 80, data[sent : sent + size])
            sent += size
            for packet in guest.collect():
                forwarded = packet.fwd_cnt
        got += host.recv(50_000)
        for packet in guest.collect():
            assert packet.op == CREDIT_UPDATE
            assert packet.buf_alloc == ROOM
            forwarded = packet.fwd_cnt
    assert bytes(got) == data
    assert guest.vsock.connections == 1


def test_a_credit_request_is_answered(guest: Guest) -> None:
    host = guest_connects(guest)
    guest.send(RW, 1000, 80, b"x" * 1000)
    assert guest.quiet()
    guest.send(CREDIT_REQUEST, 1000, 80)
    update = guest.packet(CREDIT_UPDATE)
    assert (update.buf_alloc, update.fwd_cnt) == (ROOM, 1000)
    host.close()


@pytest.mark.parametrize("size", [45, 100, 4096, 65536 + 44, 200_000])
def test_a_stream_to_the_guest_fills_buffers_of_any_size(path: str, size: int) -> None:
    with Guest(path, size=size, buffers=16) as guest:
        host, port = host_connects(guest)
        data = random.randbytes(3000 if size < 100 else 100_000)
        host.sendall(data)
        got = b""
        while len(got) < len(data):
            packet = guest.packet(RW)
            assert packet.len == len(packet.data) <= min(size - 44, 65536)
            assert (packet.src_port, packet.dst_port) == (port, 52)
            got += packet.data
        assert got == data


@pytest.mark.parametrize("cuts", [(44,), (10,), (1, 2, 3), (44, 45, 1000), (43, 44), (500,)])
def test_a_packet_may_lie_in_any_number_of_buffers(guest: Guest, cuts: tuple[int, ...]) -> None:
    host = guest_connects(guest)
    data = random.randbytes(2000)
    guest.post(Packet(op=RW, src_port=1000, dst_port=80, len=1500, data=data), *cuts)
    assert host.recv(9999) == data[:1500]


def test_a_driver_without_event_index_is_served_too(path: str) -> None:
    with Guest(path, features=F_VERSION_1, buffers=2) as guest:
        host, port = host_connects(guest)
        data = random.randbytes(100_000)
        host.sendall(data)
        got = b""
        while len(got) < len(data):
            got += guest.packet(RW).data
        assert got == data
        guest.send(RW, 52, port, b"back")
        assert host.recv(9) == b"back"


def test_nothing_wakes_the_thread_while_a_side_does_not_read(guest: Guest) -> None:
    """Data for a guest without receive buffers, data for a program that does not read, and idle connections."""
    silent = [host_connects(guest)[0] for _ in range(5)]
    deaf = guest_connects(guest, 7, 81)
    for _ in range(4):
        guest.send(RW, 7, 81, bytes(60_000))
    assert guest.packet(CREDIT_UPDATE)
    host, _ = host_connects(guest)
    host.setblocking(False)
    guest.collect(refill=False)
    while guest.rx.free and guest.places:
        try:
            host.send(bytes(4000))
        except BlockingIOError:
            break
        guest.collect(refill=False)
    time.sleep(0.1)
    before = guest.io.wakeups
    time.sleep(0.5)
    assert guest.io.wakeups == before
    for program in (*silent, deaf, host):
        program.close()


# -- ends ----------------------------------------------------------------------------------------------------


def test_a_host_program_that_finishes_sending_still_gets_the_answer(guest: Guest) -> None:
    host, port = host_connects(guest)
    host.sendall(b"question")
    host.shutdown(socket.SHUT_WR)
    assert guest.packet(RW).data == b"question"
    assert guest.packet(SHUTDOWN).flags == SHUT_SEND
    time.sleep(2.5)
    assert guest.quiet()
    for _ in range(3):
        guest.send(RW, 52, port, b"answer")
    guest.send(SHUTDOWN, 52, port, flags=SHUT_BOTH)
    assert guest.packet(RST)
    got = b""
    while more := host.recv(99):
        got += more
    assert got == b"answer" * 3


def test_a_guest_that_finishes_sending_still_gets_the_answer(guest: Guest) -> None:
    host = guest_connects(guest)
    guest.send(RW, 1000, 80, b"question")
    guest.send(SHUTDOWN, 1000, 80, flags=SHUT_SEND)
    assert host.recv(99) == b"question"
    assert host.recv(99) == b""
    host.sendall(b"answer")
    assert guest.packet(RW).data == b"answer"
    host.close()
    assert guest.packet(SHUTDOWN).flags == SHUT_BOTH
    guest.send(RST, 1000, 80)
    assert guest.vsock.connections == 0


def test_a_guest_that_receives_no_more_can_still_send(guest: Guest) -> None:
    host = guest_connects(guest)
    guest.send(SHUTDOWN, 1000, 80, flags=SHUT_RCV)
    with pytest.raises(BrokenPipeError):
        host.sendall(b"nobody hears")
    guest.send(RW, 1000, 80, b"data")
    assert host.recv(99) == b"data"
    assert guest.quiet()
    host.close()
    assert guest.packet(SHUTDOWN).flags == SHUT_BOTH


def test_a_host_program_that_closes_leaves_what_it_wrote(guest: Guest) -> None:
    host, port = host_connects(guest)
    host.sendall(b"bye")
    host.close()
    assert guest.packet(RW).data == b"bye"
    assert guest.packet(SHUTDOWN).flags & SHUT_SEND
    while guest.vsock.connections and not guest.quiet():
        assert guest.packet(SHUTDOWN).flags == SHUT_BOTH
    guest.send(RST, 52, port)
    assert guest.vsock.connections == 0


def test_a_host_program_that_closes_without_reading_still_leaves_what_it_wrote(guest: Guest) -> None:
    host, port = host_connects(guest)
    guest.give()
    host.sendall(b"last words")
    host.shutdown(socket.SHUT_RD)
    for _ in range(3):
        guest.send(RW, 52, port, b"not read any more")
    packets = [guest.packet()]
    while packets[-1].op != RW:
        packets.append(guest.packet())
    assert packets[-1].data == b"last words"
    host.close()


def test_what_a_host_program_has_not_read_is_kept_when_the_guest_closes(guest: Guest) -> None:
    host = guest_connects(guest)
    data = random.randbytes(400_000)
    sent = 0
    while sent < len(data):
        guest.send(RW, 1000, 80, data[sent : sent + 50_000])
        sent += 50_000
    guest.send(SHUTDOWN, 1000, 80, flags=SHUT_BOTH)
    time.sleep(2.5)
    # A guest gives up on the answer to its shutdown after some seconds, and a new connection may have the same ports.
    guest.send(RST, 1000, 80)
    guest.collect()
    other = guest_connects(guest, 1000, 80)
    guest.send(RW, 1000, 80, b"another stream")
    got = b""
    while more := host.recv(99_999):
        got += more
    assert got == data
    assert other.recv(99) == b"another stream"


def test_a_guest_that_does_not_agree_to_the_end_is_reset_after_two_seconds(guest: Guest) -> None:
    host, _ = host_connects(guest)
    host.close()
    begin = time.monotonic()
    while guest.packet(SHUTDOWN).flags != SHUT_BOTH:
        pass
    assert guest.packet(RST)
    assert time.monotonic() - begin > 1.8
    assert guest.vsock.connections == 0
    assert guest.vsock.streams.killed == 1


def test_a_guests_reset_ends_the_host_programs_connection(guest: Guest) -> None:
    host, port = host_connects(guest)
    guest.send(RST, 52, port)
    assert ended(host)
    assert guest.quiet()
    assert guest.vsock.connections == 0


def test_a_device_reset_ends_all_connections_and_the_socket_waits_for_the_next_driver(guest: Guest) -> None:
    host, _ = host_connects(guest)
    guest.registers[0x70] = 0
    assert ended(host)
    later = host_socket()
    later.connect(guest.vsock.uds_path)
    later.settimeout(0.1)
    later.sendall(b"CONNECT 1\n")
    with pytest.raises(TimeoutError):
        later.recv(1)
    assert guest.vsock.connections == 0


# -- many ----------------------------------------------------------------------------------------------------


def test_thousands_of_connections_at_once(path: str, many_files: None) -> None:
    with Guest(path, buffers=200) as guest:
        server = listener(guest, 80, backlog=4000)
        count = 3000
        for src in range(count):
            guest.post(Packet(op=REQUEST, src_port=src, dst_port=80))
            if src % 100 == 99:
                guest.settle()
                guest.tx.reap()
        hosts = {}
        for src in range(count):
            assert guest.packet(RESPONSE).dst_port == src
            hosts[src], _ = server.accept()
        assert guest.vsock.connections == count
        order = random.sample(range(count), count)
        for src in order:
            hosts[src].sendall(b"%d" % src)
        heard = {}
        while len(heard) < count:
            packet = guest.packet(RW)
            heard[packet.dst_port] = packet.data
        assert heard == {src: b"%d" % src for src in range(count)}
        for src in range(count):
            guest.post(Packet(op=SHUTDOWN, src_port=src, dst_port=80, flags=SHUT_BOTH))
            if src % 100 == 99:
                guest.settle()
                guest.tx.reap()
        assert {guest.packet(RST).dst_port for _ in range(count)} == set(range(count))
        assert guest.vsock.connections == 0
        assert all(ended(host) for host in hosts.values())
        for host in hosts.values():
            host.close()
        server.close()


def test_no_descriptors_left_is_no_busy_loop(guest: Guest) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    host = host_socket()
    top = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    fill = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
        while True:
            fill.append(os.dup(0))
    except OSError:
        pass
    try:
        host.connect(guest.vsock.uds_path)
        host.sendall(b"CONNECT 5\n")
        time.sleep(0.2)
        before = guest.io.wakeups
        time.sleep(0.5)
        assert guest.io.wakeups - before < 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fill:
            os.close(fd)
    assert guest.packet(REQUEST).dst_port == 5


@pytest.fixture
def many_files() -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- the socket's file ---------------------------------------------------------------------------------------


def make(path: str, cid: int = CID) -> Vsock:
    return Vsock(GuestMemory([(0, 1 << 20)]), cid, path)


@pytest.mark.parametrize("cid", [-1, 1 << 32])
def test_a_cid_of_more_than_32_bits_is_refused(path: str, cid: int) -> None:
    with pytest.raises(ConfigError, match=rf"a guest's CID is a number of 32 bits, not {cid}"):
        make(path, cid)
    assert not os.path.exists(path)


@pytest.mark.parametrize("cid", [0, 2, 0xFFFFFFFF])
def test_a_cid_that_guests_may_refuse_is_theirs_to_refuse(path: str, cid: int) -> None:
    make(path, cid).close()


def test_a_path_that_is_too_long_is_named_with_its_limit() -> None:
    with pytest.raises(
        ConfigError, match=r"shorter than SUN_LEN: it may have 107 bytes, and has 108: /tmp/x+"
    ):
        make("/tmp/" + "x" * 103)


def test_without_a_path_there_is_no_door_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("").close()
    assert os.listdir(tmp_path) == []


def test_a_path_that_is_taken_is_refused_and_left_alone(path: str) -> None:
    Path(path).write_text("mine")
    with pytest.raises(ConfigError, match=rf"Address already in use \(os error 98\): {path}"):
        make(path)
    assert Path(path).read_text() == "mine"


def test_a_directory_that_is_missing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory \(os error 2\): /none/v"):
        make("/none/v")


def test_the_sockets_file_goes_with_the_device_and_nobody_elses_does(path: str) -> None:
    device = make(path)
    assert os.path.exists(path)
    device.close()
    device.close()
    assert not os.path.exists(path)
    device = make(path)
    os.unlink(path)
    Path(path).write_text("another")
    device.close()
    assert Path(path).read_text() == "another"


# -- state, counters -----------------------------------------------------------------------------------------


def test_a_restored_guest_is_told_that_its_connections_are_gone_before_anything_else(
    guest: Guest, tmp_path: Path
) -> None:
    host, port = host_connects(guest)
    state = guest.transport.save()
    assert state.device.own == VsockState(cid=CID, uds_path=guest.vsock.uds_path, last_port=port)
    guest.device.close()
    assert ended(host)
    guest.io.close()

    path = str(tmp_path / "again.sock")
    copy = Guest.__new__(Guest)
    copy.__dict__.update(guest.__dict__)
    super(Guest, copy).__init__(Vsock(guest.memory, CID, path))
    copy.transport.restore(through_a_file(state))
    later = host_socket()
    later.connect(path)
    later.sendall(b"CONNECT 8\n")
    copy.send(RW, 52, port, b"to nobody")
    copy.settle()
    [(head, written)] = copy.events.reap()
    assert written == 4
    assert copy.memory.read(copy.event_places[head], 4) == bytes(4)
    assert copy.interrupts()
    assert copy.collect() == []
    # The driver gives the buffer back when it has closed its sockets.
    gpa = copy.event_places[head]
    copy.events.offer(copy.events.add([(gpa, 4, True)]))  # type: ignore[list-item]
    assert copy.events.avail_event == 8
    copy.notify(EVENT)
    assert copy.packet(RST).dst_port == 52
    request = copy.packet(REQUEST)
    assert (request.dst_port, request.src_port) == (8, port + 1)
    copy.io.close()
    copy.device.close()


def test_everything_is_counted(guest: Guest) -> None:
    host, port = host_connects(guest)
    host.sendall(b"12345")
    assert guest.packet(RW)
    guest.send(RW, 52, port, b"123")
    guest.send(RST, 52, port)
    counters = guest.vsock.counters()
    assert counters["rx_bytes_count"] == 5
    assert counters["tx_bytes_count"] == 3
    assert counters["rx_packets_count"] == 2
    assert counters["tx_packets_count"] == 3
    assert (counters["conns_added"], counters["conns_removed"], counters["conns_killed"]) == (1, 1, 0)
