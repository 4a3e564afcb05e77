"""A built machine: vCPUs, devices and their threads, from the first instruction to the last descriptor closed."""

from __future__ import annotations

import contextlib
import os
import select
import time
from _thread import RLock, get_ident

import msgspec

from crackle.arch import platform
from crackle.devices.serial import Serial
from crackle.errors import ConfigError, CrackleError, KvmError, StateError
from crackle.kvm import Bus
from crackle.runtime.clock import MachineClock
from crackle.runtime.filters import confine
from crackle.runtime.iothread import IoThread
from crackle.runtime.ownership import end_dropped, enrol
from crackle.runtime.system import fork
from crackle.telemetry.logger import Throttle
from crackle.vmm.commands import PAUSED, RUNNING, STOPPED
from crackle.vmm.devices import KINDS, SINGLE, make
from crackle.vmm.plugs import Plugs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from crackle.arch import Board
    from crackle.mmds.service import Mmds
    from crackle.mmds.store import Store
    from crackle.runtime.threads import Worker
    from crackle.schema import MmdsConfig, TokenBucket
    from crackle.snapshot.state import MachineState
    from crackle.telemetry.logger import Logger
    from crackle.virtio.custom.base import VirtioDevice as CustomDevice
    from crackle.virtio.device import VirtioDevice
    from crackle.virtio.state import MmioState
    from crackle.vmm.devices import Held
    from crackle.vmm.shell import Parts

# How a vCPU's end is told: the reason, the words, and the exit status of the process, as Firecracker's.
_CLEAN = {"reset": "the guest asked for a reset", "shutdown": "the guest switched itself off"}
PANIC = "panic"
_ALIVE = frozenset(("new", "running", "paused"))
EXIT_OK = 0
EXIT_ERROR = 1

# Seconds that a pause takes at most before it is given up. What a disk does for 16 MiB takes less.
PAUSE_TIMEOUT = 2.0

# Seconds after which a thread that was asked to stop is taken to wait for a page of guest memory.
_STOP_TIMEOUT = 0.5
# And that what is done beside the guest waits for its threads.
_REST_TIMEOUT = 0.05

# Seconds that a guest has for letting go of a device, and for what it does with the registers after that.
LET_GO_TIMEOUT = 2.0
_ACKNOWLEDGE_TIMEOUT = 0.2
_LOOK_S = 0.001

# The bit of a device's status that says that a driver has it (virtio 1.2, 2.1).
_DRIVER = 2

# Seconds after a restore in which nothing has aged.
_FRESH_S = 0.005


class BuildOptions(msgspec.Struct, kw_only=True):
    """What a front end decides, and no API resource says.

    console_in, console_out: descriptors of the serial console, -1 for none; the machine does not close them.
    console_waits: the guest waits for who reads its console, rather than that output is dropped once 64 KiB are kept.
    ends_on_panic: the guest ends when its kernel says that it has panicked, rather than how it ends by itself then.
    profile: also measure how long exits take to handle.
    confines: the thread that starts the guest may make only the system calls of a main thread from then on.
    devices: devices written in Python, which the guest gets after the configured ones.
    """

    boot_timer: bool = False
    logger: Logger | None = None
    console_in: int = 0
    console_out: int = 1
    console_waits: bool = False
    ends_on_panic: bool = False
    profile: bool = False
    confines: bool = False
    devices: tuple[CustomDevice, ...] = ()


class ExitStatus(msgspec.Struct, frozen=True):
    """Why the guest ended: "reset", "shutdown", "panic" (of a kernel that can tell), a failure, or "stopped",
    with a message that says more.

    step: what `MicroVM.shutdown` had done when it ended: "power button", "Ctrl-Alt-Del" or "stop".
    """

    reason: str
    message: str
    exit_code: int
    step: str | None = None


class Machine:
    """Owns the parts it is made from, its devices and all their descriptors until `stop`.

    `exit_fd` becomes readable when the guest ends. Not thread-safe: one thread gives the orders, but any may `wait`,
    ask for the `exit_status`, and `stop`.
    """

    _stopped = True  # nothing to stop until there is something

    def __init__(self, parts: Parts, options: BuildOptions) -> None:
        assert parts.memory is not None
        assert parts.vm is not None
        self.parts = parts
        self.memory = parts.memory
        self.vm = parts.vm
        self.vcpus = parts.vcpus
        self.pio = Bus("pio")
        self.mmio = Bus("mmio")
        self.clock = MachineClock()
        self.io = IoThread("io", self.clock)
        self._python_io: IoThread | None = None
        self.plugs = Plugs(self.mmio, self.vm, parts.slots)
        self.mmds: Mmds | None = None
        self.serial = Serial()
        self.board: Board | None = None
        self._options = options
        self._fds: list[int] = []
        self._paused = False
        self._threads_run = False
        self._restored: tuple[float, MachineState, bool] | None = None
        self._dirty: dict[int, int] = {}  # by region: pages written, of which nobody has a copy
        self._ended: ExitStatus | None = None
        self._stopping = RLock()
        self._closing = RLock()  # whoever looks at what `stop` gives back has it
        self._reason: str | None = None
        self.exit_fd = self._eventfd()
        self._stopped = False
        enrol(self)

    # -- building ------------------------------------------------------------------------------------------------

    def own_fd(self, fd: int) -> int:
        """Close `fd` when the machine stops; returns it."""
        self._fds.append(fd)
        return fd

    def _eventfd(self) -> int:
        return self.own_fd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def interrupt(self, line: int) -> int:
        """An eventfd that raises interrupt `line`; the machine closes it."""
        fd = self._eventfd()
        self.vm.irqfd(fd, line)
        return fd

    def assert_line(self, line: int, level: bool) -> None:
        """Set the level of an interrupt `line`."""
        self.vm.irq_line(line, level)

    def add_board(self, console_out: int, console_limit: TokenBucket | None) -> None:
        """Attach what the platform has whatever is configured: console, power, and if asked for the boot timer.

        console_limit: of bytes of output.
        """
        options = self._options
        self.board = platform.make_board(
            self,
            console=(options.console_in, console_out),
            console_waits=options.console_waits,
            console_limit=console_limit,
            ends_on_panic=options.ends_on_panic,
            report=untold if options.logger is None else options.logger.error,
            report_boot_time=_boot_time_reporter(options.logger) if options.boot_timer else None,
        )
        self.serial = self.board.serial

    def add(
        self,
        kind: str,
        identifier: str,
        resource: Any,
        held: Held | None = None,
        saved: MmioState | None = None,
    ) -> None:
        """Make a virtio device of a kind out of the registry, and attach it. ConfigError when it cannot be had.

        saved: what it was before, whose place in the guest's address space it gets.
        """
        self.plugs.plug((kind, identifier), make(self.memory, kind, resource, held), self.io, saved)

    def attach(self, kind: str, identifier: str, resource: Any, held: Held | None = None) -> None:
        """Give the guest another virtio device while it runs, and tell it. ConfigError when that cannot be."""
        board = self._alive_board()
        self.add(kind, identifier, resource, held)
        try:
            board.announce(self.plugs.info((kind, identifier)))
        except BaseException:
            self.remove(kind, identifier)
            raise

    def detach(self, kind: str, identifier: str) -> None:
        """Take a virtio device away when the guest's driver has let go of it, for which it is asked.

        ConfigError when it has not after LET_GO_TIMEOUT, and of one that the guest began with, at once.
        """
        board = self._alive_board()
        if self._lets_go(board, kind, identifier):
            info = self.plugs.info((kind, identifier))
            self.remove(kind, identifier)
            board.withdraw(info)
            return
        raise ConfigError(
            f"the guest still uses it. Have it let go of {identifier!r}, and ask again: in Linux, write the device's "
            "name to /sys/bus/platform/drivers/virtio-mmio/unbind."
        )

    def _lets_go(self, board: Board, kind: str, identifier: str) -> bool:
        device = self.devices[kind, identifier]
        if not device.device_status & _DRIVER:
            return True
        if self._paused or not board.ask_back(self.plugs.info((kind, identifier))):
            return False
        until = time.monotonic() + LET_GO_TIMEOUT
        while device.device_status & _DRIVER:
            if time.monotonic() >= until:
                return False
            time.sleep(_LOOK_S)
        # It has reset the device. Linux looks at the queues once more, and then acknowledges that there is a device.
        until = time.monotonic() + _ACKNOWLEDGE_TIMEOUT
        while not device.device_status and time.monotonic() < until:
            time.sleep(_LOOK_S)
        return True

    def add_custom(self, identifier: str, device: CustomDevice, saved: MmioState | None = None) -> None:
        """Attach a device written in Python; all of them share a thread, apart from the other devices'."""
        from crackle.virtio.custom.device import PythonDevice

        if self._python_io is None:
            self._python_io = IoThread("python", self.clock)
        self.plugs.plug(("custom", identifier), PythonDevice(self.memory, device), self._python_io, saved)

    def serve_metadata(self, config: MmdsConfig, store: Store) -> None:
        """Answer the guest's requests for the document in `store`, on the interfaces that `config` names."""
        from crackle.mmds.service import Mmds

        self.mmds = Mmds(config, store, self.clock)
        for name in config.network_interfaces:
            net: Any = self.devices["net", name]
            net.detour(self.mmds.connect(), self.mmds.address)

    def remove(self, kind: str, identifier: str) -> None:
        """Take a virtio device away. The guest is not asked. KeyError when there is none."""
        self.plugs.unplug((kind, identifier))

    @property
    def devices(self) -> dict[tuple[str, str], VirtioDevice]:
        """The virtio devices by kind and identifier, in the order in which the guest numbers them."""
        return self.plugs.devices

    def _io_threads(self) -> list[IoThread]:
        return [self.io] if self._python_io is None else [self.io, self._python_io]

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run the guest."""
        if self.board is not None:
            self.board.start()
        self._run()

    def _run(self, *, paused: bool = False) -> None:
        self._threads_run = True
        # It may have been brought to rest before it ever ran.
        self.serial.resume()
        for io in self._io_threads():
            io.start(paused)
        if self.mmds is not None:
            self.mmds.start()
        confines = self._options.confines
        # What a device written in Python does when the guest sets it up is its own business.
        kind = "vcpu" if self._python_io is None else "python"
        for vcpu in self.vcpus:
            vcpu.start(
                *(self.pio, self.mmio, self.exit_fd, paused or confines),
                profile=self._options.profile,
                kind=kind,
            )
        if confines:
            # Last, so that the other threads have their own filters and not this one's too, and before the guest runs.
            confine("main")
            if not paused:
                for vcpu in self.vcpus:
                    vcpu.resume()

    def stand_by(self) -> None:
        """Have the threads of a machine that was restored, at rest, so that `resume` need not start any.

        And do what that will do, as far as the guest sees nothing of it: in a forked process what is written to for the
        first time has to be copied first. May be called again.
        """
        self._check_alive()
        if not self._threads_run:
            self._run(paused=True)
            for thread in (*self.vcpus, *self._io_threads()):
                thread.wait_paused(PAUSE_TIMEOUT)
        before = self._restored
        self._begin_time()
        self._restored = before
        self.clock.resume()
        self.clock.pause()
        self._let_devices_go_on()

    @property
    def state(self) -> str:
        """RUNNING, PAUSED or, once its guest has ended, STOPPED; a machine exists from its start on."""
        if self._stopped or any(vcpu.status not in _ALIVE for vcpu in self.vcpus):
            return STOPPED
        return PAUSED if self._paused else RUNNING

    def pause(self) -> None:
        """Stop every vCPU between two instructions, and every device where it stands. Idempotent.

        Nothing that the guest has submitted need be served for that: what is in its queues stays there, and what is
        only begun is put back. What the kernel is doing for a drive is finished. KvmError when a thread or a drive
        takes longer than PAUSE_TIMEOUT for what it is at; then everything runs on.
        """
        self._check_alive()
        if self._paused:
            return
        until = time.monotonic() + PAUSE_TIMEOUT
        try:
            self._stand_still(until)
        except BaseException:
            self._go_on()
            raise
        self.clock.pause()
        self._paused = True

    def at_rest(self, call: Callable[[Sequence[Worker]], object]) -> None:
        """Call with the machine's threads while all of them stand still, for as long as that takes: not for long.

        Time goes on for the guest. KvmError when a thread does not come to rest soon.
        """
        self._check_alive()
        try:
            self._stop_threads(time.monotonic() + _REST_TIMEOUT)
            call([*self.vcpus, *self._io_threads()])
        finally:
            if not self._paused:
                self._go_on()

    def _stand_still(self, until: float) -> None:
        self._stop_threads(until)
        for (kind, identifier), device in self.devices.items():
            if not device.drain(max(until - time.monotonic(), 0.0)):
                raise KvmError(
                    f"what is in flight for the {kind} device {identifier!r} was not done within "
                    f"{PAUSE_TIMEOUT:g} s, and the microVM runs on"
                )

    def _stop_threads(self, until: float) -> None:
        # No vCPU waits for a reader of the console from here on.
        self.serial.pause()
        threads: list[Worker] = [*self.vcpus, *self._io_threads()]
        for thread in threads:
            thread.request_pause()
        try:
            for thread in threads:
                thread.wait_paused(max(until - time.monotonic(), 0.0))
        except KvmError:
            stuck = [thread.name for thread in threads if thread.status == "running"]
            names = ", ".join(stuck) or "a thread"
            raise KvmError(
                f"{names} did not stand still within {PAUSE_TIMEOUT:g} s, and the microVM runs on: "
                "what it waits for, a disk or a page of guest memory, does not come"
            ) from None

    def resume(self) -> None:
        """Go on where `pause` stopped. Idempotent."""
        self._check_alive()
        if not self._paused:
            return
        self._begin_time()
        self._paused = False
        self.clock.resume()
        if not self._threads_run:
            self._run()
            return
        if self.mmds is not None:
            self.mmds.resume()
        self._go_on()

    def _begin_time(self) -> None:
        if self._restored is not None:
            self._rewind()
        for vcpu in self.vcpus:
            vcpu.kvmclock_ctrl()

    def _let_devices_go_on(self) -> None:
        self.serial.resume()
        for device in self.devices.values():
            # What was put back, and what came meanwhile, is told of by no notification.
            device.kick()

    def _go_on(self) -> None:
        """Let everything run, whatever of it stands still."""
        self._let_devices_go_on()
        for io in self._io_threads():
            io.resume()
        for vcpu in self.vcpus:
            vcpu.resume()

    # -- saving and restoring ------------------------------------------------------------------------------------

    def save(self, *, durable: bool = True) -> MachineState:
        """All that the guest would miss but its memory. The machine is paused, and may go on afterwards.

        durable: what the guest has been told is written is on the disk then, too.
        StateError when it is not; ConfigError for a device whose state another process has.
        """
        from crackle.snapshot.state import MachineState, SavedDevice

        board = self._alive_board()
        if not self._paused:
            raise StateError("only a microVM that is paused can be saved")
        assert self.parts.kvm is not None
        for kind, identifier in self.plugs.transports:
            if kind == "vhost_user_block":
                raise ConfigError(
                    f"Crackle does not support snapshots of a microVM with a vhost-user drive yet: {identifier}"
                )
        if durable:
            for device in self.devices.values():
                device.make_durable()
        # The devices first: the interrupt that one raises as it comes to rest belongs to what the chips hold.
        devices = tuple(
            SavedDevice(kind=kind, identifier=identifier, transport=transport.save())
            for (kind, identifier), transport in self.plugs.transports.items()
        )
        vcpus = tuple(platform.save_vcpu(self.parts.kvm, vcpu) for vcpu in self.vcpus)
        return MachineState(
            vm=platform.save_vm(self.vm),
            vcpus=vcpus,
            board=board.save(),
            devices=devices,
            memory=tuple((region.gpa, region.size) for region in self.memory.regions),
            mmds=None if self.mmds is None else self.mmds.save(),
        )

    def copy_overlay(self, drive: str, path: str) -> None:
        """Have the overlay of a drive, as it is now, in a new file. The machine is paused and saved. ConfigError."""
        block: Any = self.devices["block", drive]
        block.copy_overlay(path)

    def dirty_pages(self) -> list[bytes] | None:
        """For each region of memory, the bitmap of the pages written since the last `forget_dirty`, or since the start.

        None where that is not noted. The machine is paused.
        """
        if not self.memory.tracking:
            return None
        assert self.parts.slots is not None
        for index, region in enumerate(self.memory.regions):
            found = (self.vm.get_dirty_log(self.parts.slots.slot(region)), self.memory.take_dirty(index))
            # Both are empty now: what is not written anywhere must not be lost.
            bits = self._dirty.get(region.gpa, 0)
            for bitmap in found:
                bits |= int.from_bytes(bitmap, "little")
            self._dirty[region.gpa] = bits
        # In words of 64 bits, as KVM's.
        return [
            self._dirty[region.gpa].to_bytes((region.size + (1 << 18) - 1) >> 18 << 3, "little")
            for region in self.memory.regions
        ]

    def forget_dirty(self) -> None:
        """What `dirty_pages` told is kept elsewhere now."""
        self._dirty.clear()

    def restore(self, state: MachineState, *, realtime: bool = False) -> None:
        """The reverse of `save`, once memory and devices are there; then the machine is paused, and has no threads yet.

        realtime: the guest's kvmclock has gone on meanwhile. ConfigError or KvmError when the state does not fit this
        host, or these devices.
        """
        assert self.board is not None
        assert self.parts.kvm is not None
        self.clock.pause()
        self._paused = True
        self._restored = time.monotonic(), state, realtime
        platform.restore_vcpus(self.parts.kvm, self.vcpus, state.vcpus)
        platform.restore_vm(self.vm, state.vm, realtime=realtime)
        self.board.restore(state.board)
        # Last: what they signal as they are restored is for the chips.
        for device in state.devices:
            self.plugs.transports[device.kind, device.identifier].restore(device.transport)

    def _rewind(self) -> None:
        """Have time begin now, for a machine that has waited since it was restored: it was not meant to age."""
        assert self._restored is not None
        (since, state, realtime), self._restored = self._restored, None
        if time.monotonic() - since < _FRESH_S:
            return
        platform.rewind_vcpus(self.vcpus, state.vcpus)
        platform.rewind_vm(self.vm, state.vm, realtime=realtime)

    def note_dirty(self, bitmaps: list[bytes] | None) -> None:
        """Go on from what `dirty_pages` told of a machine with the same memory, where pages are noted at all."""
        if bitmaps is not None and self.memory.tracking:
            for region, bitmap in zip(self.memory.regions, bitmaps, strict=True):
                self._dirty[region.gpa] = int.from_bytes(bitmap, "little")

    def check_forkable(self) -> None:
        """ConfigError when another process cannot go on from where this machine is."""
        self._check_alive()
        self.memory.check_inheritable()
        for kind, identifier in self.plugs.transports:
            if kind == "custom":
                raise ConfigError(
                    f"The device {identifier!r} is written in Python, and a clone runs none of your program: stop the "
                    "microVM and start it without, or clone a snapshot of it."
                )
            own = self.plugs.devices[kind, identifier].own_memory
            if own is not None and not own[2]:
                raise ConfigError(
                    f"The {kind} device {identifier!r} can be written to, and its clones would write to the same file: "
                    "have it read-only, or clone a snapshot with pmem_overrides."
                )

    def disk_below(self, drive_id: str) -> tuple[str | None, str | None] | None:
        """As `Block.below`, of a drive with a file."""
        disk: Any = self.devices["block", drive_id]
        found: tuple[str | None, str | None] | None = disk.below()
        return found

    def fork(self) -> int:
        """Fork the process while the machine stands still: the child's id, or 0 in the child.

        That has guest memory, copy-on-write, and nothing else of the machine, which is the parent's. OSError.
        """
        memory, self.parts.memory = self.parts.memory, None
        assert memory is not None
        memory.let_inherit(True)
        pid = 1
        try:
            pid = fork()
        finally:
            # The child may have to fork again.
            if pid:
                memory.let_inherit(False)
            self.parts.memory = memory
        return pid

    def send_ctrl_alt_del(self) -> None:
        """Press Ctrl-Alt-Del on the guest's keyboard."""
        self._alive_board().send_ctrl_alt_del()

    def press_power_button(self) -> None:
        """Press the ACPI power button: a guest with ACPI shuts down as its init is set up to."""
        self._alive_board().press_power_button()

    def update(self, kind: str, identifier: str, resource: Any, held: Held | None = None) -> None:
        """Change a device while the guest runs, as the registry says; held: what is open for it already.

        ConfigError changes nothing.
        """
        self._check_alive()
        update = KINDS[kind].update
        device = self.devices.get((kind, identifier))
        if device is None or update is None:
            raise ConfigError(f"there is no {kind} device {identifier!r} that can be changed")
        update(device, resource, *(() if held is None else (held,)))

    def ask(self, kind: str, identifier: str, call: Callable[[Any, Any], Any], resource: Any) -> Any:
        """What `call(device, resource)` gives. ConfigError as it raises that."""
        self._check_alive()
        return call(self.devices[kind, identifier], resource)

    def _alive_board(self) -> Board:
        self._check_alive()
        assert self.board is not None, "a built machine has one"
        return self.board

    def _check_alive(self) -> None:
        if self._stopped:
            raise StateError("the microVM has stopped")

    def wait(self, timeout: float | None = None) -> ExitStatus | None:
        """Why the guest ended, once it has, by itself or by `stop`; None if it has not within `timeout` seconds.

        Any number of threads may wait, none of them the machine's own.
        """
        with self._closing:
            if self._stopped and self._ended is not None:
                return self._ended
            # One's own descriptor: `stop` closes the other while this waits.
            fd = os.dup(self.exit_fd)
        return await_end(fd, self.exit_status, timeout)

    @property
    def panicked(self) -> bool:
        """Whether the guest's kernel has said that it panicked: its end, now or later, is no good one."""
        return self.board is not None and self.board.panicked

    def exit_status(self) -> ExitStatus | None:
        """Why the guest ended, or None while it has not. A failure outweighs a clean end on another vCPU.

        After `stop` too: what ended it before, or "stopped".
        """
        with self._closing:
            ended = self._ended
            if ended is not None:
                return ended
            for vcpu in self.vcpus:
                status = vcpu.status
                if status == PANIC or (status in _CLEAN and self.panicked):
                    ended = ended or ExitStatus(PANIC, "the guest's kernel has panicked", EXIT_ERROR)
                elif status in _CLEAN:
                    ended = ended or ExitStatus(status, _CLEAN[status], EXIT_OK)
                elif vcpu.failure is not None:
                    return ExitStatus(status, self._explained(str(vcpu.description)), EXIT_ERROR)
            return ended

    def _explained(self, failure: str) -> str:
        """What went wrong, after the reason why nothing else could be expected, where the host is to blame."""
        if self._reason is None:
            self._reason = ""
            # Where there is nothing to import from any more, the failure is told all the same.
            with contextlib.suppress(ImportError, OSError, CrackleError):
                from crackle.vmm.probe import why_no_linux

                self._reason = why_no_linux() or ""
        return f"{self._reason} {failure}".strip()

    def stop(self) -> None:
        """End the vCPUs and the I/O thread and give everything back. Idempotent.

        From any thread but the machine's own, which get StateError.
        """
        if self.runs(get_ident()):
            raise StateError(
                "a thread of the microVM cannot wait for its own end: stop it from another thread"
            )
        with self._stopping:
            if self._stopped:
                return
            self._stopped = True
            self.serial.pause()
            for vcpu in self.vcpus:
                vcpu.request_stop()
            self._free_waiting()
            for vcpu in self.vcpus:
                vcpu.stop()
            self._ended = self.exit_status() or ExitStatus("stopped", "the microVM was stopped", EXIT_OK)
            os.eventfd_write(self.exit_fd, 1)
            # The kernel may fetch a page for a vCPU that has gone, and keeps the virtual machine until it comes.
            self.memory.release()
            self._give_back()

    def _free_waiting(self) -> None:
        """Let no vCPU and no device wait any more for a page of guest memory that its handler does not give."""
        if self.memory.source is None:
            return
        threads: list[Worker] = [*self._io_threads(), *self.vcpus]
        for thread in threads:
            thread.request_stop()
        # Once more for a thread that was just about to wait.
        for _ in range(2):
            until = time.monotonic() + _STOP_TIMEOUT
            try:
                for thread in threads:
                    thread.wait_paused(max(until - time.monotonic(), 0.0))
            except KvmError:
                self.memory.release()
            else:
                return

    def _give_back(self) -> None:
        for io in self._io_threads():
            io.close()
        if self.mmds is not None:
            self.mmds.stop()
        self.plugs.close()
        self.serial.close()
        with self._closing:
            while self._fds:
                os.close(self._fds.pop())
            self.parts.close()

    end = stop

    def disown(self) -> None:
        """In a forked child: close the copies of the descriptors. The machine is the parent's, and goes on there."""
        if not self._stopped:
            self._stopped = True
            # Another thread may have had it.
            self._closing = RLock()
            self._give_back()

    def runs(self, thread: int) -> bool:
        """Whether that is one of the machine's own threads, as threading.get_ident() names it."""
        parts: list[Worker | Mmds] = [*self.vcpus, *self._io_threads()]
        if self.mmds is not None:
            parts.append(self.mmds)
        return any(part.ident == thread for part in parts)

    def __del__(self) -> None:
        # One that was dropped while it ran: memory must not go before the vCPUs that use it.
        if not self._stopped:
            end_dropped(self)

    # -- what it tells -------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Counters since the start, under the names of Firecracker's metrics."""
        exits = [vcpu.exits for vcpu in self.vcpus]
        tree: dict[str, dict[str, Any]] = {
            "vcpu": {
                "exit_io_in": sum(e["pio_in"] for e in exits),
                "exit_io_out": sum(e["pio_out"] for e in exits),
                "exit_mmio_read": sum(e["mmio_read"] for e in exits),
                "exit_mmio_write": sum(e["mmio_write"] for e in exits),
                "failures": sum(vcpu.failure is not None for vcpu in self.vcpus),
            },
        }
        if self.board is not None:
            tree.update(self.board.counters())
        if self.mmds is not None:
            tree["mmds"] = self.mmds.counters()
        for (kind, identifier), device in self.devices.items():
            tree[kind if kind in SINGLE else f"{kind}_{identifier}"] = device.counters()
        return tree


def await_end(
    fd: int, exit_status: Callable[[], ExitStatus | None], timeout: float | None
) -> ExitStatus | None:
    """What `exit_status` says when `fd` is readable, or None after `timeout` seconds; `fd` is closed then."""
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while (status := exit_status()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not poll.poll(None if left is None else left * 1000) and left is not None:
                return None
        return status
    finally:
        os.close(fd)


def untold(_message: str) -> None:
    """Where nothing is logged."""


def _boot_time_reporter(logger: Logger | None) -> Callable[[int, int], None]:
    """What the boot timer calls; not a method, so that machine and timer are no cycle."""

    throttle = Throttle()

    def report(wall_us: int, cpu_us: int) -> None:
        if logger is not None:
            logger.throttled_info(
                throttle,
                f"Guest-boot-time = {wall_us:>6} us {wall_us // 1000} ms, "
                f"{cpu_us:>6} CPU us {cpu_us // 1000} CPU ms",
            )

    return report
