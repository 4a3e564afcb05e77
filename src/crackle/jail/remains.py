"""What jails leave of themselves on the host, if nobody takes it away: the cgroups that were made for them.

Whoever has started the processes that are in jails, and is in none itself, keeps a `Remains` for all of them.
"""

from __future__ import annotations

import contextlib
import os
import select

from crackle.errors import ConfigError
from crackle.jail.cgroups import plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from crackle.runtime.loop import Loop
    from crackle.schema.jail import Jail

# Seconds after which a cgroup is tried again that has no processes, and is not to be had yet.
_AGAIN_S = 0.02


class Remains:
    """Takes a jail's cgroups away when nobody is in them; what was there before the jail, stays."""

    def __init__(self) -> None:
        # What each process's jail has for itself, and what several have in common, the outermost first.
        self._own: dict[int, list[str]] = {}
        self._common: list[str] = []

    def expect(self, jail: Jail, name: str) -> list[str]:
        """What is going to be made for the jail of the microVM `name`, and nobody else is in; for `note`."""
        try:
            wanted = plan(str(jail.cgroup_version), jail.cgroups, jail.parent_cgroup, name)
        except ConfigError:
            return []  # the process will say so
        made = [] if wanted is None else [path for path in wanted.makes() if not os.path.isdir(path)]
        own = [path for path in made if os.path.basename(path) == name]
        self._common += [path for path in made if path not in own and path not in self._common]
        return own

    def note(self, pid: int, own: list[str]) -> None:
        """That process is going to be in these."""
        if own:
            self._own[pid] = own

    def clear(self, loop: Loop, pid: int) -> None:
        """That process has ended: take away what was its, as soon as nobody else is there."""
        own = self._own.get(pid)
        if own is None:
            return
        left = _remove(own)
        if left is None:
            del self._own[pid]
            self._remove_common()
        elif left == 0:
            loop.call_later(_AGAIN_S, lambda: self.clear(loop, pid))
        else:
            _when_ended(loop, left, lambda: self.clear(loop, pid))

    def clear_all(self) -> None:
        """The same for all, which may still have their processes, for who has nothing else to do."""
        while self._own:
            pid, own = next(iter(self._own.items()))
            left = _remove(own)
            if left is None:
                del self._own[pid]
            elif left == 0:
                select.select([], [], [], _AGAIN_S)
            else:
                with contextlib.suppress(ProcessLookupError):
                    end = os.pidfd_open(left)
                    select.select([end], [], [])
                    os.close(end)
        self._remove_common()

    def __bool__(self) -> bool:
        return bool(self._own or self._common)

    def _remove_common(self) -> None:
        """What other jails of this program's may still be in, or those of another, stays until they are gone."""
        if not self._own:
            for path in sorted(self._common, reverse=True):
                with contextlib.suppress(OSError):
                    os.rmdir(path)
            self._common.clear()


def _remove(paths: list[str]) -> int | None:
    """Remove these cgroups; None when they are gone, else a process that is in one, or 0."""
    while paths:
        try:
            os.rmdir(paths[-1])
        except FileNotFoundError:
            pass
        except OSError:
            return _member(paths[-1])
        paths.pop()
    return None


def _member(path: str) -> int:
    try:
        with open(f"{path}/cgroup.procs", encoding="ascii") as file:
            return int(file.readline() or 0)
    except OSError:
        return 0


def _when_ended(loop: Loop, pid: int, call: Callable[[], None]) -> None:
    try:
        end = os.pidfd_open(pid)
    except ProcessLookupError:
        loop.call_later(0, call)
        return

    def ended(_events: int) -> None:
        loop.forget(end)
        os.close(end)
        call()

    loop.watch(end, ended)
