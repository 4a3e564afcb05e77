"""What one architecture does for the rest: the names that `crackle.arch.<machine>.platform` offers.

`vmm` speaks to no architecture but through these. A new one is a folder here with a `platform` module, and a file in
`kvm`; nothing in `vmm` changes.
"""

from __future__ import annotations

import msgspec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from crackle.devices.serial import Serial
    from crackle.kvm import Bus, Kvm, Vcpu, Vm
    from crackle.memory import GuestMemory
    from crackle.runtime.iothread import IoThread
    from crackle.schema.cpu import CpuConfig
    from crackle.schema.rate_limiter import TokenBucket

    class Host(Protocol):
        """What a board is plugged into: the machine, as far as it concerns it."""

        @property
        def pio(self) -> Bus: ...
        @property
        def mmio(self) -> Bus: ...
        @property
        def io(self) -> IoThread: ...
        @property
        def memory(self) -> GuestMemory: ...
        def interrupt(self, line: int) -> int:
            """An eventfd that raises the interrupt line; the machine closes it."""

        def assert_line(self, line: int, level: bool) -> None:
            """Set the level of an interrupt line."""

    class Board(Protocol):
        """The devices that are there whatever is configured: console, resets, power, and what tells of a panic."""

        @property
        def serial(self) -> Serial: ...
        @property
        def panicked(self) -> bool:
            """Whether the guest's kernel has said that it panicked."""

        def start(self) -> None:
            """The guest begins now."""

        def send_ctrl_alt_del(self) -> None:
            """ConfigError where there is no keyboard."""

        def press_power_button(self) -> None: ...
        def announce(self, device: DeviceInfo) -> None:
            """Tell the guest of a device that has come while it runs. ConfigError when there is no way to."""

        def ask_back(self, device: DeviceInfo) -> bool:
            """Ask the guest to let go of a device that has come so; False when it cannot be asked, or not again."""

        def withdraw(self, device: DeviceInfo) -> None:
            """A device has gone: the guest need not hear any more that it has come."""

        def counters(self) -> dict[str, dict[str, int]]:
            """What the devices have counted, by section of the metrics."""

        def save(self) -> Any:
            """The devices' state, a Struct; the machine is paused."""

        def restore(self, state: Any) -> None:
            """The reverse of `save`, before the vCPUs run."""

    # A kernel in guest memory, which only the platform that loaded it knows to describe and to enter.
    LoadedKernel = Any

    class Platform(Protocol):
        """One architecture. Sizes and addresses are in bytes; `initrd` is (guest physical address, bytes)."""

        CMDLINE_MAX_SIZE: int
        """Bytes of the kernel command line, its terminating NUL included."""

        VmState: Any
        VcpuState: Any
        BoardState: Any
        """The Structs that `save_vm`, `save_vcpu` and the board's `save` give."""

        DEVICE_WINDOWS: range
        """Guest physical addresses for the windows of devices, in steps of the smallest window."""

        DEVICE_LINES: range
        """Interrupt lines for devices."""

        SAVED_DEVICE_LINES: range
        """Those that a device in a snapshot may have: the same, and more where an older version gave more."""

        DEVICE_MEMORY: range
        """Guest physical addresses for memory that devices bring with them, in steps of what it is a multiple of."""

        DEVICE_ROUTES: range
        """Numbers for message-signalled interrupts."""

        def memory_layout(self, size: int) -> list[tuple[int, int]]:
            """Where so much RAM goes: (guest physical address, bytes). ConfigError when it does not fit."""

        def make_ready(self) -> None:
            """Make what is the same for many machines, in a process that forks theirs."""

        def create_chips(self, vm: Vm) -> None:
            """Interrupt controllers and timers in the kernel, before the first vCPU."""

        def prepare_vcpus(self, kvm: Kvm, vcpus: Sequence[Vcpu], *, smt: bool) -> None:
            """Give the vCPUs all of their state that needs no kernel yet. smt: two to a core."""

        def use_template(
            self, kvm: Kvm, vcpus: Sequence[Vcpu], *, smt: bool, name: str | None, custom: CpuConfig | None
        ) -> None:
            """Have vCPUs that are prepared, and have not run, show their guest what a CPU template leaves.

            The one of that name, or a custom one, or none. ConfigError where it is not for this host.
            """

        def make_board(
            self,
            host: Host,
            *,
            console: tuple[int, int],
            console_waits: bool,
            console_limit: TokenBucket | None,
            ends_on_panic: bool,
            report: Callable[[str], None],
            report_boot_time: Callable[[int, int], None] | None,
        ) -> Board:
            """Attach the board's devices. console: descriptors of its input and output. report: takes what is to be
            logged. report_boot_time: takes wall and CPU microseconds; None for no boot timer.
            """

        def load_kernel(self, memory: GuestMemory, kernel_fd: int) -> LoadedKernel: ...
        def load_initrd(
            self, memory: GuestMemory, initrd_fd: int, kernel: LoadedKernel
        ) -> tuple[int, int]: ...
        def build_cmdline(
            self,
            boot_args: str | None,
            *,
            root: str | None,
            read_only: bool,
            devices: Sequence[DeviceInfo],
        ) -> bytes:
            """The kernel command line without its NUL."""

        def describe(
            self,
            memory: GuestMemory,
            *,
            kernel: LoadedKernel,
            cmdline: bytes,
            initrd: tuple[int, int] | None,
            vcpu_count: int,
            devices: Sequence[DeviceInfo],
        ) -> None:
            """Write to guest memory what the kernel finds out about its machine."""

        def enter_kernel(self, vcpu: Vcpu, kernel: LoadedKernel) -> None:
            """Have the boot vCPU begin at the kernel's first instruction."""

        def save_vm(self, vm: Vm) -> Any:
            """The state of the chips, a Struct; all vCPUs are paused."""

        def restore_vm(self, vm: Vm, state: Any, *, realtime: bool = False) -> None:
            """The reverse, when the vCPUs have their own state. realtime: the guest's clock has gone on meanwhile."""

        def rewind_vcpus(self, vcpus: Sequence[Vcpu], states: Sequence[Any]) -> None:
            """Take back what time has done to vCPUs that were restored and have not run."""

        def rewind_vm(self, vm: Vm, state: Any, *, realtime: bool = False) -> None:
            """The same for chips and clock."""

        def save_vcpu(self, kvm: Kvm, vcpu: Vcpu) -> Any:
            """A paused vCPU's state, a Struct."""

        def check_vcpus(self, kvm: Kvm, vcpus: Sequence[Vcpu], states: Sequence[Any]) -> list[str]:
            """How this host, where `vcpus` are prepared, is unlike the one where others were saved.

            ConfigError when it lacks what these need.
            """

        def restore_vcpus(self, kvm: Kvm, vcpus: Sequence[Vcpu], states: Sequence[Any]) -> None:
            """The reverse of `save_vcpu`, for all vCPUs of a machine, before they run."""

        def probe(self, kvm: Kvm) -> list[Finding]:
            """Find out, with guests that take milliseconds, whether this KVM does what Linux needs; in seconds at most.

            What does it is imported then.
            """


class Finding(msgspec.Struct, frozen=True):
    """What one question to this KVM got for an answer. `detail` says what happened, in words."""

    name: str
    works: bool
    detail: str


class DeviceInfo(msgspec.Struct, frozen=True):
    """Where the guest finds a device: a window of `size` bytes at guest physical `address`, and its interrupt."""

    address: int
    size: int
    gsi: int
    kind: str = "virtio-mmio"
