"""What of this process is in memory and need not be.

Starting touches much of the interpreter that is never needed again. Its pages stay in the page cache, which all
processes share; that they are mapped here, and counted here, is what `give_back` undoes.
"""

from __future__ import annotations

from crackle.memory.guest import trim_heap, unmap_pages


def give_back() -> None:
    """Unmap the unchanged pages of executables and libraries, and trim the heap. Takes a few milliseconds."""
    trim_heap()
    for address, size in _unchanged(_read("/proc/self/smaps")):
        unmap_pages(address, size)


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _unchanged(smaps: str) -> list[tuple[int, int]]:
    """(address, size) of the file mappings that cannot be written and of which no page is private (proc(5), smaps)."""
    found: list[tuple[int, int]] = []
    candidate: tuple[int, int] | None = None
    for line in smaps.splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            start, _, end = name.partition("-")
            fields = rest.split()
            is_file = len(fields) >= 5 and fields[4].startswith("/")
            readable_only = fields[0] in ("r-xp", "r--p")
            candidate = (int(start, 16), int(end, 16) - int(start, 16)) if is_file and readable_only else None
        elif name == "Anonymous:" and candidate is not None and rest.split()[0] == "0":
            found.append(candidate)
    return found
