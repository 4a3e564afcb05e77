"""A process that is one microVM: controller, API, metrics timer, signals, terminal and exit status.

In one loop. `Monitor` is what such a process has whoever gives the orders; `VmmProcess` takes them over HTTP.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time

import msgspec

from crackle.api.server import ApiServer
from crackle.errors import CrackleError, KvmError, StateError
from crackle.runtime import housekeeping
from crackle.runtime.filters import filtered, set_last_words
from crackle.runtime.loop import Loop
from crackle.runtime.terminal import Terminal
from crackle.schema.codec import decode, explain, unknown_fields
from crackle.schema.config import VmConfig
from crackle.telemetry.metrics import FLUSH_PERIOD_S, Metrics
from crackle.vmm import builder, shell
from crackle.vmm.commands import NOT_STARTED, Command
from crackle.vmm.controller import Controller
from crackle.vmm.machine import EXIT_OK, PANIC, BuildOptions
from crackle.vmm.preload import preload_idle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Mapping
    from typing import Any

    from crackle.monitor.clone import MonitorCloner
    from crackle.monitor.options import Options
    from crackle.schema.fork import Clone
    from crackle.snapshot.fork import Heritage, Line
    from crackle.snapshot.load import Loaded
    from crackle.telemetry.logger import Logger
    from crackle.telemetry.sink import Sink
    from crackle.vmm.controller import ExitStatus, Machine, Shell
    from crackle.vmm.devices import Held

# What the process ends with when it intercepts a signal, as Firecracker does.
SIGNAL_STATUS = {
    signal.SIGSYS: 148,
    signal.SIGBUS: 149,
    signal.SIGSEGV: 150,
    signal.SIGXFSZ: 151,
    signal.SIGXCPU: 154,
    signal.SIGHUP: 156,
    signal.SIGILL: 157,
}

# Seconds after the API answers when its clients are taken to be slow.
_IDLE_S = 0.05

# Seconds after the start of the guest when what only the start needed is given back.
_SETTLED_S = 1.0
# And between the moments for which the guest stands still for that, and how many there are at most.
_BETWEEN_S = 0.02
_MOMENTS = 100
# It is tried again after twice as long each time, up to this.
_LONGEST_S = 30.0

# These end it in order, and then by the signal itself, so that the parent sees what it sent.
_TERMINATE = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Monitor:
    """A controller and the loop that attends to its machine. How orders come is the subclass's."""

    def __init__(self, logger: Logger, **options: Any) -> None:
        """options: of the controller."""
        self._logger = logger
        self._loop = Loop(logger.error)
        self._controller = Controller(
            self._build,
            shell.Shell,
            instance_id=logger.instance_id,
            logger=logger,
            on_start=self._started,
            restore=self._restore,
            **options,
        )

    def _build(self, config: VmConfig, ready: Any, held: Mapping[tuple[str, str], Held]) -> Machine:
        return builder.build(config, ready, self._build_options(config), held)

    def _restore(
        self, loaded: Loaded | Heritage, ready: Any, held: Mapping[tuple[str, str], Held]
    ) -> Machine:
        return builder.restore(loaded, ready, self._build_options(loaded.snapshot.config), held)

    def _build_options(self, config: VmConfig) -> BuildOptions:
        if config.vsock is not None:
            _allow_many_descriptors()
        return self._options_of_machine()

    def _options_of_machine(self) -> BuildOptions:
        raise NotImplementedError

    def _inherit(self, heritage: Heritage, clone: Clone, line: Line) -> bool:
        """In a clone's process: go on from where the parent was, once that lets it; False when it does not."""
        from crackle.schema.serial import Serial
        from crackle.snapshot.overrides import override

        if clone.serial_out_path is not None:
            self._controller.execute(Command("put_serial", Serial(serial_out_path=clone.serial_out_path)))
        document = heritage.document if clone.mmds is msgspec.UNSET else clone.mmds
        if document is not None:
            self._controller.execute(Command("put_mmds", document))
        heritage.snapshot = override(heritage.snapshot, clone)
        self._controller.inherit(heritage)
        if not line.wait():
            return False
        if heritage.running:
            self._controller.execute(Command("resume"))
        return True

    def _started(self, machine: Machine) -> None:
        self._loop.watch(machine.exit_fd, self._look_for_end, essential=True)
        self._settle_later(machine)

    def _settle_later(self, machine: Machine, /) -> None:
        """Give back what only the start needed when that is over."""
        self._loop.call_later(_SETTLED_S, lambda: self._settle(machine))

    def _settle(self, machine: Machine) -> None:
        housekeeping.settle()
        self._give_back(machine, _MOMENTS)

    def _give_back(self, machine: Machine, left: int, pause: float = _BETWEEN_S) -> None:
        try:
            more = housekeeping.give_back_unchanged(machine)
        except StateError:
            return  # a machine that has stopped needs no memory
        except KvmError:
            # Whoever cannot stand still now, or has a thread more, may do so later.
            more, pause = pause < _LONGEST_S, pause * 2
        else:
            pause = _BETWEEN_S
        if more and left:
            self._loop.call_later(pause, lambda: self._give_back(machine, left - 1, pause))

    def _look_for_end(self, _events: int) -> None:
        machine = self._controller.machine
        if machine is None:
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(machine.exit_fd)
        status = machine.exit_status()
        if status is None:
            return
        self._loop.forget(machine.exit_fd)
        self._ended(status)

    def _ended(self, status: ExitStatus) -> None:
        raise NotImplementedError


class VmmProcess(Monitor):
    """Runs one microVM until it ends. Takes over ``metrics_sink``, ``listener`` and ``ready``."""

    def __init__(
        self,
        options: Options,
        logger: Logger,
        metrics_sink: Sink | None,
        listener: socket | None,
        config: bytes | None,
        ready: Shell | None,
        metadata: bytes | None = None,
    ) -> None:
        if "core-scheduling" in options:
            from crackle.runtime.cores import share_no_core

            share_no_core()
        self._options = options
        self._config = config
        self._metadata = metadata
        self._status = 0
        self._signal = 0
        # Log lines that could not be written, when that was last looked at.
        self._lost = 0
        self._terminal = Terminal(0)
        self._metrics = Metrics(own="own-metrics" in options)
        if metrics_sink is not None:
            self._metrics.attach(metrics_sink)
        limit = options.number("http-api-max-payload-size") or 0
        metadata_limit = options.number("mmds-size-limit")
        super().__init__(
            logger,
            metrics=self._metrics,
            shell=ready,
            metadata_limit=limit if metadata_limit is None else metadata_limit,
            lock_drives="no-drive-locks" not in options,
            cloner=self._cloner,
        )
        self._server = None if listener is None else ApiServer(self._loop, listener, self._controller, limit)
        if "exit-on-failed-load" in options:
            self._controller.on_failed_load = self._end_for_load
        self._watch_signals()
        if filtered():
            # Above the handler that hears what is sent; metrics come before there is a guest.
            set_last_words(*logger.last_words())
        logger.on_change = self._prepare_last_words

    def run(self) -> int:
        """Serve until the microVM or a signal ends it; the result is the exit status. Raises CrackleError."""
        try:
            if self._server is not None:
                self._report_start()
                # What a start or a load would import, while nobody asks for anything.
                self._loop.call_later(_IDLE_S, self._preload)
            if self._metadata is not None:
                self._put_metadata(self._metadata)
            if self._config is not None:
                self._start_from_file(self._config)
            self._loop.run()
        finally:
            self._close()
        return self._ending()

    def _ending(self) -> int:
        if self._signal:
            signal.signal(self._signal, signal.SIG_DFL)
            os.kill(os.getpid(), self._signal)
            # Still here: the kernel spares process 1 of a PID namespace (pid_namespaces(7)).
            return 128 + self._signal
        return self._status

    def run_clone(self, heritage: Heritage, clone: Clone, line: Line) -> int:
        """As `run`, for a microVM that goes on from where its parent was, once the parent lets it."""
        try:
            self._report_start()
            if self._inherit(heritage, clone, line):
                self._loop.run()
        finally:
            self._close()
        return self._ending()

    def _cloner(self) -> MonitorCloner:
        from crackle.monitor.clone import MonitorCloner, leave_clones_to_the_kernel

        leave_clones_to_the_kernel()
        return MonitorCloner(self._options, self._logger, self._leave)

    def _leave(self) -> None:
        """In a forked process: close the copies of what is the parent's."""
        set_last_words()
        if self._server is not None:
            self._server.disown()
        self._loop.close()
        self._controller.disown()
        self._metrics.close()

    def _preload(self) -> None:
        # A machine that runs already has imported what it wants, and nothing comes after it.
        if self._controller.state == NOT_STARTED:
            preload_idle()

    def _end_for_load(self) -> None:
        self._logger.error("RunWithApiError error: Failed to build MicroVM: Loading snapshot failed..")
        self._status = 1
        self._loop.stop()

    @property
    def _building(self) -> str:
        """How it begins to say that the configuration file's microVM cannot be."""
        way = "RunWithApiError" if self._server is not None else "RunWithoutApiError"
        return f"{way} error: Failed to build MicroVM from Json"

    def _put_metadata(self, text: bytes) -> None:
        # Firecracker has words for each way in.
        building = "RunWithApiError error: Failed to build MicroVM: Populating MMDS from file failed"
        if self._config is not None:
            building = f"{self._building}: Configuration for VMM from one single json failed"
        try:
            self._controller.execute(Command("put_mmds", decode(text, object)))
        except msgspec.DecodeError as error:
            where = self._options.value("metadata")
            raise CrackleError(
                f"MMDS error: metadata provided not valid json: {explain(error, None, text)}: {where}"
            ) from None
        except CrackleError as error:
            said = str(error).replace("MMDS limit exceeded error", "MMDS error")
            raise CrackleError(
                f"{building}: {said if self._config is not None else said.removeprefix('MMDS error: ')}"
            ) from error
        self._logger.info("Successfully added metadata to mmds from file")

    def _start_from_file(self, text: bytes) -> None:
        problem = self._building
        try:
            config = decode(text, VmConfig)
        except msgspec.DecodeError as error:
            raise CrackleError(
                f"{problem}: Configuration for VMM from one single json failed: Invalid JSON: "
                f"{explain(error, VmConfig, text)}: {self._options.value('config-file')}"
            ) from None
        for name in unknown_fields(text, VmConfig):
            self._logger.warning(f"The configuration file's section `{name}` is unknown, and ignored.")
        try:
            self._controller.configure(config)
        except CrackleError as error:
            raise CrackleError(
                f"{problem}: Configuration for VMM from one single json failed: {_in_file(str(error))}"
            ) from error
        try:
            self._controller.execute(Command("start"))
        except CrackleError as error:
            raise CrackleError(f"{problem}: {error}") from error
        self._logger.info("Successfully started microvm that was configured from one single json")

    def _options_of_machine(self) -> BuildOptions:
        self._prepare_last_words()
        return BuildOptions(
            boot_timer="boot-timer" in self._options, logger=self._logger, confines=filtered()
        )

    def _started(self, machine: Machine) -> None:
        super()._started(machine)
        # The guest runs: what follows can be done without.
        self._loop.attempt(self._terminal.follow, self._loop)
        self._loop.attempt(self._flush)
        self._loop.call_every(FLUSH_PERIOD_S, self._flush)
        self._loop.attempt(self._listen_for_silence, machine)
        gc.freeze()

    def _listen_for_silence(self, machine: Machine) -> None:
        from crackle.vmm.silence import Silence

        Silence(lambda: int(machine.metrics()["uart"]["write_count"]), self._logger.warning).watch(self._loop)

    def _ended(self, status: ExitStatus) -> None:
        # As with Firecracker: a kernel that panics and then resets, as `panic=1 reboot=k` says, has ended well.
        self._status = EXIT_OK if status.reason == PANIC else status.exit_code
        (self._logger.info if self._status == 0 else self._logger.error)(
            f"The microVM ended ({status.reason}): {status.message}"
        )
        self._logger.info("Vmm is stopping.")
        self._loop.stop()

    def _flush(self) -> None:
        counters = self._metrics.counters["logger"]
        counters["missed_log_count"], counters["rate_limited_log_count"] = (
            self._logger.lost,
            self._logger.throttled,
        )
        try:
            self._metrics.flush()
        except CrackleError as error:
            self._logger.error(str(error))
        self._prepare_last_words()

    def _prepare_last_words(self) -> None:
        """What is written if a forbidden system call ends this process, which cannot say then what it has not ready."""
        if filtered():
            set_last_words(*self._logger.last_words(), *self._metrics.last_line())

    def _report_start(self) -> None:
        counters = self._metrics.counters["api_server"]
        start_us = self._options.number("start-time-us")
        if start_us is not None:
            counters["process_startup_time_us"] = max(0, time.monotonic_ns() // 1000 - start_us)
        start_cpu_us = self._options.number("start-time-cpu-us")
        if start_cpu_us is not None:
            own = time.process_time_ns() // 1000 - start_cpu_us
            counters["process_startup_time_cpu_us"] = max(
                0, own + (self._options.number("parent-cpu-time-us") or 0)
            )
        self._logger.info("API server started.")

    def _watch_signals(self) -> None:
        self._loop.on_sent((*SIGNAL_STATUS, *_TERMINATE, signal.SIGPIPE), self._intercept)

    def _count_broken_pipe(self, code: int) -> None:
        """Whoever wrote where nobody reads any more knows it; this is for who looks at log and metrics."""
        self._metrics.counters["signals"]["sigpipe"] += 1
        # Where it was the log's reader that has gone, a line would be the next cause.
        before, self._lost = self._lost, self._logger.lost
        if self._lost == before:
            self._logger.error(f"Received signal {int(signal.SIGPIPE)}, code {code}.")

    def _intercept(self, number: int, code: int) -> None:
        if number == signal.SIGPIPE:
            self._count_broken_pipe(code)
            return
        name = signal.Signals(number).name.lower()
        if name in self._metrics.counters["signals"]:
            self._metrics.counters["signals"][name] = 1
        elif number == signal.SIGSYS:
            # Somebody has sent it: a forbidden call ends the process in `crackle.runtime.filters`.
            self._metrics.counters["seccomp"]["num_faults"] = 1
        self._logger.error(f"Shutting down VM after intercepting signal {number}, code {code}.")
        if number in _TERMINATE:
            self._signal = number
        else:
            self._status = SIGNAL_STATUS[signal.Signals(number)]
        self._loop.stop()

    def _close(self) -> None:
        attempt = self._loop.attempt
        attempt(self._terminal.restore)
        attempt(self._flush)
        if self._server is not None:
            attempt(self._server.close)
        attempt(self._controller.stop)
        self._loop.close()
        set_last_words()
        self._metrics.close()


# How what is wrong with a resource begins over the API, and how in a configuration file.
_IN_FILE = (
    ("Machine config error", "VM config error"),
    ("Drive config error", "Block device error"),
    ("Network config error", "Network device error"),
    ("Vsock config error", "Vsock device error"),
    ("MMMDS config error", "MMDS config error"),
)


def _in_file(problem: str) -> str:
    for words, others in _IN_FILE:
        if problem.startswith(words):
            return others + problem.removeprefix(words)
    return problem


def _allow_many_descriptors() -> None:
    """One for each vsock connection: as many as the hard limit allows."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
