"""What of this process is in memory and need not be.

Starting touches much of the interpreter that is never needed again. Its pages stay in the page cache, which all
processes share; that they are mapped here, and counted here, is what `give_back` undoes.
"""

from __future__ import annotations

from crackle.memory.guest import trim_heap, unmap_pages


def give_back() -> None:
    """Unmap the code of executables and libraries, and trim the heap. Takes a fraction of a millisecond.

    OSError where there is no /proc or no descriptor; the heap has been trimmed then.
    """
    trim_heap()
    with open("/proc/self/maps", "rb") as maps:
        for address, size in _code(maps.read()):
            unmap_pages(address, size)


def _code(maps: bytes) -> list[tuple[int, int]]:
    """(address, size) of the mappings of files that are executable and cannot be written, and so are never changed:
    read-only data has been, by the linker (proc(5), maps).
    """
    found = []
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if fields[1] == b"r-xp" and len(fields) == 6 and fields[5].startswith(b"/"):
            start, _, end = fields[0].partition(b"-")
            found.append((int(start, 16), int(end, 16) - int(start, 16)))
    return found
