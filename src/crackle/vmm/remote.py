"""A microVM in a process of its own, as its program has it: the controller's interface, over a channel.

`MicroVM` gives a `RemoteController` the commands that it would give a `Controller`, and gets the same results and
errors. The other end is `crackle.monitor.served.ServedProcess`. Both share a `Link`: whoever makes a process for a
microVM in another way (a fork of one that runs) makes one, and has the process serve its other ends:

    link = Link()
    ...                      # the process serves copies of link.theirs: commands, events
    link.close_theirs()
    controller = RemoteController(link, instance_id)
    controller.adopt(state)  # for a machine that is there already, and is "Running" or "Paused"

How the guest ends comes on another socket, which is looked at and never emptied: so it stays readable, and any thread
can ask. Its process's end comes on the same one: from who started it, or as the end of the stream.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import _socket
import contextlib
import os
import select
import threading
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from crackle import errors
from crackle.errors import CrackleError, StateError
from crackle.runtime.channel import Channel, pair
from crackle.runtime.inherit import ENDED, status_of
from crackle.schema.balloon import Balloon, BalloonHintingStatus, BalloonStats
from crackle.schema.config import VmConfig
from crackle.schema.fork import Forked
from crackle.schema.instance import InstanceInfo, Version
from crackle.schema.machine import MachineConfig
from crackle.vmm.commands import NOT_STARTED, STOPPED, Command
from crackle.vmm.machine import EXIT_ERROR, EXIT_OK, ExitStatus, await_end
from crackle.vmm.wire import GUEST_ENDED, HELLO, Answer, Order, encode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# What the commands' results are; those that are not there have any JSON, or none.
_RESULTS: Mapping[str, Any] = {
    "get_balloon": Balloon,
    "get_balloon_hinting": BalloonHintingStatus,
    "get_balloon_statistics": BalloonStats,
    "get_config": VmConfig,
    "get_instance": InstanceInfo,
    "get_machine": MachineConfig,
    "get_version": Version,
    "get_metrics": dict[str, dict[str, Any]],
    "fork": Forked,
}
# These make the machine.
_BEGINNINGS = ("start", "load_snapshot")

_EVENT_MAX = 65536

# Seconds that a process has to give everything back before it is killed.
STOP_TIMEOUT = 20.0

_ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, CrackleError)
}
_answers = msgspec.msgpack.Decoder(Answer)
_statuses = msgspec.msgpack.Decoder(ExitStatus)


class Link:
    """Two pairs of sockets, for commands and for events: this process's ends, and `theirs` until `close_theirs`."""

    def __init__(self) -> None:
        commands, theirs = pair()
        self.commands = Channel(commands, knows_sender=True)
        try:
            self.events, events = pair(_socket.SOCK_SEQPACKET)
        except BaseException:
            theirs.close()
            self.commands.close()
            raise
        self._theirs = theirs, events

    @property
    def theirs(self) -> tuple[int, int]:
        """The other process's descriptors for commands and events."""
        return self._theirs[0].fileno(), self._theirs[1].fileno()

    def close_theirs(self) -> None:
        """The other process has copies. Idempotent."""
        for end in self._theirs:
            end.close()

    def close(self) -> None:
        """Idempotent."""
        self.close_theirs()
        self.commands.close()
        self.events.close()


class RemoteMachine:
    """The machine in the other process, as far as its front needs one. Any thread may ask."""

    def __init__(self, controller: RemoteController, events: _socket.socket) -> None:
        self._execute = controller.execute
        self._events: _socket.socket = events
        self._ended: ExitStatus | None = None
        self._closing = threading.Lock()

    @property
    def exit_fd(self) -> int:
        """Readable when the guest has ended, or its process; -1 when it was stopped."""
        return self._events.fileno()

    def exit_status(self) -> ExitStatus | None:
        """Why the guest ended, or None while it has not."""
        with self._closing:
            if self._ended is None:
                self._ended = self._look()
            return self._ended

    def _look(self) -> ExitStatus | None:
        try:
            event = self._events.recv(_EVENT_MAX, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            event = b""
        if event.startswith(GUEST_ENDED):
            return _statuses.decode(event[len(GUEST_ENDED) :])
        how = _words(status_of(event)) if event.startswith(ENDED) else "has ended"
        return ExitStatus("process", f"the process of the microVM {how}", EXIT_ERROR)

    def wait(self, timeout: float | None = None) -> ExitStatus | None:
        """Why the guest ended, once it has; None if it has not within `timeout` seconds."""
        with self._closing:
            if self._ended is not None:
                return self._ended
            fd = os.dup(self._events.fileno())
        return await_end(fd, self.exit_status, timeout)

    def process_lives(self) -> bool:
        """Whether nobody has told of its process's end: then somebody has the other end of the events."""
        poll = select.poll()
        poll.register(self._events.fileno(), 0)
        return not poll.poll(0)

    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """As `Machine.metrics`."""
        found: Mapping[str, Mapping[str, Any]] = self._execute(Command("get_metrics"))
        return found

    def send_ctrl_alt_del(self) -> None:
        """Press Ctrl-Alt-Del on the guest's keyboard."""
        self._execute(Command("send_ctrl_alt_del"))

    def press_power_button(self) -> None:
        """Press the ACPI power button."""
        self._execute(Command("press_power_button"))

    def runs(self, _thread: int) -> bool:
        """Its threads are another process's."""
        return False

    def closed(self) -> None:
        """The process has given everything back."""
        with self._closing:
            if self._ended is None:
                self._ended = self._look()
            if self._ended is None or self._ended.reason == "process":
                self._ended = ExitStatus("stopped", "the microVM was stopped", EXIT_OK)
            self._events.close()


class RemoteController:
    """The controller of a microVM in another process: commands go there, results and errors come back.

    Owns its ends of the link until `stop`. Threads take turns. api_sock: where the process serves the API:
    then others give that controller commands, too.
    """

    def __init__(self, link: Link, instance_id: str, api_sock: str | None = None) -> None:
        self._api_sock = None if api_sock is None else os.path.abspath(api_sock)
        self.instance_id = instance_id
        self.machine: RemoteMachine | None = None
        self._link = link
        self._machine = RemoteMachine(self, link.events)
        self._lock = threading.RLock()
        self._state = NOT_STARTED
        # It says first who it is.
        self._owed = [HELLO]
        self._pid = 0
        self._directory: str | None = None
        self._config: VmConfig | None = None
        self._stopped = False

    def adopt(self, state: str) -> None:
        """The other process has a machine already, in this state."""
        self._state = state
        self.machine = self._machine

    # -- commands ------------------------------------------------------------------------------------------------

    def execute(self, command: Command, fds: Sequence[int] = ()) -> Any:
        """The command's result. Raises what the controller there raised; StateError when there is none any more.

        fds: descriptors that go with the command.
        """
        with self._lock:
            if self._stopped and command.name == "get_config" and self._config is not None:
                return self._config
            self.submit(command, fds)
            return self.collect()

    def submit(self, command: Command, fds: Sequence[int] = ()) -> None:
        """Send a command, whose result `collect` will give. For who has several microVMs do something at a time."""
        with self._lock:
            self._check_alive()
            directory = os.getcwd()
            changed = None if directory == self._directory else directory
            order = Order(command.name, msgspec.Raw(encode(command.resource)), changed)
            try:
                self._link.commands.send(encode(order), fds)
            except OSError:
                # It may have said why, before it ended.
                self.collect()
                self._gone()
            self._directory = directory
            self._owed.append(command.name)

    def collect(self) -> Any:
        """Wait for what has been submitted; the result of the last, or the first error."""
        result: Any = None
        failure: CrackleError | None = None
        with self._lock:
            while self._owed:
                try:
                    frame = self._receive()
                except StateError:
                    if failure is None:
                        raise
                    # It said why it would end.
                    break
                name = self._owed.pop(0)
                try:
                    result = self._taken(name, _answers.decode(frame))
                except CrackleError as error:
                    failure = failure or error
                except msgspec.DecodeError as error:
                    failure = CrackleError(f"the process of the microVM answers what is no answer: {error}")
        if failure is not None:
            raise failure
        return result

    def _receive(self) -> bytes:
        try:
            frame = self._link.commands.receive()
        except ValueError:
            frame = None  # nothing that it says means anything any more
        if frame is None:
            self._owed.clear()
            self._gone()
        return frame[0]

    def _taken(self, name: str, answer: Answer) -> Any:
        self._state = answer.state
        if answer.error is not None:
            raise _ERRORS.get(answer.error, CrackleError)(answer.words)
        if name in _BEGINNINGS:
            self.machine = self._machine
        result = msgspec.msgpack.decode(answer.result, type=_RESULTS.get(name, Any))
        if name == "get_config":
            self._config = result
        elif name == HELLO:
            # Not what it says: it may be in another process namespace, and taken over.
            self._pid = self._link.commands.sender
        return result

    def _check_alive(self) -> None:
        if self._stopped:
            raise StateError("The requested operation is not supported: the microVM has stopped.")

    def _gone(self) -> NoReturn:
        # It has closed its end; how it ended may come a moment later.
        status = self._machine.wait(1.0)
        raise StateError("the microVM has stopped" + ("" if status is None else f": {status.message}"))

    @property
    def state(self) -> str:
        """As the controller there would say, once it has done what it was told."""
        if self._stopped or self._machine.exit_status() is not None:
            return STOPPED
        if self._owed:
            # What goes wrong is for who gives the next order.
            with contextlib.suppress(CrackleError):
                self.collect()
        if self._api_sock is not None:
            try:
                self.execute(Command("get_instance"))
            except StateError:
                return STOPPED
        return self._state

    @property
    def config(self) -> VmConfig:
        """Everything configured so far."""
        config: VmConfig = self.execute(Command("get_config"))
        return config

    # -- the end -------------------------------------------------------------------------------------------------

    def begin_stop(self) -> None:
        """Have the other process end, and do not wait: `stop` does. Idempotent."""
        with self._lock:
            if not self._stopped:
                # What is asked about it afterwards.
                with contextlib.suppress(CrackleError):
                    self.submit(Command("get_config"))
                self._link.commands.end_of_frames()

    def stop(self) -> None:
        """End the microVM and its process, which is killed if it does not give everything back in time. Idempotent."""
        with self._lock:
            if self._stopped:
                return
            self._machine.exit_status()  # if it has ended before, this is how
            self.begin_stop()
            with contextlib.suppress(CrackleError):
                self.collect()
            self._stopped = True
            self._await_process()
            self.machine = None
            self._machine.closed()
            self._link.close()
            if self._api_sock is not None and self._pid:
                # It was there, and so has made that file.
                with contextlib.suppress(OSError):
                    os.unlink(self._api_sock)

    def _await_process(self) -> None:
        """Until its end of the channel is closed, which it is when it has given everything back."""
        poll = select.poll()
        poll.register(self._link.commands.fileno(), 0)  # its end, and nothing else
        if not poll.poll(STOP_TIMEOUT * 1000):
            self.kill()
            poll.poll()

    @property
    def pid(self) -> int:
        """The other process's."""
        if not self._pid:
            self.collect()
        return self._pid

    def kill(self) -> None:
        """Have the kernel end the other process at once."""
        if not self._pid:
            return
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(self._pid)
            try:
                # Nobody else can have its number before its end has been told.
                if self._machine.process_lives():
                    _signal.pidfd_send_signal(process, _signal.SIGKILL)
            finally:
                os.close(process)

    def disown(self) -> None:
        """In a forked child: close the copies."""
        self._stopped = True
        self._link.close()


def _words(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"was killed by signal {number} ({_signal.strsignal(number)})"
    return f"has ended with status {os.WEXITSTATUS(status)}"
