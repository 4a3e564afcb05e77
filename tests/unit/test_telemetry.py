"""Logger and metrics: what a line holds, and that nobody ever waits for its reader."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError, CrackleError
from crackle.telemetry.logger import DEBUG, ERROR, OFF, TRACE, Logger, Throttle, parse_level
from crackle.telemetry.metrics import Metrics
from crackle.telemetry.names import SECTIONS
from crackle.telemetry.sink import Sink

if TYPE_CHECKING:
    from pathlib import Path

SMALLEST_PIPE = 4096


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def open_reader(path: Path) -> int:
    """A reader of a named pipe that holds as little as a pipe can."""
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    return reader


def read_all(reader: int) -> bytes:
    data = b""
    while True:
        try:
            more = os.read(reader, 65536)
        except BlockingIOError:
            return data
        if not more:
            return data
        data += more


def promptly(begin: float) -> bool:
    """Whether nothing was waited for: a reader that never reads would be waited for for ever."""
    return time.monotonic() - begin < 10


# Where lines go


def test_a_file_is_made_and_appended_to(tmp_path: Path) -> None:
    for text in (b"one\n", b"two\n"):
        sink = Sink.open(str(tmp_path / "file"), "problem")
        assert sink.write(text)
        sink.close()
        sink.close()
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\n"


def test_a_destination_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^No luck: Is a directory \(os error 21\): /"):
        Sink.open(str(tmp_path), "No luck")


def test_a_pipe_needs_no_reader(fifo: Path) -> None:
    assert Sink.open(str(fifo), "").write(b"line\n")


def test_a_full_pipe_refuses_lines_and_takes_them_again_once_read(fifo: Path) -> None:
    sink = Sink.open(str(fifo), "")
    reader = open_reader(fifo)
    begin = time.monotonic()
    taken = sum(sink.write(b"%099d\n" % number) for number in range(1000))
    assert promptly(begin)
    assert 0 < taken < 1000
    assert read_all(reader).count(b"\n") == taken
    assert sink.write(b"again\n")
    assert read_all(reader) == b"again\n"


@given(st.lists(st.tuples(st.integers(1, 9000), st.booleans()), min_size=1, max_size=20))
def test_lines_are_never_torn_or_mixed(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, bool]]
) -> None:
    path = tmp_path_factory.mktemp("fifo") / "fifo"
    os.mkfifo(path)
    sink = Sink.open(str(path), "")
    reader = open_reader(path)
    expected, received = b"", b""
    for number, (size, drain) in enumerate(writes):
        line = b"%d:" % number + b"x" * size + b"\n"
        if sink.write(line):
            expected += line
        if drain:
            received += read_all(reader)
    # What was taken in part is finished by a later write.
    while not sink.write(b"end\n"):
        received += read_all(reader)
    assert received + read_all(reader) == expected + b"end\n"
    os.close(reader)
    sink.close()


def test_a_borrowed_pipe_is_not_waited_for_and_stays_open() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    sink = Sink(writer)
    begin = time.monotonic()
    taken = sum(sink.write(b"x" * 999 + b"\n") for _ in range(100))
    sink.close()
    assert promptly(begin)
    assert taken <= 5
    assert os.get_blocking(writer)
    os.close(writer)
    os.close(reader)


# The logger

LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9} \[(?P<where>[^]]*)\] (?P<message>.*)$")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def logger_to(path: Path, **config: Any) -> Logger:
    logger = Logger("vm-1")
    logger.set(log_path=str(path), **config)
    return logger


def say_everything(logger: Logger) -> None:
    for name in ("error", "warning", "info", "debug", "trace"):
        getattr(logger, name)(name)


def lines(path: Path) -> list[tuple[str, str]]:
    """What is between the brackets, and the message, of each line."""
    found = [LINE.match(line) for line in path.read_text().splitlines()]
    assert all(found)
    return [(match["where"], match["message"]) for match in found if match is not None]


@pytest.mark.parametrize(
    ("level", "count"),
    [
        ("Off", 0),
        ("Error", 1),
        ("Warning", 2),
        ("warn", 2),
        ("INFO", 3),
        ("Debug", 4),
        ("trace", 5),
        (None, 3),
    ],
)
def test_the_level_says_what_is_written(log: Path, level: str | None, count: int) -> None:
    say_everything(logger_to(log, level=level))
    assert [message for _, message in lines(log)] == ["error", "warning", "info", "debug", "trace"][:count]


def test_a_level_that_does_not_exist_is_refused_and_nothing_changes(log: Path) -> None:
    logger = logger_to(log, level="Debug")
    with pytest.raises(ConfigError, match="'loud' is not a log level"):
        logger.set(log_path=str(log) + "2", level="loud")
    assert logger.level == DEBUG
    assert not os.path.exists(str(log) + "2")


def test_a_line_shows_instance_and_thread_and_on_request_level_and_origin(log: Path) -> None:
    logger = logger_to(log)
    logger.info("plain")
    logger.set(show_level=True)
    logger.warning("level")
    logger.set(show_log_origin=True)
    logger.error("origin")
    assert lines(log)[:2] == [("vm-1:main", "plain"), ("vm-1:main:WARN", "level")]
    where, _ = lines(log)[2]
    assert re.fullmatch(rf"vm-1:main:ERROR:{re.escape(__file__)}:\d+", where)


@pytest.mark.parametrize(
    ("module", "heard"), [(__name__, True), (__name__[:3], True), ("crackle.vmm", False)]
)
def test_a_module_filter_keeps_the_modules_with_that_prefix(log: Path, module: str, heard: bool) -> None:
    logger_to(log, module=module).error("hello")
    assert bool(lines(log)) == heard


def test_each_line_has_its_own_time(log: Path) -> None:
    logger = logger_to(log)
    for _ in range(3):
        logger.info("tick")
    stamps = [line.split()[0] for line in log.read_text().splitlines()]
    assert stamps == sorted(stamps)
    assert len(set(stamps)) == 3


def test_lines_for_a_full_pipe_are_counted_as_lost(fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    logger = logger_to(fifo)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    begin = time.monotonic()
    for _ in range(500):
        logger.info("x" * 100)
    assert promptly(begin)
    written = read_all(reader).count(b"\n")
    assert 0 < written < 500
    assert logger.lost == 500 - written


def test_what_is_no_text_is_still_written(log: Path) -> None:
    logger_to(log).info("caf\udce9")
    assert lines(log)[0][1] == r"caf\udce9"


def test_levels_are_ordered() -> None:
    assert [parse_level(name) for name in ("off", "error", "trace")] == [OFF, ERROR, TRACE]


# Metrics


class Device:
    """A source of metrics with numbers to be set."""

    def __init__(self, metrics: Metrics) -> None:
        self.tree: dict[str, dict[str, Any]] = {}
        metrics.sources.append(lambda: self.tree)


def metrics_to(path: Path, **extra: Any) -> Metrics:
    metrics = Metrics()
    metrics.configure(str(path), extra)
    return metrics


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_a_destination_nothing_is_written() -> None:
    assert Metrics().flush() is False


def test_a_line_holds_the_time_and_every_section(log: Path) -> None:
    before = time.time_ns() // 1_000_000
    assert metrics_to(log).flush()
    (line,) = written(log)
    assert list(line) == ["utc_timestamp_ms", *SECTIONS]
    assert before <= line["utc_timestamp_ms"] <= time.time_ns() // 1_000_000
    assert line["block"]["read_agg"] == {"min_us": 0, "max_us": 0, "sum_us": 0}
    assert line["put_api_requests"]["actions_fails"] == 0


def test_what_is_in_every_line_is_added_to_it(log: Path) -> None:
    metrics_to(log, id="vm-1", properties={"zone": "b"}).flush()
    (line,) = written(log)
    assert (line["id"], line["properties"]) == ("vm-1", {"zone": "b"})


def test_a_counter_is_written_as_its_growth_and_a_value_as_it_is(log: Path) -> None:
    metrics = metrics_to(log)
    for count in (3, 5, 5):
        metrics.counters["put_api_requests"]["drive_count"] = count
        metrics.counters["latencies_us"]["pause_vm"] = 70
        metrics.flush()
    assert [line["put_api_requests"]["drive_count"] for line in written(log)] == [3, 2, 0]
    assert [line["latencies_us"]["pause_vm"] for line in written(log)] == [70, 70, 70]


def test_devices_have_sections_of_their_own_and_a_sum(log: Path) -> None:
    metrics = metrics_to(log)
    device = Device(metrics)
    device.tree = {
        "block_root": {"read_bytes": 512, "read_agg": {"min_us": 4, "max_us": 9, "sum_us": 13}},
        "block_data": {"read_bytes": 4096, "read_agg": {"min_us": 2, "max_us": 5, "sum_us": 7}},
        "uart": {"write_count": 80},
    }
    metrics.flush()
    (line,) = written(log)
    assert line["block_root"]["read_bytes"] == 512
    assert set(line["block_data"]) == set(line["block"])
    assert line["block"]["read_bytes"] == 4608
    assert line["block"]["read_agg"] == {"min_us": 2, "max_us": 9, "sum_us": 20}
    assert line["uart"]["write_count"] == 80


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), min_size=1, max_size=8))
def test_the_lines_of_a_counter_add_up_to_its_number(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "file"
    metrics = metrics_to(path)
    device = Device(metrics)
    reads = writes = 0
    for more_reads, more_writes in steps:
        reads, writes = reads + more_reads, writes + more_writes
        device.tree = {"block_a": {"read_bytes": reads}, "block_b": {"read_bytes": writes}}
        metrics.flush()
    assert sum(line["block_a"]["read_bytes"] for line in written(path)) == reads
    assert sum(line["block"]["read_bytes"] for line in written(path)) == reads + writes


def test_what_a_full_pipe_does_not_take_is_in_a_later_line(fifo: Path) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    metrics = metrics_to(fifo)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    begin, missed, taken, received = time.monotonic(), 0, 0, b""
    for count in range(1, 41):
        metrics.counters["get_api_requests"]["mmds_count"] = count
        try:
            metrics.flush()
            taken = count
        except CrackleError:
            missed += 1
        if count > 10:
            received += read_all(reader)
    assert promptly(begin)
    assert missed >= 8
    # The last line taken may still be in two parts; a reader that comes back finds every other one whole.
    whole = [json.loads(line) for line in received.split(b"\n")[:-1]]
    counted = sum(line["get_api_requests"]["mmds_count"] for line in whole)
    assert taken - 1 <= counted <= taken
    reported = sum(line["logger"]["missed_metrics_count"] for line in whole)
    assert missed - 1 <= reported <= missed


# What a guest can cause


def test_lines_that_a_guest_causes_are_bounded_and_the_next_says_how_many_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("crackle.telemetry.logger.time.monotonic", lambda: now[0])
    logger, throttle, other = Logger(), Throttle(), Throttle()
    logger.set(log_path=str(tmp_path / "log"))
    for _ in range(1000):
        logger.throttled_info(throttle, "again")
    logger.throttled_info(other, "another")
    assert logger.throttled == 990
    now[0] += 0.6
    logger.throttled_info(throttle, "later")
    now[0] += 3600
    for _ in range(1000):
        logger.throttled_info(throttle, "much later")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        *["again"] * 10,
        "another",
        "990 messages were suppressed due to rate limiting",
        "later",
        *["much later"] * 10,
    ]
    logger.set(level="Error")
    logger.throttled_info(other, "below the level")
    logger.close()
    assert logger.throttled == 1980
