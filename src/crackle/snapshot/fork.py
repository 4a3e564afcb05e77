"""A live fork: a running microVM becomes itself and clones, each a process of its own, in memory and without a file.

The machine stands still while its state is taken and the process forks (fork(2)), which makes guest memory
copy-on-write; then it runs on. The child of that fork, the *template*, forks the clones one after the other, for which
nobody stands still, and ends: clones are nobody's children, and whoever reaps orphans reaps them. KVM's descriptors are
of no use in another address space, so each clone makes a virtual machine of its own over the memory that it has, and
says on its *line* that it is ready. When all are, the parent opens the *gate*: one write(2), of which each clone reads
a byte. Whoever finds the gate closed instead, because another clone failed or the parent is gone, gives everything back
and ends.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import _socket
import contextlib
import gc
import os
import select
import time

import msgspec

from crackle.errors import ConfigError, CrackleError, os_reason
from crackle.memory.huge import gather_pages
from crackle.runtime.child import fork_child
from crackle.runtime.system import fork as fork_process
from crackle.schema.fork import Forked, ForkedClone
from crackle.snapshot.state import MemoryFile, Snapshot
from crackle.version import VERSION
from crackle.vmm.commands import PAUSED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn, Protocol

    from crackle.memory import GuestMemory
    from crackle.schema import VmConfig
    from crackle.schema.fork import Clone
    from crackle.snapshot.state import MachineState

    class Machine(Protocol):
        """As far as it concerns a fork."""

        @property
        def memory(self) -> GuestMemory: ...
        @property
        def state(self) -> str: ...
        def pause(self) -> None: ...
        def resume(self) -> None: ...
        def check_forkable(self) -> None: ...
        def save(self, *, durable: bool = True) -> MachineState: ...
        def dirty_pages(self) -> list[bytes] | None: ...
        def fork(self) -> int: ...

    Become = Callable[["Heritage", int, Clone, "Line"], NoReturn]

# Seconds that clones have to become ready, and seconds more for each.
_PATIENCE_S = 10.0
_PATIENCE_EACH_S = 0.2
# Seconds for making pages huge, at most.
_GATHERING_S = 2.0
# Seconds that clones which are not wanted have to give everything back, before they are killed.
_GRACE_S = 5.0

# What a clone says, and how long a message is at most.
_BORN, _READY, _FAILED = b"B", b"R", b"F"
_MESSAGE_MAX = 4096


class Heritage:
    """What a clone has from its parent, in its own address space. Restored from like a snapshot that has been loaded.

    document: the metadata document, if there is one. running: whether it goes on at once. dirty: as
    `Machine.dirty_pages` gave it.
    """

    # The guest's clock goes on: no time has passed that it could have missed.
    clock_realtime = True

    def __init__(
        self,
        machine: Machine,
        config: VmConfig,
        instance_id: str,
        document: Any,
        *,
        running: bool,
    ) -> None:
        self.memory = machine.memory
        self.document = document
        self.running = running
        self.snapshot = Snapshot(
            id="",
            crackle=VERSION,
            instance_id=instance_id,
            created_ms=0,
            config=config,
            machine=machine.save(durable=False),
            memory=MemoryFile(size=machine.memory.size, samples=(), checksum=0),
        )
        self.dirty = machine.dirty_pages()

    @property
    def descriptors(self) -> set[int]:
        """What the clone keeps open for it."""
        return set()

    def take(self, config: VmConfig) -> None:
        """Go on with `config`, into which the parent's has been made."""
        self.snapshot = msgspec.structs.replace(self.snapshot, config=config)

    def fill(
        self, memory: GuestMemory, _report: Callable[[str], None]
    ) -> contextlib.AbstractContextManager[object]:
        """The memory of the machine that is being restored is the one that was inherited already."""
        if memory is not self.memory:
            raise ConfigError("the clone's machine was made with other memory than its parent's")
        return contextlib.nullcontext()

    def close(self) -> None:
        """Nothing is open for it."""


class Line:
    """A clone's connection to the parent, and the gate.

    Open until the gate is; else until the process ends, which is what the parent waits for.
    """

    def __init__(self, connection: _socket.socket, gate: int) -> None:
        self._connection = connection
        self._gate = gate
        self.open = False

    @property
    def descriptors(self) -> set[int]:
        """What it has open."""
        return {fd for fd in (self._connection.fileno(), self._gate) if fd >= 0}

    def born(self) -> None:
        """Tell which process this is."""
        self._say(_BORN + str(os.getpid()).encode())

    def wait(self) -> bool:
        """Say that all is ready; whether the parent has opened the gate then."""
        self._say(_READY)
        self.open = os.read(self._gate, 1) != b""
        if self.open:
            self.close()
        return self.open

    def fail(self, reason: str) -> None:
        """Say that it will not be, unless it is already."""
        if not self.open:
            self._say(_FAILED + reason.encode(errors="replace")[: _MESSAGE_MAX - 1])

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()
        gate, self._gate = self._gate, -1
        if gate >= 0:
            os.close(gate)

    def _say(self, message: bytes) -> None:
        # A parent that is gone is seen at the gate.
        with contextlib.suppress(OSError):
            self._connection.send(message, _socket.MSG_NOSIGNAL)


def fork(
    machine: Machine,
    config: VmConfig,
    instance_id: str,
    clones: list[Clone],
    become: Become,
    *,
    document: Any = None,
    split: Callable[[Heritage], None] = lambda _heritage: None,
) -> Forked:
    """Have `clones`, complete as `plan` makes them, go on from where `machine` is, which goes on as before.

    become: what a clone does in its process, given its number too, and does not return from. split: done while the
    machine stands still, after its state is taken. ConfigError with the reason when one of them cannot be: then there
    is none.
    """
    machine.check_forkable()
    # While the guest runs: it stands still for as long as the kernel has pages to look at.
    gather_pages(machine.memory, _GATHERING_S)
    family = _Family(clones)
    try:
        begin = time.monotonic_ns()
        running = machine.state != PAUSED
        machine.pause()
        try:
            heritage = Heritage(machine, config, instance_id, document, running=running)
            split(heritage)
            template = _fork_quietly(machine.fork, lambda: family.be_template(heritage, become))
        finally:
            if running:
                machine.resume()
            pause_us = (time.monotonic_ns() - begin) // 1000
            family.begin()
        try:
            family.await_all()
        finally:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(template, 0)
        family.let_go()
    finally:
        family.close()
    return Forked(
        [
            ForkedClone(clone.id or "", pid, clone.api_sock or "")
            for clone, pid in zip(clones, family.pids, strict=True)
        ],
        pause_us if running else 0,
    )


def _fork_quietly(fork: Callable[[], int], child: Callable[[], NoReturn]) -> int:
    """The process that does what `child` says: there no signal arrives, and nothing is collected, before it wants that.

    ConfigError when there can be none.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return fork_child(child, fork=fork)
    except OSError as error:
        raise ConfigError(f"cannot fork the process: {os_reason(error)}") from None
    finally:
        if collecting:
            gc.enable()


class _Family:
    """The clones of one fork, as the parent and the template know them."""

    def __init__(self, clones: list[Clone]) -> None:
        self._clones = clones
        self.pids = [0] * len(clones)
        self._ours: list[_socket.socket] = []
        self._theirs: list[_socket.socket] = []
        self._gate = self._gate_opener = self._start = self._starter = -1
        try:
            self._gate, self._gate_opener = os.pipe2(os.O_CLOEXEC)
            self._start, self._starter = os.pipe2(os.O_CLOEXEC)
            for _ in clones:
                ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
                self._ours.append(ours)
                self._theirs.append(theirs)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"cannot make a connection for each of {len(clones)} clones: {os_reason(error)}"
            ) from None

    # -- the template ----------------------------------------------------------------------------------------------

    def be_template(self, heritage: Heritage, become: Become) -> NoReturn:
        """Fork each clone, and end."""
        # The processors are the parent's until its guest runs again.
        self._close("_starter")
        os.read(self._start, 1)
        self._close("_start", "_gate_opener")
        self._close_all(self._ours)
        for index, (clone, line) in enumerate(zip(self._clones, list(self._theirs), strict=True)):
            try:
                pid = fork_process()
            except OSError as error:
                Line(line, -1).fail(f"cannot fork the process: {os_reason(error)}")
                break
            if not pid:
                self._theirs.remove(line)
                self._close_all(self._theirs)
                become(heritage, index, clone, Line(line, self._gate))
        os._exit(0)

    # -- the parent ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Let the template begin. Idempotent."""
        self._close("_starter")

    def await_all(self) -> None:
        """Until every clone is ready. When one fails none goes on, and ConfigError says why."""
        self._close_all(self._theirs)
        deadline = time.monotonic() + _PATIENCE_S + _PATIENCE_EACH_S * len(self._clones)
        waiting = dict(enumerate(self._ours))
        try:
            while waiting:
                for index in _readable(waiting, deadline):
                    if self._hear(index):
                        del waiting[index]
        except BaseException:
            self._call_off()
            raise

    def _hear(self, index: int) -> bool:
        """Whether this clone is ready."""
        name = self._clones[index].id
        message = _received(self._ours[index])
        kind, text = message[:1], message[1:]
        if kind == _BORN:
            self.pids[index] = int(text)
            return False
        if kind == _FAILED:
            raise ConfigError(f"the clone {name!r} cannot be: {text.decode(errors='replace')}")
        if not kind:
            raise ConfigError(f"the clone {name!r} ended before it was ready")
        return True

    def _call_off(self) -> None:
        """Wait until no clone is left."""
        self._close("_gate_opener", "_gate")
        deadline = time.monotonic() + _GRACE_S
        left = dict(enumerate(self._ours))
        with contextlib.suppress(CrackleError):
            while left:
                for index in _readable(left, deadline):
                    message = _received(left[index])
                    if message[:1] == _BORN:
                        self.pids[index] = int(message[1:])
                    elif not message:
                        del left[index]
        for index in left:
            # Its end of the line is open, so it is still that process.
            if self.pids[index]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[index], _signal.SIGKILL)

    def let_go(self) -> None:
        """All of them at once; if this process ends before that, none of them."""
        os.write(self._gate_opener, bytes(len(self._clones)))

    def close(self) -> None:
        """Idempotent."""
        self._close("_gate_opener", "_gate", "_starter", "_start")
        self._close_all(self._ours)
        self._close_all(self._theirs)

    def _close(self, *names: str) -> None:
        for name in names:
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)

    @staticmethod
    def _close_all(connections: list[_socket.socket]) -> None:
        for connection in connections:
            connection.close()
        connections.clear()


def _readable(connections: dict[int, _socket.socket], deadline: float) -> list[int]:
    """Those of which there is something to hear. ConfigError when there is nothing until the deadline."""
    poll = select.poll()
    numbers = {}
    for index, connection in connections.items():
        poll.register(connection, select.POLLIN)
        numbers[connection.fileno()] = index
    ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    if not ready:
        raise ConfigError("a clone was not ready in time")
    return [numbers[fd] for fd, _ in ready]


def _received(connection: _socket.socket) -> bytes:
    """What was said; nothing when the other end is closed."""
    try:
        return connection.recv(_MESSAGE_MAX)
    except OSError:
        return b""
