"""`Snapshot`: a snapshot as a Python object, from which any number of microVMs go on. Public as `crackle.Snapshot`."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Unpack

from crackle.errors import ConfigError, CrackleError, StateError
from crackle.schema.config import VmConfig
from crackle.snapshot import statefile
from crackle.snapshot.handler import RECORDED_S
from crackle.snapshot.load import Template
from crackle.snapshot.pair import find
from crackle.vmm import processes
from crackle.vmm.arguments import pair_of
from crackle.vmm.closing import Closing
from crackle.vmm.commands import Command
from crackle.vmm.identity import CloneOptions, Identities, Identity
from crackle.vmm.microvm import MicroVM
from crackle.vmm.remote import RemoteController

_keys = itertools.count(1)

# How many are made at a time: each waits for the kernel more than it computes.
_AT_ONCE = 4 * (os.cpu_count() or 1)


class Snapshot(Closing):
    """A snapshot on the disk, as `MicroVM.snapshot` has made it.

    path: its directory; or the state file, and `memory` the memory file. They are read once, and may be replaced then;
    the memory file must not be changed while a microVM lives that went on from it. A context manager; `close` gives the
    files back, and microVMs go on. ConfigError when there is no such snapshot.
    """

    def __init__(self, path: str | os.PathLike[str], memory: str | os.PathLike[str] | None = None) -> None:
        state_path, memory_path = pair_of(path, memory)
        # For whoever is to name them later, wherever it is then.
        self.paths = os.path.abspath(state_path), os.path.abspath(memory_path)
        self.template = Template(*find(state_path, memory_path))
        self.key = next(_keys)
        self._state_fd = -1
        self._closed = False

    def descriptors(self) -> Sequence[int]:
        """For `crackle.vmm.processes`: of a file with the state, and of the memory file."""
        if self._state_fd < 0:
            self._state_fd = os.memfd_create("snapshot")
            with open(self._state_fd, "wb", closefd=False) as file:
                file.write(statefile.encode(self.template.snapshot))
        # All who have it read it from its beginning.
        os.lseek(self._state_fd, 0, os.SEEK_SET)
        return self._state_fd, self.template.memory_fd

    @property
    def config(self) -> VmConfig:
        """The configuration of the microVM that was saved. A copy."""
        config, fd = self.template.copy()
        os.close(fd)
        return config.config

    def restore(self, **options: Any) -> MicroVM:
        """The microVM of the snapshot, as `MicroVM.restore` has it, with the same arguments."""
        self._check_open()
        return MicroVM.restore(*self.paths, **options)

    def clone(
        self, n: int = 1, *, resume: bool = True, first: int = 0, **options: Unpack[CloneOptions]
    ) -> list[MicroVM]:
        """`n` microVMs that go on from here, running, or paused without `resume`; each with a process of its own.

        Their numbers are `first` and those that follow. A template is text with `{index}`, the number, or `{id}`, the
        instance id, in it; a callable gets the number.

        instance_id: a template or callable; by default each has one that nobody else has. interfaces: the TAP device
        of each interface, by its identifier, as templates or callables. They must be given. macs: likewise another
        MAC address, for guests that look at it again: a driver that is bound keeps what it has. vsock: the path of
        the Unix socket, a template or callable; by default that of the snapshot, a dot and the id. cid: a callable
        that says the guest's CID, at which it looks again; by default it is as it was. drives: other files, by the
        drives' identifiers, as templates or callables. overlays: likewise new files that take a drive's writes, over
        what it was, or an `Overlay` in memory. Drives that are read-only are shared if they are not named; those
        with an overlay get `{id}.<drive>.overlay` beside it; others have to be named. metadata: a document, or a
        callable that gives one, where the guest has a metadata service. in_process: they run in this process.
        devices: a callable that gives new instances of those written in Python, which takes `in_process`. console: a
        callable that gives (input, output) descriptors, as for `MicroVM`. handler: the socket of a page-fault handler
        that gives the memory. jail: a `Jail`, or a callable that gives one, as each should have a user of its own; its
        paths, netns and parent_cgroup are templates. Each clone has its own, in which it sees its drives and their
        overlays; the folders of vsock sockets and of overlays that are to be made have to be in `paths`. The rest,
        core_scheduling among it, as for `MicroVM.restore`.

        When one cannot be had, none is: ConfigError says why.
        """
        self._check_open()
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigError(f"a snapshot is cloned at least once, not {n!r} times")
        identities = self.identities(options).of_all(range(first, first + n))
        vms: list[MicroVM] = []
        with _all_or_none(vms):
            # More at a time would only wait for each other.
            for place in range(0, n, _AT_ONCE):
                vms += finish(self.begin(identities[place : place + _AT_ONCE]), resume=False)
            if resume:
                resume_all(vms)
        return vms

    def warm(self, seconds: float = RECORDED_S, **options: Unpack[CloneOptions]) -> int:
        """Note what the guest wants of its memory first, for `crackle snapshot serve` to read ahead: how many bytes.

        One clone runs for so many seconds, or until it ends by itself, and then is stopped. It is as `options` say, as
        for `clone`; a drive that they do not name, and it may write to, gets an overlay in memory. What is noted
        already is replaced. ConfigError when there can be no such clone, or nothing can be noted.
        """
        from crackle.vmm.warming import warm

        return warm(self, seconds, options)

    def identities(self, options: CloneOptions) -> Identities:
        """Of clones with these options."""
        self._check_open()
        return Identities(self.template.snapshot.config, *self.paths, options)

    def begin(self, identities: Iterable[Identity]) -> list[MicroVM]:
        """MicroVMs that load this snapshot, all at a time; `finish` waits for them."""
        vms: list[MicroVM] = []
        with _all_or_none(vms):
            for each in identities:
                vms.append(
                    MicroVM.begin_load(each.instance_id, each.hosting, each.request, each.metadata, self)
                )
        return vms

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("this snapshot has been closed")

    def close(self) -> None:
        """Give the files back. What has been made of it goes on. Idempotent."""
        if self._closed:
            return
        self._closed = True
        processes.forget(self.key)
        self.template.close()
        fd, self._state_fd = self._state_fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    def __repr__(self) -> str:
        return f"<Snapshot {self.template.snapshot.id} of {self.template.snapshot.instance_id!r}>"


def finish(vms: list[MicroVM], *, resume: bool) -> list[MicroVM]:
    """What `Snapshot.begin` began, done: the same microVMs. None is left when one fails."""
    with _all_or_none(vms):
        for vm in vms:
            vm.finish_load(resume=False)
        if resume:
            resume_all(vms)
    return vms


@contextlib.contextmanager
def _all_or_none(vms: list[MicroVM]) -> Iterator[None]:
    """Whatever goes wrong meanwhile, none of them is left."""
    try:
        yield
    except BaseException:
        stop_all(vms)
        raise


def resume_all(vms: Sequence[MicroVM], *, wait: bool = True) -> None:
    """Let all go on, none of which waits for another. Without `wait` the next order to one says whether it has."""
    _order_all(vms, Command("resume"), wait=wait)


def stand_by_all(vms: Sequence[MicroVM]) -> None:
    """Have everything there that all need to go on."""
    # Twice: what the first order for a process touches is its own then.
    for _ in range(2):
        _order_all(vms, Command("stand_by"))


def _order_all(vms: Sequence[MicroVM], command: Command, *, wait: bool = True) -> None:
    for vm in vms:
        if isinstance(vm._controller, RemoteController):
            vm._controller.submit(command)
        else:
            vm._controller.execute(command)
    for vm in vms if wait else ():
        if isinstance(vm._controller, RemoteController):
            vm._controller.collect()


def stop_all(vms: Iterable[MicroVM]) -> None:
    """Stop all, none of which waits for another."""
    vms = list(vms)
    for vm in vms:
        if isinstance(vm._controller, RemoteController):
            vm._controller.begin_stop()
    for vm in vms:
        with contextlib.suppress(CrackleError):
            vm.stop()
