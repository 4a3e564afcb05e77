"""The page-fault handler in the core: every page once, in windows, and zeros for what was given back."""

from __future__ import annotations

import ctypes
import os
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import pytest

from crackle.memory import GuestMemory
from crackle.memory.pager import WINDOW, Pager
from crackle.memory.userfault import open_userfault, register_range
from crackle.runtime.threads import Thread

PAGE = 4096
LAYOUT = [(0, 1 << 20), (1 << 32, 1 << 19)]
SIZE = 3 << 19
MADV_DONTNEED = 4


class Served:
    """Guest memory whose pages a pager gives out of the file `path`."""

    def __init__(self, path: Path, wanted: Sequence[int] = ()) -> None:
        self.memory = GuestMemory(LAYOUT)
        self._file = os.open(path, os.O_RDONLY)
        self._fault = open_userfault()
        self._ours, self._theirs = socket.socketpair()
        ranges, offset = [], 0
        for region in self.memory.regions:
            register_range(self._fault, region.hva, region.size)
            ranges.append((region.hva, region.size, offset))
            offset += region.size
        self.pager = Pager(self._fault, self._theirs.fileno(), self._file, ranges, PAGE, wanted)
        self._gone: list[bool] = []
        self._thread = Thread("faults", lambda: self._gone.append(self.pager.run()))
        self.pager.begin()

    def read(self, page: int) -> bytes:
        """A page, by its number in the file."""
        region = self.memory.regions[page >= 256]
        return self.memory.read(region.gpa + page % 256 * PAGE, PAGE)

    def end(self) -> bool:
        """The connection's end, and what `run` says to it."""
        self._ours.close()
        self._thread.join()
        return self._gone[0]

    def close(self) -> None:
        self.pager.end()
        self._thread.join()
        os.close(self._fault)
        self.memory.close()
        for each in (self._ours, self._theirs):
            each.close()
        os.close(self._file)

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A memory file with data, holes, and both within one window."""
    path = tmp_path / "memory"
    with path.open("wb") as out:
        out.truncate(SIZE)
        for page in range(SIZE // PAGE):
            if page % 48 < 20 or page % 7 == 0:
                out.seek(page * PAGE)
                out.write(page.to_bytes(8, "little") * (PAGE // 8))
    return path


@pytest.fixture
def serve(file: Path) -> Iterator[Callable[..., Served]]:
    """Starts a pager."""
    started: list[Served] = []

    def start(wanted: Sequence[int] = ()) -> Served:
        started.append(Served(file, wanted))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_every_page_is_that_of_the_file_in_whatever_order(serve: Callable[..., Served], file: Path) -> None:
    served, data = serve(), file.read_bytes()
    pages = list(range(SIZE // PAGE))
    random.Random(1).shuffle(pages)
    for page in pages:
        assert served.read(page) == data[page * PAGE : (page + 1) * PAGE], page
    assert served.end()
    # One fault brings its whole window, and each window is noted once, when it was asked for first.
    assert served.pager.faults == SIZE // WINDOW
    firsts = list(dict.fromkeys(page * PAGE // WINDOW for page in pages))
    assert served.pager.asked == firsts


def test_what_is_wanted_comes_before_it_is_asked_for(serve: Callable[..., Served], file: Path) -> None:
    served, data = serve(range(SIZE // WINDOW)), file.read_bytes()
    for page in reversed(range(SIZE // PAGE)):
        assert served.read(page) == data[page * PAGE : (page + 1) * PAGE]
    assert served.end()
    assert served.pager.faults < SIZE // WINDOW


def test_pages_that_were_given_back_are_zeros_ever_after(serve: Callable[..., Served]) -> None:
    served = serve()
    libc = ctypes.CDLL(None, use_errno=True)
    low, high = served.memory.regions
    assert served.read(3)[0] == 3
    for address, size in ((low.hva + 2 * PAGE, 2 * PAGE), (high.hva, 64 * PAGE)):
        # Returns when the pager has read of it; ctypes lets go of Python's lock meanwhile.
        assert libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_DONTNEED) == 0
    assert served.read(2) == served.read(3) == bytes(PAGE)
    # A window that has never come, but for what of it was given back.
    assert all(served.read(256 + page) == bytes(PAGE) for page in range(64))
    assert served.read(256 + 64 + 2)[:2] == (322).to_bytes(2, "little")
    assert served.read(4)[0] == 4


def test_a_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(bytes(PAGE))
    fd = os.open(short, os.O_RDONLY)
    with pytest.raises(ValueError, match="has 4096 bytes, 8192 are needed"):
        Pager(-1, -1, fd, [(0, 2 * PAGE, 0)], PAGE)
    os.close(fd)
