"""`Pool`: microVMs of a snapshot that are ready before somebody wants them. Public as `crackle.Pool`.

A ready one has been loaded and stands still: process, virtual machine, memory and devices are there, and all that is
left is to let it go on. New ones are made on a thread of the pool's, a few at a time, when nobody has taken one for a
moment.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections import deque
from functools import partial
from typing import Any, Unpack

from crackle.errors import CapacityError, ConfigError, CrackleError, StateError
from crackle.runtime.ownership import enrol
from crackle.vmm import processes
from crackle.vmm.arguments import document_of
from crackle.vmm.clones import Snapshot, finish, resume_all, stand_by_all, stop_all
from crackle.vmm.closing import Closing
from crackle.vmm.identity import CloneOptions
from crackle.vmm.microvm import MicroVM

# Seconds without a taker after which the processors are the pool's.
_QUIET_S = 0.05
# Seconds until it is tried again to make what could not be made, doubled each time.
_AGAIN_S, _AGAIN_MAX_S = 0.1, 5.0


class Pool(Closing):
    """`size` microVMs of a snapshot are kept ready, and `take` lets one go on in less than a millisecond.

    snapshot: a `Snapshot`, or the path of one. limit: how many there may be at a time, ready ones and those that were
    taken and have not been stopped; no bound by default. at_once: how many are made at a time; by default as many as
    there are processors. The rest as for `Snapshot.clone`; a clone's number, `{index}` in a template, is the lowest
    that none has which has not been stopped: with a `limit` it is below that.

    A context manager; `close` stops those that nobody has taken. Any thread may call. ConfigError when there can be no
    such pool.
    """

    def __init__(
        self,
        snapshot: Snapshot | str | os.PathLike[str],
        size: int = 4,
        *,
        limit: int | None = None,
        at_once: int | None = None,
        **options: Unpack[CloneOptions],
    ) -> None:
        self._size = _count(size, "size")
        self._limit = None if limit is None else _count(limit, "limit")
        if self._limit is not None and self._limit < self._size:
            raise ConfigError(f"a pool with a limit of {limit} cannot keep {size} ready")
        self._at_once = _count(at_once or os.cpu_count() or 1, "at_once")
        self._owned = not isinstance(snapshot, Snapshot)
        self._snapshot = snapshot if isinstance(snapshot, Snapshot) else Snapshot(snapshot)
        try:
            self._identities = self._snapshot.identities(options)
            # What two have in common is a mistake that is better told now.
            self._identities.of_all(range(min(self._size, 2)))
            self._read_ahead()
            if not options.get("in_process", False):
                processes.start()
        except BaseException:
            self._close_snapshot()
            raise
        # All that is below is guarded by this lock, with which nothing waits.
        self._changed = threading.Condition()
        self._ready: deque[MicroVM] = deque()
        self._making = 0
        self._taken = 0
        self._next = 0
        self._free: list[int] = []
        self._waiting = 0
        self._last_taken = -_QUIET_S
        self._failure: CrackleError | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._keep, name="pool", daemon=True)
        self._thread.start()
        enrol(self)

    def _read_ahead(self) -> None:
        """Have the memory file in the page cache, where it is not yet."""
        os.posix_fadvise(self._snapshot.template.memory_fd, 0, 0, os.POSIX_FADV_WILLNEED)

    # -- taking --------------------------------------------------------------------------------------------------

    def take(self, timeout: float = 0.0, *, metadata: Any = None) -> MicroVM:
        """A microVM that goes on from the snapshot, and is the caller's to stop.

        timeout: seconds to wait for one if none is ready. metadata: a document instead of that which it was made with.
        CapacityError when there is none.
        """
        return self.take_many(1, timeout, metadata=metadata)[0]

    def take_many(self, n: int, timeout: float = 0.0, *, metadata: Any = None) -> list[MicroVM]:
        """So many at a time, or none. As `take`."""
        if _count(n, "n") > self._size:
            raise ConfigError(f"a pool of {self._size} cannot give {n} at a time")
        if metadata is not None:
            metadata = document_of(metadata)
        until = time.monotonic() + timeout
        try:
            while True:
                vms = self._pick(n, until)
                try:
                    if metadata is not None:
                        for vm in vms:
                            vm.metadata = metadata
                    resume_all(vms, wait=False)
                    return vms
                except BaseException as error:
                    stop_all(vms)
                    # One that has just been killed is no reason to have none.
                    if not isinstance(error, StateError):
                        raise
        finally:
            # Not before: its thread would want the interpreter, too.
            with self._changed:
                self._changed.notify_all()

    def _pick(self, n: int, until: float) -> list[MicroVM]:
        dead: list[MicroVM] = []
        try:
            with self._changed:
                while True:
                    self._check_open()
                    # A process may have been killed meanwhile.
                    while len(self._ready) >= n and not all(map(_lives, self._first(n))):
                        found = [vm for vm in self._ready if not _lives(vm)]
                        dead += found
                        self._taken += len(found)
                        self._ready = deque(vm for vm in self._ready if _lives(vm))
                    if len(self._ready) >= n:
                        break
                    self._wait_for_more(until)
                self._last_taken = time.monotonic()
                self._taken += n
                return [self._ready.popleft() for _ in range(n)]
        finally:
            stop_all(dead)

    def _first(self, n: int) -> list[MicroVM]:
        return [self._ready[place] for place in range(n)]

    def _wait_for_more(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0:
            why = f"{len(self._ready)} are ready, {self._making} being made, {self._taken} in use"
            if self._limit is not None:
                why += f" of {self._limit} at most"
            if self._failure is not None:
                why += f"; the last could not be made: {self._failure}"
            raise CapacityError(f"no capacity: {why}")
        self._waiting += 1
        try:
            self._changed.notify_all()
            self._changed.wait(left)
        finally:
            self._waiting -= 1

    @property
    def ready(self) -> int:
        """How many can be taken at once."""
        with self._changed:
            return len(self._ready)

    def wait_ready(self, n: int | None = None, timeout: float | None = None) -> None:
        """Wait until so many are ready, by default all. TimeoutError; CrackleError when they cannot be made."""
        wanted = self._size if n is None else n
        with self._changed:
            failed = self._failure

            def done() -> bool:
                self._check_open()
                return len(self._ready) >= wanted or (
                    self._failure is not None and self._failure is not failed
                )

            if not self._changed.wait_for(done, timeout):
                raise TimeoutError(f"{len(self._ready)} of {wanted} microVMs are ready after {timeout:g} s")
            if len(self._ready) < wanted and self._failure is not None:
                raise self._failure

    # -- making --------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        pause = _AGAIN_S
        while (numbers := self._next_numbers()) is not None:
            vms: list[MicroVM] = []
            failure: CrackleError | None = None
            try:
                vms = self._snapshot.begin(map(self._identities.of, numbers))
                finish(vms, resume=False)
                stand_by_all(vms)
                for vm, number in zip(vms, numbers, strict=True):
                    vm.when_ended(partial(self._stopped, number))
            except CrackleError as error:
                failure, vms = error, []
            except Exception as error:
                # The host has no more room, or a callable does not say what it should.
                failure, vms = CrackleError(f"{type(error).__name__}: {error}"), []
            with self._changed:
                self._making -= len(numbers)
                self._failure = failure
                self._ready += vms
                if failure is not None:
                    for number in numbers:
                        heapq.heappush(self._free, number)
                self._changed.notify_all()
                if failure is None:
                    pause = _AGAIN_S
                    continue
                self._changed.wait_for(lambda: self._closing, pause)
                pause = min(2 * pause, _AGAIN_MAX_S)

    def _next_numbers(self) -> list[int] | None:
        """Of those that are to be made now, once some are; None when there is an end to it."""
        with self._changed:
            while not self._closing:
                lacking = self._size - len(self._ready)
                if self._limit is not None:
                    lacking = min(lacking, self._limit - len(self._ready) - self._taken)
                quiet = self._last_taken + _QUIET_S - time.monotonic()
                if lacking > 0 and (quiet <= 0 or self._waiting):
                    # One that cannot be made is not to take others with it.
                    self._making = min(lacking, self._at_once if self._failure is None else 1)
                    return [self._number() for _ in range(self._making)]
                self._changed.wait(quiet if lacking > 0 else None)
        return None

    def _number(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def _stopped(self, number: int) -> None:
        """One that was made has given everything back."""
        with self._changed:
            self._taken = max(0, self._taken - 1)
            heapq.heappush(self._free, number)
            self._changed.notify_all()

    # -- the end -------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closing:
            raise StateError("this pool has been closed")

    def close(self) -> None:
        """Stop those that nobody has taken, and make no more. Idempotent."""
        with self._changed:
            first, self._closing = not self._closing, True
            self._changed.notify_all()
        if not first:
            return
        self._thread.join()
        with self._changed:
            ready = list(self._ready)
            self._ready.clear()
            self._taken += len(ready)
        stop_all(ready)
        self._close_snapshot()

    def _close_snapshot(self) -> None:
        if self._owned:
            self._snapshot.close()

    end = close

    def disown(self) -> None:
        """In a forked child, where there is no thread: it is the parent's."""
        self._changed = threading.Condition()
        self._closing = True
        self._ready.clear()

    def runs(self, thread: int) -> bool:
        """Whether that is its thread."""
        return thread == self._thread.ident

    def __repr__(self) -> str:
        return f"<Pool: {self.ready} of {self._size} ready>"


def _lives(vm: MicroVM) -> bool:
    return vm.exit_status is None


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{what} of a pool is a number from 1 on, not {value!r}")
    return value
