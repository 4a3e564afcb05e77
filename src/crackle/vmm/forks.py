"""`MicroVM.fork`: clones of a microVM that runs, as objects of this program, each with a process of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from crackle.errors import ConfigError
from crackle.schema.fork import MAX_CLONES, Clone, Fork
from crackle.vmm.commands import Command
from crackle.vmm.controller import Controller
from crackle.vmm.identity import CloneOptions, Identities, Identity
from crackle.vmm.remote import Link, RemoteController
from crackle.vmm.wire import LEND, Birth, Lent

if TYPE_CHECKING:
    from crackle.vmm.microvm import MicroVM

# What a clone of a snapshot may have otherwise, and one that goes on at once may not.
_NOT_NOW = (
    *("devices", "in_process", "metadata_limit", "profile", "jail", "core_scheduling"),
    *("handler", "huge_pages", "track_dirty_pages", "clock_realtime"),
)


def fork(vm: MicroVM, n: int, first: int, options: CloneOptions) -> list[MicroVM]:
    """As `MicroVM.fork`, which says what it is, in the caller's turn."""
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_CLONES:
        raise ConfigError(f"a microVM is forked once to {MAX_CLONES} times, not {n!r} times")
    for name in _NOT_NOW:
        if name in options:
            raise ConfigError(f"{name}: a clone of a running microVM is in this as the microVM is")
    identities = Identities(vm.config, "", "", options).of_all(range(first, first + n))
    request = Fork([_clone(each) for each in identities])
    made: list[tuple[MicroVM, Link]] = []
    try:
        for each in identities:
            link = Link()
            try:
                made.append((type(vm).begin_fork(each.instance_id, each.hosting, link), link))
            except BaseException:
                link.close()
                raise
        state = vm.state
        _order(vm, request, [(*link.theirs, *child._ends) for child, link in made])
        for child, link in made:
            link.close_theirs()
            child.finish_fork(state)
    except BaseException:
        for child, link in made:
            link.close_theirs()
            child.stop()
        raise
    return [child for child, _ in made]


def _clone(identity: Identity) -> Clone:
    request = identity.request
    clone = Clone(
        id=identity.instance_id,
        network_overrides=request.network_overrides,
        vsock_override=request.vsock_override,
        drive_overrides=request.drive_overrides,
    )
    if identity.metadata is not None:
        clone.mmds = identity.metadata
    return clone


def _order(vm: MicroVM, request: Fork, lent: Sequence[Lent]) -> None:
    controller = vm._controller
    if isinstance(controller, RemoteController):
        with _there(lent) as whole:
            for fds in whole:
                controller.submit(Command(LEND), fds)
        controller.execute(Command("fork", request))
    else:
        _fork_here(controller, request, lent)


@contextlib.contextmanager
def _there(lent: Sequence[Lent]) -> Iterator[list[Lent]]:
    """The same with something harmless where there is no console."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield [(a, b, c if c >= 0 else null, d if d >= 0 else null) for a, b, c, d in lent]
    finally:
        os.close(null)


def _fork_here(controller: Controller, request: Fork, lent: Sequence[Lent]) -> None:
    """Have this process forked, with all that it is: a clone runs nothing of the program's."""
    from crackle.monitor.clone import ServedCloner

    birth = Birth("", controller.metadata_limit, os.getcwd())
    # In the child what belongs to the objects here is closed by them.
    copies: list[Lent] = []
    try:
        for a, b, c, d in lent:
            copies.append((os.dup(a), os.dup(b), _dup(c), _dup(d)))
        controller.cloner = lambda: ServedCloner(birth, copies, lambda: None)
        controller.execute(Command("fork", request))
    finally:
        controller.cloner = None
        for fds in copies:
            for fd in fds:
                if fd >= 0:
                    os.close(fd)


def _dup(fd: int) -> int:
    return os.dup(fd) if fd >= 0 else -1
