"""A virtual machine without devices or kernel, made before it is asked for.

Memory and its slots, interrupt controllers, timer and vCPUs need only the machine configuration. Making them takes
milliseconds, nearly all of them KVM waiting for grace periods, so it is done ahead of time on a thread of its own.
"""

from __future__ import annotations

from _thread import allocate_lock

import msgspec

from crackle.arch import platform
from crackle.errors import ConfigError, KvmError
from crackle.kvm import Kvm, Vcpu, Vm
from crackle.memory import GuestMemory
from crackle.runtime.threads import Thread
from crackle.vmm.slots import MemorySlots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from crackle.schema.machine import MachineConfig

_BACKINGS = {"None": "anonymous", "Transparent": "transparent", "2M": "hugepages"}
_SHARED_BACKINGS = {"None": "memfd", "Transparent": "transparent-memfd", "2M": "hugepages-memfd"}


class Parts(msgspec.Struct):
    """What a shell has made; `close` gives it all back, in the order in which things depend on each other."""

    memory: GuestMemory | None = None
    kvm: Kvm | None = None
    vm: Vm | None = None
    slots: MemorySlots | None = None
    vcpus: list[Vcpu] = msgspec.field(default_factory=list)

    def drop_memory(self) -> None:
        """For the guest to have other memory."""
        if self.slots is not None:
            self.slots.release()
            self.slots = None
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def close(self) -> None:
        """Idempotent."""
        for vcpu in self.vcpus:
            vcpu.close()
        for part in (self.vm, self.kvm, self.memory):
            if part is not None:
                part.close()


class Shell:
    """A virtual machine without devices or kernel, being made on a thread of its own, or made at once.

    shared: another process will have guest memory too, so it is a memfd. base: one for another configuration, which is
    this one's from now on: what fits is used again. memory: what it has instead of new memory, and owns from now on.

    `take` waits for that thread and hands the parts over; `close` waits too and gives them back; `abandon` gives
    them back in the background. After any of them the shell owns nothing.
    """

    def __init__(
        self,
        config: MachineConfig,
        shared: bool = False,
        base: Shell | None = None,
        memory: GuestMemory | None = None,
        on_thread: bool = True,
    ) -> None:
        self.config = config
        self.shared = shared
        self._base = base
        self._parts = Parts(memory=memory)
        self._error: BaseException | None = None
        self._made = allocate_lock()
        self._made.acquire()
        if on_thread:
            Thread("shell", self._run)
        else:
            self._run()

    def _run(self) -> None:
        try:
            self._take_over()
            _make(self.config, self.shared, self._parts)
        except BaseException as error:
            self._error = error
        finally:
            self._made.release()

    def _take_over(self) -> None:
        base, self._base = self._base, None
        if base is None:
            return
        parts = base._release()
        # A vCPU cannot be taken away.
        if base.is_whole and len(parts.vcpus) <= self.config.vcpu_count:
            parts.drop_memory()
            self._parts = parts
        else:
            parts.close()

    @property
    def is_whole(self) -> bool:
        """Whether it has been made, without an error; not while it is being made."""
        return self._error is None

    @property
    def fds(self) -> list[int]:
        """The descriptors that it has, if its memory is nobody else's."""
        parts = [part for part in (self._parts.kvm, self._parts.vm, *self._parts.vcpus) if part is not None]
        return [part.fd for part in parts]

    def take(self) -> Parts:
        """The finished parts, which the caller now owns. Raises what making them raised."""
        parts = self._release()
        if self._error is not None:
            parts.close()
            raise self._error
        return parts

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._release().close()

    def disown(self) -> None:
        """In a forked child, where there is no thread to wait for: close the copies."""
        if self._base is not None:
            self._base.disown()
        parts, self._parts = self._parts, Parts()
        parts.close()

    def abandon(self) -> None:
        """Give everything back in the background: closing a VM takes as long as making one."""
        Thread("reaper", self.close)

    def _release(self) -> Parts:
        with self._made:
            parts, self._parts = self._parts, Parts()
        return parts


def _make(config: MachineConfig, shared: bool, parts: Parts) -> None:
    memory = parts.memory
    if memory is None:
        backing = (_SHARED_BACKINGS if shared else _BACKINGS)[config.huge_pages]
        memory = GuestMemory(platform.memory_layout(config.mem_size_mib << 20), backing=backing)
        parts.memory = memory
    kvm, vm = parts.kvm, parts.vm
    if kvm is None or vm is None:
        kvm, vm = _make_vm(parts)
    for index in range(len(parts.vcpus), config.vcpu_count):
        parts.vcpus.append(vm.create_vcpu(index))
    platform.prepare_vcpus(kvm, parts.vcpus, smt=config.smt)
    memory.track_dirty(config.track_dirty_pages)
    parts.slots = MemorySlots(vm, memory, log_dirty_pages=config.track_dirty_pages)


def _make_vm(parts: Parts) -> tuple[Kvm, Vm]:
    try:
        parts.kvm = kvm = Kvm()
    except KvmError as error:
        advice = "`crackle doctor` tells more; tools/emuhost is a host that has a KVM"
        raise KvmError(f"{error}. {advice}") from None
    missing = kvm.missing()
    if missing:
        raise ConfigError(f"this host's KVM lacks {', '.join(missing)}; `crackle doctor` tells more")
    parts.vm = vm = kvm.create_vm()
    platform.create_chips(vm)
    return kvm, vm
