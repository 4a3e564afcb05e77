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
from crackle.errors import CrackleError, reason_of
from crackle.monitor.process import Monitor
from crackle.runtime.channel import Channel
from crackle.telemetry.logger import OFF, Logger
from crackle.vmm.commands import Command
from crackle.vmm.machine import BuildOptions
from crackle.vmm.wire import GUEST_ENDED, NOTHING, Answer, Order, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from crackle.snapshot.load import Template
    from crackle.vmm.controller import ExitStatus, Machine
    from crackle.vmm.wire import Birth

# What each command's resource is; those that are not there have any JSON, or none.
_RESOURCES = {route.command: schema_of(route) for route in ROUTES.values() if route.command}

_orders = msgspec.msgpack.Decoder(Order)


class ServedProcess(Monitor):
    """Carries out what comes over `commands`, and says on `events` how the guest has ended. Takes over both.

    console: the descriptors of the guest's console, -1 for none. template: the snapshot that it is to load.
    """

    def __init__(
        self,
        birth: Birth,
        commands: _socket.socket,
        events: _socket.socket,
        console: tuple[int, int],
        template: Template | None = None,
    ) -> None:
        super().__init__(
            Logger(birth.instance_id, level=OFF), metadata_limit=birth.metadata_limit, template=template
        )
        self._birth = birth
        self._channel = Channel(commands, takes_descriptors=True)
        self._events = events
        self._console = console
        self._loop.watch(commands.fileno(), self._serve, essential=True)
        self._loop.on_signal(_signal.SIGTERM, lambda _number: self._loop.stop())

    def run(self) -> None:
        """Until the program has had enough, or ends."""
        try:
            hello = msgspec.Raw(encode(os.getpid()))
            self._channel.send(encode(Answer(self._controller.state, hello)))
            self._loop.run()
        except (BrokenPipeError, ConnectionResetError):
            return  # it did not wait for that
        finally:
            machine = self._controller.machine
            self._controller.stop()
            if machine is not None and (status := machine.exit_status()) is not None:
                self._tell(status)
            self._loop.close()

    def _options_of_machine(self) -> BuildOptions:
        return BuildOptions(
            console_in=self._console[0],
            console_out=self._console[1],
            console_waits=True,
            ends_on_panic=True,
            profile=self._birth.profile,
        )

    def _started(self, machine: Machine) -> None:
        super()._started(machine)
        gc.freeze()

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

    def _answer(self, data: bytes, fds: list[int]) -> Answer:
        for fd in fds:
            os.close(fd)  # none of the commands takes one
        result, error, words = NOTHING, None, ""
        try:
            result = msgspec.Raw(encode(self._carry_out(_orders.decode(data))))
        except Exception as reason:
            error = type(reason).__name__ if isinstance(reason, CrackleError) else CrackleError.__name__
            words = str(reason) if isinstance(reason, CrackleError) else reason_of(reason) or repr(reason)
        return Answer(self._controller.state, result, error, words)

    def _carry_out(self, order: Order) -> Any:
        if order.directory is not None:
            os.chdir(order.directory)
        # What has no schema is JSON as it is.
        kind: Any = _RESOURCES.get(order.name) or object
        return self._controller.execute(
            Command(order.name, msgspec.msgpack.decode(order.resource, type=kind))
        )
