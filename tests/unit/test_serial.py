"""The 16550A as a driver finds it: registers, FIFO, interrupts, input and output (PC16550D, section 8)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.devices.serial import Serial
from crackle.errors import ConfigError
from crackle.kvm.bus import Bus
from crackle.runtime import stream
from crackle.runtime.iothread import IoThread
from crackle.schema.rate_limiter import TokenBucket

ROOT = Path(__file__).resolve().parents[2]

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
RX_INTERRUPT, TX_INTERRUPT = 0x01, 0x02  # IER
NO_INTERRUPT, TX_EMPTY, RX_DATA = 0x01, 0x02, 0x04  # IIR
DATA_READY, TRANSMITTER_EMPTY = 0x01, 0x60  # LSR
DIVISOR_LATCH = 0x80  # LCR
LOOP = 0x10  # MCR
FIFO = 64
BACKLOG = 64 << 10
PORT = 0x3F8


class Line:
    """A serial port on a bus, with its interrupt line and a guest's hands on its registers."""

    def __init__(
        self,
        in_fd: int = -1,
        out_fd: int = -1,
        *,
        threaded: bool = False,
        waits: bool = False,
        limit: TokenBucket | None = None,
    ) -> None:
        self.irq = os.eventfd(0, os.EFD_NONBLOCK)
        self.device = Serial(in_fd, out_fd, self.irq, waits, limit)
        self.bus = Bus("pio")
        self.io = IoThread() if threaded else None
        self.device.attach(self.bus, PORT, self.io)
        if self.io:
            self.io.start()

    def __getitem__(self, register: int) -> int:
        return self.bus.read(PORT + register, 1)

    def __setitem__(self, register: int, value: int) -> None:
        assert self.bus.write(PORT + register, 1, value) == 0

    def interrupts(self) -> int:
        try:
            return os.eventfd_read(self.irq)
        except BlockingIOError:
            return 0

    def wait_interrupt(self) -> None:
        assert select.select([self.irq], [], [], 10)[0], "no interrupt in 10 s"
        os.eventfd_read(self.irq)

    def receive(self) -> bytes:
        """What a driver's loop gets: all that is ready."""
        found = bytearray()
        while self[LSR] & DATA_READY:
            found.append(self[DATA])
        return bytes(found)

    def close(self) -> None:
        if self.io:
            self.io.close()
        os.close(self.irq)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def line() -> Iterator[Line]:
    with Line() as line:
        yield line


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


# -- registers -----------------------------------------------------------------------------------------------


def test_a_fresh_port_is_idle(line: Line) -> None:
    assert line[IIR] == NO_INTERRUPT
    assert line[LSR] == TRANSMITTER_EMPTY
    assert line[LCR] == 0x03
    assert line[DATA] == 0
    assert line.interrupts() == 0


def test_the_scratch_register_holds_any_byte(line: Line) -> None:
    for value in range(256):
        line[SCR] = value
        assert line[SCR] == value


def test_the_divisor_hides_behind_its_latch(line: Line) -> None:
    line[IER] = RX_INTERRUPT
    line[LCR] = DIVISOR_LATCH | 0x03
    line[DATA], line[IER] = 0x34, 0x12
    assert (line[DATA], line[IER]) == (0x34, 0x12)
    assert line.device.save().divisor == 0x1234
    line[LCR] = 0x03
    assert line[IER] == RX_INTERRUPT
    assert line[DATA] == 0


def test_reserved_bits_read_back_as_zero(line: Line) -> None:
    line[IER] = 0xFF
    line[MCR] = 0xFF
    assert (line[IER], line[MCR]) == (0x0F, 0x1F)


def test_the_fifo_says_that_it_is_there_once_enabled(line: Line) -> None:
    assert line[IIR] & 0xC0 == 0
    line[FCR] = 0x01
    assert line[IIR] & 0xC0 == 0xC0


def test_the_modem_reports_a_connected_line(line: Line) -> None:
    assert line[MSR] == 0xB0  # carrier, data set ready, clear to send
    line[MSR] = 0xFF
    line[LSR] = 0xFF
    assert (line[MSR], line[LSR]) == (0xB0, TRANSMITTER_EMPTY)


@pytest.mark.parametrize(
    ("control", "status"),
    [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80), (0x0A, 0x90), (0x0F, 0xF0)],
)
def test_loopback_ties_the_modem_lines_together(line: Line, control: int, status: int) -> None:
    """Linux finds the chip by the case 0x0A."""
    line[MCR] = LOOP | control
    assert line[MSR] == status


def test_loopback_returns_what_is_sent_and_sends_nothing(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with Line(out_fd=writing) as line:
        line[IER] = RX_INTERRUPT
        line[MCR] = LOOP
        for byte in b"echo":
            line[DATA] = byte
        assert line.interrupts() == 1
        assert line.receive() == b"echo"
        line[MCR] = 0
        line[DATA] = ord("x")
        assert os.read(reading, 100) == b"x"


def test_a_wide_access_reaches_one_register(line: Line) -> None:
    line.bus.write(PORT + SCR - 3, 4, 0xAABBCCDD)
    assert line[MCR] == 0xDD & 0x1F
    assert line[SCR] == 0
    assert line.bus.read(PORT + MCR, 4) == 0x1D


# -- interrupts ----------------------------------------------------------------------------------------------


def test_enabling_the_transmitter_interrupt_raises_it_at_once(line: Line) -> None:
    line[IER] = TX_INTERRUPT
    assert line.interrupts() == 1
    line[IER] = TX_INTERRUPT
    assert line.interrupts() == 0
    line[IER] = 0
    line[IER] = TX_INTERRUPT
    assert line.interrupts() == 1


def test_reading_its_cause_takes_the_transmitter_interrupt_back(line: Line) -> None:
    line[IER] = TX_INTERRUPT
    assert [line[IIR], line[IIR]] == [TX_EMPTY, NO_INTERRUPT]
    line[DATA] = 0x41
    assert line.interrupts() == 2
    assert [line[IIR], line[IIR]] == [TX_EMPTY, NO_INTERRUPT]


def test_no_interrupt_comes_that_was_not_enabled(line: Line) -> None:
    line[DATA] = 0x41
    line.device.feed(b"typed")
    assert line.interrupts() == 0
    assert line[IIR] == NO_INTERRUPT


def test_received_data_interrupts_until_it_is_read(line: Line) -> None:
    line[IER] = RX_INTERRUPT
    assert line.interrupts() == 0
    assert line.device.feed(b"ab") == 2
    assert line.interrupts() == 1
    assert [line[IIR], line[IIR]] == [RX_DATA, RX_DATA]
    assert line[DATA] == ord("a")
    assert line[IIR] == RX_DATA
    assert line[DATA] == ord("b")
    assert line[IIR] == NO_INTERRUPT


def test_enabling_the_receiver_interrupt_announces_what_waits_already(line: Line) -> None:
    line.device.feed(b"early")
    line[IER] = RX_INTERRUPT
    assert line.interrupts() == 1


def test_received_data_comes_before_the_transmitter(line: Line) -> None:
    line[IER] = RX_INTERRUPT | TX_INTERRUPT
    line.device.feed(b"a")
    assert line[IIR] == RX_DATA
    line[DATA]
    assert [line[IIR], line[IIR]] == [TX_EMPTY, NO_INTERRUPT]


# -- input ---------------------------------------------------------------------------------------------------


def test_the_fifo_takes_what_it_has_room_for_in_order(line: Line) -> None:
    text = bytes(range(100))
    assert line.device.feed(text) == FIFO
    assert line.device.feed(b"more") == 0
    assert line[DATA] == 0
    assert line.device.feed(b"more") == 1
    assert line.receive() == text[1:FIFO] + b"m"
    assert line.device.read_count == FIFO + 1


def test_clearing_the_fifo_throws_the_input_away(line: Line) -> None:
    line.device.feed(b"unwanted")
    line[FCR] = 0x02
    assert not line[LSR] & DATA_READY
    line.device.feed(b"new")
    assert line.receive() == b"new"


def test_what_is_typed_into_a_pipe_arrives_and_interrupts(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with Line(reading, threaded=True) as line:
        line[IER] = RX_INTERRUPT
        for text in (b"first", b"second"):
            os.write(writing, text)
            line.wait_interrupt()
            assert line.receive() == text


@pytest.mark.parametrize("regular", [False, True])
def test_input_larger_than_the_fifo_arrives_whole_as_it_is_read(regular: bool, tmp_path, pipe) -> None:
    text = os.urandom(FIFO * 20 + 7)
    reading, writing = pipe
    if regular:
        path = tmp_path / "input"
        path.write_bytes(text)
        reading = os.open(path, os.O_RDONLY)
    else:
        os.write(writing, text)
        os.close(writing)
    with Line(reading, threaded=True) as line:
        line[IER] = RX_INTERRUPT
        received = line.receive()
        while len(received) < len(text):
            line.wait_interrupt()
            received += line.receive()
        assert received == text
        assert line.receive() == b""
        assert line.io is not None
        line.io.pause()  # the end of the input has been seen, and does not keep the thread awake
        line.io.resume()
        line.io.pause()
        before = line.io.wakeups
        line.io.resume()
        assert not threading.Event().wait(0.1)
        line.io.pause()
        assert line.io.wakeups - before <= 2
    if regular:
        os.close(reading)


def test_input_waits_in_the_pipe_while_the_fifo_is_full(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with Line(reading, threaded=True) as line:
        assert line.io is not None
        os.write(writing, bytes(FIFO) + b"later")
        line.io.pause()
        line.io.resume()
        assert len(os.read(reading, 100)) == 5
        os.write(writing, b"again")
        assert [line[DATA] for _ in range(FIFO)] == [0] * FIFO
        line.io.pause()
        assert line.receive() == b"again"


# -- output --------------------------------------------------------------------------------------------------


def test_what_the_guest_sends_comes_out_byte_by_byte(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with Line(out_fd=writing) as line:
        for byte in range(256):
            line[DATA] = byte
            assert os.read(reading, 10) == bytes([byte])
        assert line[LSR] == TRANSMITTER_EMPTY
        assert (line.device.write_count, line.device.missed_write_count) == (256, 0)


def test_a_burst_interrupts_once(line: Line) -> None:
    """A driver that has been told fills the transmitter's FIFO without being told again after each byte."""
    line[IER] = TX_INTERRUPT
    line.interrupts()
    assert line[IIR] == TX_EMPTY
    for byte in range(16):
        line[DATA] = byte
    assert line.interrupts() == 1
    assert [line[IIR], line[IIR]] == [TX_EMPTY, NO_INTERRUPT]
    line[DATA] = 0
    assert line.interrupts() == 1


def test_a_driver_that_looks_at_the_line_status_only_is_told_of_each_byte(line: Line) -> None:
    line[IER] = TX_INTERRUPT
    for byte in range(16):
        assert line.interrupts() == 1
        assert line[LSR] & TRANSMITTER_EMPTY
        line[DATA] = byte
    assert line.interrupts() == 1


def test_input_behind_input_that_was_announced_is_not_announced_again(line: Line) -> None:
    line[IER] = RX_INTERRUPT
    for _ in range(16):
        line.device.feed(b"x")
    assert line.interrupts() == 1
    assert line.receive() == bytes(16 * b"x")
    line.device.feed(b"x")
    assert line.interrupts() == 1


def fill(writing: int) -> int:
    """Fill a pipe through a description of our own, so that the mode of `writing` stays; how many bytes it took."""
    own = os.open(f"/proc/self/fd/{writing}", os.O_WRONLY | os.O_NONBLOCK)
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += os.write(own, bytes(4096))
    os.close(own)
    return filled


def read_exactly(reading: int, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        found += os.read(reading, size - len(found))
    return bytes(found)


def test_output_for_a_reader_that_is_behind_is_kept_in_order_and_goes_out_when_it_reads(pipe) -> None:
    reading, writing = pipe
    filled = fill(writing)
    text = os.urandom(5000)
    with Line(out_fd=writing, threaded=True) as line:
        for byte in text:
            line[DATA] = byte
        assert line.device.write_count == 0
        assert read_exactly(reading, filled + len(text))[filled:] == text
        line[DATA] = 0x42
        assert os.read(reading, 10) == b"B"
        assert line.io is not None
        line.io.pause()
        assert (line.device.write_count, line.device.missed_write_count) == (len(text) + 1, 0)
    assert os.get_blocking(writing)


def test_output_past_what_is_kept_is_dropped_and_counted(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    filled = fill(writing)
    with Line(out_fd=writing, threaded=True) as line:
        line[IER] = TX_INTERRUPT
        for number in range(BACKLOG + 1000):
            line[DATA] = number % 251
        assert line.interrupts() == 1
        assert (line.device.write_count, line.device.missed_write_count) == (0, 1000)
        kept = read_exactly(reading, filled + BACKLOG)[filled:]
        assert kept == bytes(number % 251 for number in range(BACKLOG))
        line[DATA] = 0x42
        assert os.read(reading, 10) == b"B"


@pytest.mark.parametrize("waits", [False, True])
def test_output_beyond_its_limit_is_dropped_and_counted_apart(pipe: tuple[int, int], waits: bool) -> None:
    """A burst first, then the bucket; nobody waits for what would come into it in a day."""
    limit = TokenBucket(size=5, refill_time=86_400_000, one_time_burst=3)
    with Line(out_fd=pipe[1], threaded=waits, waits=waits, limit=limit) as line:
        for byte in b"0123456789":
            line[DATA] = byte
        assert os.read(pipe[0], 99) == b"01234567"
        assert line.device.rate_limiter_dropped_bytes == 2
        assert line.device.missed_write_count == 0


def test_a_limit_lets_as_much_out_as_its_bucket_is_filled_with(pipe: tuple[int, int]) -> None:
    limit = TokenBucket(size=10, refill_time=100)
    with Line(out_fd=pipe[1], limit=limit) as line:
        for byte in b"0123456789":
            line[DATA] = byte
        begun = time.monotonic()
        while line.device.write_count < 15:
            assert time.monotonic() - begun < 10
            line[DATA] = ord("x")
        assert time.monotonic() - begun >= 0.045


def test_a_loop_back_and_a_guest_without_an_output_are_not_limited() -> None:
    limit = TokenBucket(size=1, refill_time=86_400_000)
    with Line(limit=limit) as unheard:
        for byte in b"abc":
            unheard[DATA] = byte
        assert unheard.device.rate_limiter_dropped_bytes == 0
        unheard[MCR] = LOOP
        for byte in b"abc":
            unheard[DATA] = byte
        assert unheard.receive() == b"abc"


def test_without_an_output_the_guest_notices_nothing(line: Line) -> None:
    line[IER] = TX_INTERRUPT
    assert (line[IIR], line.interrupts()) == (TX_EMPTY, 1)
    line[DATA] = 0x41
    assert line.interrupts() == 1
    assert line.device.missed_write_count == 0


def test_output_that_nobody_can_read_any_more_is_counted(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with Line(out_fd=writing, threaded=True) as line:
        os.close(reading)
        line[DATA] = 0x41
        assert (line.device.write_count, line.device.missed_write_count) == (0, 1)


def test_what_is_kept_at_the_end_goes_out_as_far_as_the_output_takes_it(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    filled = fill(writing)
    line = Line(out_fd=writing, threaded=True)
    assert line.io is not None
    line.io.pause()  # so that it does not see the reader
    for byte in bytes(range(200)) * 25:
        line[DATA] = byte
    os.read(reading, filled)
    line.close()
    line.device.close()
    line.device.close()
    os.close(writing)
    found = os.read(reading, 65536)
    assert len(found) >= 4096 - 4096 % 200 - 200
    assert (bytes(range(200)) * 25).startswith(found)
    assert os.read(reading, 1) == b""
    assert line.device.write_count == len(found)
    assert line.device.missed_write_count == 5000 - len(found)


def test_a_port_that_waits_loses_nothing_and_holds_no_lock_meanwhile(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    filled = fill(writing)
    text = os.urandom(3 * BACKLOG)
    with Line(out_fd=writing, threaded=True, waits=True) as line:
        writer = threading.Thread(target=lambda: [line.bus.write(PORT, 1, byte) for byte in text])
        writer.start()
        # The port answers, and takes input, while the writer waits.
        assert line[LSR] == TRANSMITTER_EMPTY
        assert line.device.feed(b"typed") == 5
        assert line.receive() == b"typed"
        assert read_exactly(reading, filled + len(text))[filled:] == text
        writer.join(10)
        assert not writer.is_alive()
        assert line.device.missed_write_count == 0


def test_a_pause_ends_the_wait_and_loses_nothing(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    filled = fill(writing)
    text = bytes(range(100))
    with Line(out_fd=writing, threaded=True, waits=True) as line:
        for byte in text:
            writer = threading.Thread(target=line.bus.write, args=(PORT, 1, byte))
            writer.start()
            line.device.pause()
            writer.join(10)
            assert not writer.is_alive()
            line.device.resume()
        assert line.device.save().unsent == text
        assert read_exactly(reading, filled + len(text))[filled:] == text
        assert line.device.missed_write_count == 0


def test_two_ports_on_one_input_do_not_wait_for_each_other(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with Line(reading, threaded=True) as one, Line(reading, threaded=True) as other:
        for number in range(500):
            os.write(writing, b"x")
            found = b""
            while not found:
                found = one.receive() + other.receive()
            assert found == b"x", number
            for line in (one, other):
                assert line.io is not None
                line.io.pause()
                line.io.resume()
    assert os.get_blocking(reading)


@pytest.mark.parametrize("kind", ["socket", "terminal", "master", "no /proc"])
def test_descriptors_of_every_kind_keep_their_mode_and_are_not_waited_for(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "socket":
        ends = [end.detach() for end in socket.socketpair()]
    elif kind == "no /proc":
        monkeypatch.setattr(stream, "_open_again", lambda *_: None)
        input_read, input_write = os.pipe()
        output_read, output_write = os.pipe()
        ends = [input_read, output_write, output_read, input_write]
    else:
        master, slave = os.openpty()
        tty.setraw(slave)
        ends = [master, slave] if kind == "master" else [slave, master]
    in_fd, out_fd = (ends[0], ends[0]) if len(ends) == 2 else ends[:2]
    far_in, far_out = (ends[1], ends[1]) if len(ends) == 2 else ends[2:]
    with Line(in_fd, out_fd, threaded=True) as line:
        line[IER] = RX_INTERRUPT
        os.write(far_out, b"typed")
        line.wait_interrupt()
        received = line.receive()
        while len(received) < 5:
            received += line.receive()
        assert received == b"typed"
        sent = bytes(number % 100 for number in range(BACKLOG))
        for byte in sent:
            line[DATA] = byte
        while line.device.missed_write_count == 0:
            line[DATA] = 0xFF
        assert read_exactly(far_in, len(sent)) == sent
        assert os.get_blocking(in_fd)
        assert os.get_blocking(out_fd)
    for fd in ends:
        os.close(fd)


def test_a_descriptor_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot use descriptor 12345 as the console's output: Bad file"):
        Serial(-1, 12345)


BACKGROUND = """
import os, select, signal, tty
from tests.unit.test_serial import IER, RX_INTERRUPT, Line

tty.setraw(0)
print("raw", flush=True)
select.select([0], [], [])
if port := os.fork():
    os._exit(os.waitstatus_to_exitcode(os.waitpid(port, 0)[1]))
os.setpgid(0, 0)  # in the background from now on
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
with Line(0, threaded=True) as line:
    line[IER] = RX_INTERRUPT
    line.io.pause()
    assert line.receive() == b"", "a terminal of others was read"
    line.io.resume()
    os.tcsetpgrp(0, os.getpgrp())  # as `fg` does
    received = b""
    while len(received) < 2:
        received += line.receive()
    print(received, flush=True)
"""


def test_a_terminal_that_others_had_for_a_while_is_read_again() -> None:
    child, master = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", BACKGROUND])
    text = b""
    typed = False
    with contextlib.suppress(OSError):  # the terminal's end
        while select.select([master], [], [], 30)[0]:
            text += os.read(master, 1000)
            if b"raw" in text and not typed:
                os.write(master, b"hi")
                typed = True
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(master)
    assert b"b'hi'" in text, text.decode()


STUCK_OUTPUT = """
import os, threading
from tests.unit.test_serial import Line, PORT, fill

reading, writing = os.pipe()
size = fill(writing)
line = Line(out_fd=writing, threaded=True, waits=True)
writer = threading.Thread(target=line.bus.write, args=(PORT, 1, 0x41))  # stuck, until somebody reads
writer.start()
threading.Thread(target=line.device.feed, args=(b"t",)).start()
found = b""
while len(found) < size + 1:
    found += os.read(reading, 65536)
writer.join()
print(found[-1:], line.receive())
line.close()
"""


def test_typing_while_the_output_is_stuck_does_not_stop_the_interpreter() -> None:
    """Whoever is to read the output may be a Python thread of this process."""
    run = subprocess.run(
        [sys.executable, "-c", STUCK_OUTPUT], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert run.stdout.split() == ["b'A'", "b't'"], run.stderr


# -- saved state ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 255)), max_size=30), st.binary(max_size=80))
def test_the_saved_state_restores_to_the_same_port(writes: list[tuple[int, int]], typed: bytes) -> None:
    with Line() as line, Line() as other:
        for register, value in writes:
            line[register] = value
        line.device.feed(typed)
        state = line.device.save()
        other.device.restore(state)
        assert other.device.save() == state
        for register in (SCR, MCR, LCR, MSR, LSR, IIR, IER, DATA, DATA):
            assert other[register] == line[register]


def test_output_that_was_kept_before_a_save_goes_out_after_the_restore(pipe: tuple[int, int]) -> None:
    _, writing = pipe
    fill(writing)
    with Line(out_fd=writing, threaded=True) as line:
        for byte in b"kept":
            line[DATA] = byte
        state = line.device.save()
        assert state.unsent == b"kept"
    other_reading, other_writing = os.pipe()
    with Line(out_fd=other_writing, threaded=True) as other:
        other.device.restore(state)
        assert read_exactly(other_reading, 4) == b"kept"
        other[DATA] = ord("!")
        assert read_exactly(other_reading, 1) == b"!"
    os.close(other_reading)
    os.close(other_writing)


def test_input_that_was_received_before_a_save_is_announced_after_the_restore(line: Line) -> None:
    line[IER] = RX_INTERRUPT
    line.device.feed(b"waiting")
    with Line() as other:
        other.device.restore(line.device.save())
        assert other.interrupts() == 1
        assert other.receive() == b"waiting"
