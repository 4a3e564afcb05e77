"""A process that is one microVM of the program that started it, which gives its orders over a channel.

`crackle.vmm.remote` is the other end. The process ends when that does: however its program ends, the guest goes too.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the signal module makes enums of everything
import _socket
import contextlib
import gc
import os

import msgspec

from crackle.api.routes import ROUTES, schema_of
from crackle.errors import ConfigError, CrackleError, reason_of
from crackle.monitor.process import Monitor
from crackle.runtime.channel import Channel
from crackle.runtime.filters import filtered
from crackle.telemetry.logger import OFF, Logger
from crackle.vmm.commands import RUNNING, Command
from crackle.vmm.machine import BuildOptions
from crackle.vmm.wire import GUEST_ENDED, LEND, NOTHING, Answer, Order, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from crackle.api.server import ApiServer
    from crackle.monitor.clone import ServedCloner
    from crackle.schema.fork import Clone
    from crackle.snapshot.fork import Heritage, Line
    from crackle.snapshot.load import Template
    from crackle.vmm.controller import ExitStatus, Machine, Shell
    from crackle.vmm.wire import Birth, Lent

# What each command's resource is; those that are not there have any JSON, or none.
_RESOURCES = {route.command: schema_of(route) for route in ROUTES.values() if route.command}

_orders = msgspec.msgpack.Decoder(Order)


class ServedProcess(Monitor):
    """Carries out what comes over `commands`, and says on `events` how the guest has ended. Takes over both.

    console: the descriptors of the guest's console, -1 for none. template: the snapshot that it is to load. shell: what
    it is to go on in. listener: where the API is served as well.
    """

    def __init__(
        self,
        birth: Birth,
        commands: _socket.socket,
        events: _socket.socket,
        console: tuple[int, int],
        template: Template | None = None,
        shell: Shell | None = None,
        listener: _socket.socket | None = None,
    ) -> None:
        super().__init__(
            Logger(birth.instance_id, level=OFF),
            metadata_limit=birth.metadata_limit,
            template=template,
            shell=shell,
            cloner=self._cloner,
        )
        self._lent: list[Lent] = []
        self._birth = birth
        self._channel = Channel(commands, takes_descriptors=True)
        self._events = events
        self._console = console
        self._settling = False
        self._forking = False
        self._api: ApiServer | None = None
        if listener is not None:
            from crackle.api.server import ApiServer

            self._api = ApiServer(self._loop, listener, self._controller)
        self._loop.watch(commands.fileno(), self._serve, essential=True)
        self._loop.on_signal(_signal.SIGTERM, lambda _number: self._loop.stop())

    def run(self) -> None:
        """Until the program has had enough, or ends."""
        self._run(lambda: True)

    def run_clone(self, heritage: Heritage, clone: Clone, line: Line) -> None:
        """The same, for a microVM that goes on from where its parent was, once the parent lets it."""
        self._run(lambda: self._inherit(heritage, clone, line))

    def _run(self, begin: Callable[[], bool]) -> None:
        try:
            if not begin():
                return
            self._channel.send(encode(Answer(self._controller.state, NOTHING)))
            self._loop.run()
        except (BrokenPipeError, ConnectionResetError):
            return  # it did not wait for that
        finally:
            if self._api is not None:
                self._api.close()
            machine = self._controller.machine
            self._controller.stop()
            if machine is not None and (status := machine.exit_status()) is not None:
                self._tell(status)
            self._loop.close()

    def _cloner(self) -> ServedCloner:
        from crackle.monitor.clone import ServedCloner, leave_clones_to_the_kernel

        if not self._forking:
            raise ConfigError("clones of a program's microVM are the program's to ask for: by vm.fork(n).")
        leave_clones_to_the_kernel()
        return ServedCloner(self._birth, self._lent, self._leave)

    def _leave(self) -> None:
        """In a forked process: close the copies of what is the parent's."""
        self._channel.close()
        self._events.close()
        if self._api is not None:
            self._api.disown()
        self._loop.close()
        self._controller.disown()

    def _options_of_machine(self) -> BuildOptions:
        return BuildOptions(
            console_in=self._console[0],
            console_out=self._console[1],
            console_waits=True,
            confines=filtered(),
            ends_on_panic=True,
            profile=self._birth.profile,
        )

    def _started(self, machine: Machine) -> None:
        super()._started(machine)
        gc.freeze()

    def _settle_later(self, _machine: Machine, /) -> None:
        # What is to run at once when it is told to has the pages for that.
        self._settling = False

    def _look_whether_it_runs(self) -> None:
        machine = self._controller.machine
        if not self._settling and machine is not None and self._controller.state == RUNNING:
            self._settling = True
            super()._settle_later(machine)

    def _ended(self, status: ExitStatus) -> None:
        # The program may want to know more of it yet.
        self._tell(status)

    def _tell(self, status: ExitStatus) -> None:
        with contextlib.suppress(OSError):
            self._events.send(GUEST_ENDED + encode(status), _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)

    def _serve(self, _events: int) -> None:
        if not self._channel.fill():
            self._loop.stop()
            return
        while (frame := self._channel.take()) is not None:
            answer = self._answer(*frame)
            try:
                self._channel.send(encode(answer))
            except OSError:
                self._loop.stop()
                return
        self._look_whether_it_runs()

    def _answer(self, data: bytes, fds: list[int]) -> Answer:
        result, error, words = NOTHING, None, ""
        try:
            order = _orders.decode(data)
            if order.name == LEND:
                # A clone's own, which come one clone after the other.
                self._lent.append((fds[0], fds[1], fds[2], fds[3]))
                fds = []
            else:
                result = msgspec.Raw(encode(self._carry_out(order)))
        except Exception as reason:
            error = type(reason).__name__ if isinstance(reason, CrackleError) else CrackleError.__name__
            words = str(reason) if isinstance(reason, CrackleError) else reason_of(reason) or repr(reason)
        finally:
            for fd in fds:
                os.close(fd)  # the other commands take none
        return Answer(self._controller.state, result, error, words)

    def _carry_out(self, order: Order) -> Any:
        if order.directory is not None:
            os.chdir(order.directory)
        # What has no schema is JSON as it is.
        kind: Any = _RESOURCES.get(order.name) or object
        command = Command(order.name, msgspec.msgpack.decode(order.resource, type=kind))
        self._forking = order.name == "fork"
        try:
            return self._controller.execute(command)
        finally:
            if self._forking:
                self._forking = False
                for lent in self._lent:
                    for fd in lent:
                        os.close(fd)
                self._lent.clear()
