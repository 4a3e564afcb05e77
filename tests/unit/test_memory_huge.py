"""Small pages made into huge ones: which, and that nothing of memory changes by it; and what a fork may share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crackle import ConfigError
from crackle.memory import GuestMemory, Region
from crackle.memory.huge import gather_pages
from crackle.runtime.system import fork

HUGE = 2 << 20


def huge_kib(region: Region) -> int:
    """Of a region, what is in huge pages."""
    found = 0
    for mapping in Path("/proc/self/smaps").read_text().split("VmFlags"):
        lines = mapping.splitlines()
        heads = [line for line in lines if "-" in line.split(" ")[0]]
        if not heads:
            continue
        begin, end = (int(part, 16) for part in heads[-1].split()[0].split("-"))
        if begin < region.hva + region.size and region.hva < end:
            found += sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))
    return found


def touch(memory: GuestMemory, first: int, pages: int) -> None:
    for page in range(first, first + pages):
        memory.write(page * 4096, page.to_bytes(8, "little"))


def test_ranges_of_which_half_is_there_are_gathered_and_no_others() -> None:
    with GuestMemory([(0, 8 * HUGE)]) as memory:
        touch(memory, 0, 512)
        touch(memory, 512, 300)
        touch(memory, 1024, 100)
        before = memory.read(0, 8 * HUGE)
        done = gather_pages(memory, 10.0)
        if done == 0:
            pytest.skip("this host's kernel makes no huge pages of small ones")
        assert done == 2
        assert huge_kib(memory.regions[0]) == 2 * 2048
        assert memory.read(0, 8 * HUGE) == before
        # What is huge is found quickly the next time, and what has come meanwhile is gathered too.
        touch(memory, 1536, 512)
        assert gather_pages(memory, 10.0) == 3


def test_there_is_no_time_for_it() -> None:
    with GuestMemory([(0, 2 * HUGE)]) as memory:
        touch(memory, 0, 512)
        assert gather_pages(memory, 0.0) == 0


def test_memory_that_is_lent_to_a_fork_is_copied_when_it_is_written_to() -> None:
    with GuestMemory([(0, HUGE)]) as memory:
        memory.write(0, b"before")
        memory.check_inheritable()
        memory.let_inherit(True)
        reader, writer = os.pipe()
        pid = fork()
        if not pid:
            memory.inherited()
            os.close(writer)
            os.read(reader, 1)
            kept = memory.read(0, 6) == b"before"
            memory.write(0, b"child!")
            os._exit(0 if kept else 1)
        memory.let_inherit(False)
        memory.write(0, b"parent")
        os.close(writer)
        os.close(reader)
        assert os.waitpid(pid, 0)[1] == 0
        assert memory.read(0, 6) == b"parent"


def test_pages_that_a_fork_shares_are_not_gathered() -> None:
    with GuestMemory([(0, 2 * HUGE)]) as memory:
        touch(memory, 0, 512)
        memory.let_inherit(True)
        reader, writer = os.pipe()
        pid = fork()
        if not pid:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        try:
            memory.let_inherit(False)
            assert gather_pages(memory, 10.0) == 0
        finally:
            os.close(writer)
            os.close(reader)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("backing", ["memfd", "transparent-memfd"])
def test_shared_memory_is_not_lent(backing: str) -> None:
    with (
        GuestMemory([(0, HUGE)], backing=backing) as memory,
        pytest.raises(ConfigError, match=f"memory of the kind '{backing}' is not copied on write"),
    ):
        memory.check_inheritable()
