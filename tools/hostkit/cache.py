"""The user's cache directory: where downloads and built images live, each made once and published whole.

A thing in the cache is either absent or complete. It is made under a temporary name beside its final one,
while holding a lock, and renamed into place, so that several tools may want it at the same time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/crackle`, or `~/.cache/crackle`; made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path.home() / ".cache"
    path = root / "crackle"
    path.mkdir(parents=True, exist_ok=True)
    return path


def progress(message: str) -> None:
    """Say on stderr what is being done: stdout is for results."""
    print(f"== {message}", file=sys.stderr, flush=True)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache-wide lock `name`, waiting for whoever has it. It ends with the process at the latest."""
    locks = cache_dir() / "locks"
    locks.mkdir(exist_ok=True)
    with open(locks / name.replace("/", "_"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """Return `path`, made first by `make(temporary path)` if it does not exist. A file or a directory."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(str(path.relative_to(cache_dir()))):
        if path.exists():
            return path
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        remove(temporary)
        try:
            make(temporary)
            temporary.rename(path)
        finally:
            remove(temporary)
    return path


def remove(path: Path) -> None:
    """Remove a file or a directory tree, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def point(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to its neighbour `target`, replacing what it pointed to."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.rename(link)


def key(*parts: str | bytes | Path) -> str:
    """A short name for a combination of inputs: texts, bytes and the contents of files."""
    digest = hashlib.sha256()
    for part in parts:
        data = (
            part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        )
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]
