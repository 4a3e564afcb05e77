"""The console that a program holds: what it keeps, finds and takes, and how waiting for it ends."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crackle.errors import ConfigError, CrackleError, GuestError, StateError
from crackle.vmm.console import Console, Match

PATIENCE = 20.0


class Guest:
    """A console and the guest's ends of it."""

    def __init__(self, limit: int | None = None) -> None:
        self.console = Console() if limit is None else Console(limit)
        self._exit = os.eventfd(0)
        self.error: CrackleError = CrackleError("the guest ended: it was told to")
        self.console.watch(self._exit, lambda: self.error)

    def says(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.console.guest_out, data) :]

    def ends(self) -> None:
        os.eventfd_write(self._exit, 1)

    def close(self) -> None:
        self.console.close()
        if self._exit >= 0:
            os.close(self._exit)
            self._exit = -1


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


class Later:
    """A call in a thread of its own; `result` waits for what comes of it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._came: object = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._came = self._call()
        except Exception as error:
            self._came = error

    def result(self) -> object:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "it still waits"
        return self._came


# -- what is found -------------------------------------------------------------------------------------------


def test_a_match_has_its_groups_and_what_came_before_it(guest: Guest) -> None:
    guest.says(b"Linux 6.1\nlogin: ")
    match = guest.console.expect(r"(?P<what>\w+): (x)?")
    assert match.before == b"Linux 6.1\n"
    assert (match[0], match[1], match["what"], match[2]) == (b"login: ", b"login", b"login", b"")
    assert (match.group(), match.group(2), match.groups()) == (b"login: ", None, (b"login", None))
    assert match.groupdict() == {"what": b"login"}
    for group in (3, -1, "other"):
        with pytest.raises(IndexError, match="no such group"):
            match[group]


def test_each_search_goes_on_where_the_one_before_it_found_something(guest: Guest) -> None:
    guest.says(b"one two one")
    assert guest.console.expect("one").before == b""
    assert guest.console.expect("one").before == b" two "
    with pytest.raises(
        CrackleError, match=r"did not show 'one': nothing in 0.01 s. It ends with:\none two one"
    ):
        guest.console.expect("one", timeout=0.01)


def test_look_behind_sees_what_was_found_before(guest: Guest) -> None:
    guest.says(b"a=1;b=2;")
    guest.console.expect("=1")
    assert guest.console.expect(r"(?<=1;)\w")[0] == b"b"
    assert guest.console.expect(r"(?<=b)=(?P<value>\d)")["value"] == b"2"


@given(st.binary(max_size=200), st.lists(st.integers(1, 50), max_size=20))
def test_what_is_found_does_not_depend_on_how_it_came(text: bytes, cuts: list[int]) -> None:
    pattern = re.compile(rb"a|\n.|(?<=\x00)[\x00-\x7f]+\xff|(\d)\1", re.DOTALL)
    whole = pattern.search(text)
    guest = Guest()
    try:
        waiting = Later(lambda: guest.console.expect(pattern.pattern, PATIENCE))
        for cut in cuts:
            guest.says(text[:cut])
            text = text[cut:]
        guest.says(text)
        guest.ends()
        found = waiting.result()
        if whole is None:
            assert isinstance(found, CrackleError)
        else:
            assert isinstance(found, Match)
    finally:
        guest.close()


def test_a_match_across_what_came_in_pieces_is_found(guest: Guest) -> None:
    guest.says(b"begin" + b"x" * 100_000)
    waiting = Later(lambda: guest.console.expect(r"begin(x|y)*end", PATIENCE))
    for _ in range(50):
        guest.says(b"y" * 5000)
    guest.says(b"end")
    guest.ends()
    found = waiting.result()
    assert isinstance(found, Match)
    assert len(found[0]) == len("begin") + 100_000 + 250_000 + len("end")


def test_a_match_begins_as_early_as_it_can(guest: Guest) -> None:
    guest.says(b"first\n")
    waiting = Later(lambda: guest.console.expect(r"(?s)(.*?)<(\d+)>", PATIENCE))
    lines = [b"line %d\n" % number for number in range(400)]
    for line in lines:
        guest.says(line)
    guest.says(b"<0>")
    found = waiting.result()
    assert isinstance(found, Match)
    assert found[1] == b"first\n" + b"".join(lines)


def test_searching_looks_at_what_is_new_and_not_at_all_again(guest: Guest, monkeypatch) -> None:
    searched = 0
    end = re.compile(b"end")

    class Counting:
        def search(self, data: bytearray, start: int) -> re.Match[bytes] | None:
            nonlocal searched
            searched += len(data) - start
            return end.search(data, start)

    monkeypatch.setattr(re, "compile", lambda _pattern: Counting())
    waiting = Later(lambda: guest.console.expect("end", PATIENCE))
    lines, line = 4000, b"a line of the boot messages that nobody is looking for today\n"
    for _ in range(lines):
        guest.says(line)
        guest.console.dropped  # noqa: B018 - lets the searcher have the lock
    guest.says(b"end")
    monkeypatch.undo()
    assert isinstance(waiting.result(), Match)
    # Each piece with the 1 KiB before it, and all of it as often as it has doubled.
    assert searched < (lines + 2) * 1200 + 3 * lines * len(line)


# -- how waiting ends ----------------------------------------------------------------------------------------


def test_expecting_ends_with_the_reason_when_the_guest_ends(guest: Guest) -> None:
    guest.error = GuestError("vCPU 0: triple fault; rip=0x1234")
    waiting = Later(lambda: guest.console.expect("login", timeout=3600))
    guest.says(b"last words")
    guest.ends()
    error = waiting.result()
    assert isinstance(error, GuestError)
    assert re.search(
        r"did not show 'login': vCPU 0: triple fault; rip=0x1234. It ends with:\nlast words", str(error)
    )
    with pytest.raises(GuestError, match="triple fault"):
        guest.console.expect("login", timeout=3600)


def test_what_the_guest_wrote_before_its_end_is_found_after_it(guest: Guest) -> None:
    guest.says(b"x" * 60_000 + b"bye")
    guest.ends()
    assert guest.console.expect("bye")[0] == b"bye"


def test_expecting_and_typing_end_when_the_console_closes(guest: Guest) -> None:
    expecting = Later(lambda: guest.console.expect("login", timeout=3600))
    typing = Later(lambda: guest.console.write(bytes(1 << 20)))
    os.read(guest.console.guest_in, 1)
    guest.console.close()
    for waiting in (expecting, typing):
        error = waiting.result()
        assert isinstance(error, StateError)
        assert "stopped" in str(error)
    with pytest.raises(StateError, match="stopped"):
        guest.console.write("more")
    guest.console.close()


def test_typing_ends_when_the_guest_does(guest: Guest) -> None:
    typing = Later(lambda: guest.console.write(bytes(1 << 20)))
    os.read(guest.console.guest_in, 1)
    guest.ends()
    error = typing.result()
    assert isinstance(error, StateError)
    assert "nobody reads the guest's console: the guest ended: it was told to" in str(error)
    with pytest.raises(StateError, match="it was told to"):
        guest.console.write("more")


def test_typing_gives_up_in_time_and_says_how_much_was_taken(guest: Guest) -> None:
    with pytest.raises(TimeoutError, match=r"the guest has taken 65536 of 100000 bytes in 0.01 s"):
        guest.console.write(bytes(100_000), timeout=0.01)


def test_the_console_answers_while_somebody_types_to_a_guest_that_does_not_read(guest: Guest) -> None:
    typing = Later(lambda: guest.console.write(bytes(100_000)))
    guest.says(b"busy")
    assert guest.console.expect("busy")[0] == b"busy"
    taken = 0
    while taken < 100_000:
        taken += len(os.read(guest.console.guest_in, 65536))
    assert typing.result() is None


# -- what is kept --------------------------------------------------------------------------------------------


def test_the_last_output_is_kept_and_the_rest_is_counted() -> None:
    guest = Guest(limit=1000)
    try:
        text = b"".join(b"%04d\n" % number for number in range(2000))
        guest.says(text)
        guest.console.expect("1999\n")
        assert guest.console.output == text[-1000:]
        assert guest.console.dropped == len(text) - 1000
        guest.says(b"more")
        assert guest.console.expect("more").before == b""
    finally:
        guest.close()


def test_a_guest_that_never_stops_writing_does_not_keep_others_from_the_console(guest: Guest) -> None:
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            guest.says(b"x" * 65536)

    flooding = threading.Thread(target=flood)
    flooding.start()
    begin = time.monotonic()
    for _ in range(20):
        assert guest.console.output is not None
    assert time.monotonic() - begin < PATIENCE
    stop.set()
    flooding.join()


@pytest.mark.parametrize("limit", [0, -1, 1.5, "1M", True])
def test_a_limit_that_is_none_is_refused(limit: object) -> None:
    with pytest.raises(ConfigError, match="at least 1 byte"):
        Console(limit)  # type: ignore[arg-type]


def test_nothing_stays_open_after_the_end() -> None:
    before = len(os.listdir("/proc/self/fd"))
    guest = Guest()
    guest.says(b"text")
    guest.ends()
    guest.close()
    assert guest.console.text == "text"
    assert len(os.listdir("/proc/self/fd")) == before
